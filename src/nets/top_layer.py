"""The top layer that is set anew at every clustering, and the classifiers that end in one."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import forward_crops
from .sobel import Sobel

POOL = "pool"  # a max-pooling, among the convolutions of a PlainNetwork


class TopLayer(nn.Linear):
    """A Linear (B, num_features) -> (B, K) whose number of classes K changes while it is trained.

    Its two Parameters stay the same objects, so that an optimiser goes on with them; the momentum it
    has of another shape is the caller's to drop. A state_dict of another K is taken as it is.
    """

    resizable = True  # src.run.checkpoint lets a state dict have another number of classes

    def __init__(self, num_features: int, num_classes: int):
        super().__init__(num_features, num_classes)
        self.reset(num_classes)

    @torch.no_grad()
    def reset(self, num_classes: int, generator: torch.Generator | None = None) -> None:
        """New weights for `num_classes` classes: normal with a deviation of 0.01, biases 0, no grad.

        generator: of the CPU, where weights are drawn so that every device gets the same ones.
        """
        shape = (num_classes, self.in_features)
        weight = torch.empty(shape, device="cpu").normal_(0, 0.01, generator=generator)
        self._resize(num_classes)
        self.weight.copy_(weight)
        self.bias.zero_()

    def _resize(self, num_classes):
        for parameter in (self.weight, self.bias):
            parameter.grad = None
            if num_classes != self.out_features:
                data = parameter.data.new_empty((num_classes, *parameter.shape[1:]))
                # While a loss or DDP holds on to an older graph, autograd expects gradients of the
                # older shape; a change of type makes it forget that, a change of shape alone does not.
                parameter.data = data.half() if data.dtype == torch.float32 else data.float()
                parameter.data = data
        self.out_features = num_classes

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.shape[1:] == self.weight.shape[1:]:
            self._resize(len(weight))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Classifier(nn.Module):
    """Sobel filters if `sobel`, a trunk, a top layer if there are classes.

    trunk: the layers of the trunk, by attribute; how features come out of them is forward_backbone,
    of a subclass. image_padding: zeros around images that see no Sobel filters, in pixels. Raises
    ValueError on other images than of three channels for Sobel filters.
    """

    def __init__(
        self,
        trunk: dict[str, nn.Module],
        num_features: int,
        num_classes: int,
        sobel: bool,
        sobel_padding: int,
        in_chans: int,
        image_padding: int = 0,
    ):
        super().__init__()
        if sobel and in_chans != 3:
            raise ValueError(
                f"--sobel true needs --in_chans 3, not {in_chans}: leave it out, grey images are then "
                "read as three equal channels"
            )
        self.num_features = num_features
        self.sobel = Sobel(sobel_padding) if sobel else None
        self.image_padding = 0 if sobel else image_padding
        for name, module in trunk.items():
            self.add_module(name, module)
        # Last, so that the trunk of a seed does not depend on the number of classes.
        self.top_layer = TopLayer(num_features, num_classes) if num_classes else None

    def edges(self, x: Tensor) -> Tensor:
        """What the first layer sees: images (B, C, H, W), or their Sobel filters (B, 2, ...)."""
        if self.sobel is not None:
            return self.sobel(x)
        return F.pad(x, 4 * [self.image_padding]) if self.image_padding else x

    def before_top(self, x: Tensor) -> Tensor:
        """What the top layer sees of features (B, num_features)."""
        return F.relu(x)

    def forward(self, crops: Tensor | Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """A tensor or a list of crops (B, C, S_i, S_i) -> features (N, num_features), crop-major.

        With a top layer (features, scores), the scores (N, K) being those of the classes.
        """
        x = forward_crops(self.forward_backbone, crops)
        return x if self.top_layer is None else (x, self.top_layer(self.before_top(x)))


class PlainNetwork(Classifier):
    """Convolutions, each with batch norm and ReLU, then linear layers; a subclass says which.

    num_classes: of the top layer, 0 for none. sobel, sobel_padding: see src.nets.sobel.Sobel. in_chans:
    of the images. image_padding: see Classifier. width: multiplies all channels and num_features,
    which is 4096. dropout: in the linear layers, while training.

    Convolutions start as normal with a variance of 2 / (kernel^2 channels), linear layers as normal
    with a deviation of 0.01, biases at 0. Raises ValueError.
    """

    convolutions: tuple  # channels, kernel, stride, padding of each, and POOL
    pool: tuple[int, int]  # window and stride
    cells: int  # side of the last map; that of images of another size is averaged to it
    smallest: int  # side in pixels of what the first layer sees, for there to be a last map
    # (inputs, num_features, dropout) -> layers of (B, inputs) -> (B, num_features), no ReLU at the end
    linear_layers: Callable[[int, int, float], list[nn.Module]]

    def __init__(
        self,
        num_classes: int = 0,
        sobel: bool = False,
        sobel_padding: int = 1,
        in_chans: int = 3,
        width: float = 1.0,
        dropout: float = 0.5,
        image_padding: int = 0,
    ):
        if not 0 <= dropout < 1:
            raise ValueError(f"--dropout {dropout} must be at least 0 and below 1")
        planes = [round(layer[0] * width) for layer in self.convolutions if layer != POOL]
        num_features = round(4096 * width)
        if in_chans < 1 or min(planes) < 1:
            raise ValueError(f"--in_chans {in_chans} with --width {width} leaves no channel")
        layers, channels = [], 2 if sobel else in_chans
        for layer in self.convolutions:
            if layer == POOL:
                layers.append(nn.MaxPool2d(*self.pool))
                continue
            out = round(layer[0] * width)
            layers += [nn.Conv2d(channels, out, *layer[1:]), nn.BatchNorm2d(out), nn.ReLU(True)]
            channels = out
        classifier = self.linear_layers(channels * self.cells**2, num_features, dropout)
        for module in (*layers, *classifier):
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        trunk = {"features": nn.Sequential(*layers), "classifier": nn.Sequential(*classifier)}
        super().__init__(
            trunk, num_features, num_classes, sobel, sobel_padding, in_chans, image_padding
        )
        self.num_convs = len(planes)

    def forward_backbone(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, S, S) -> (B, num_features), the last linear layer before its ReLU.

        Raises ValueError on images that are too small.
        """
        padding = self.image_padding if self.sobel is None else self.sobel.padding - 1
        smallest = self.smallest - 2 * padding
        if min(x.shape[2:]) < smallest:
            raise ValueError(
                f"images of {min(x.shape[2:])} px are too small for this network: give it at least "
                f"{smallest} px, or take a ResNet with --stem small"
            )
        x = self.features(self.edges(x))
        if x.shape[2:] != (self.cells, self.cells):
            x = F.adaptive_avg_pool2d(x, self.cells)
        return self.classifier(x.flatten(1))

    def forward_conv(self, x: Tensor, conv: int) -> Tensor:
        """Images -> the map (B, C, H, W) of convolution `conv`, 1 to num_convs, after its ReLU.

        Raises ValueError on another number.
        """
        if not 1 <= conv <= self.num_convs:
            raise ValueError(f"--conv {conv} must be from 1 to {self.num_convs} for this network")
        x = self.edges(x)
        relus = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.ReLU)]
        return self.features[: relus[conv - 1] + 1](x)
