"""Networks that are trained as classifiers of clusters, by the name of --arch: alexnet, vgg16, ResNets.

model = build_convnet("alexnet", num_classes=10000, sobel=True)
features = model.forward_backbone(images)  # (B, 4096), what is clustered
features, scores = model(images)  # (B, 4096), (B, 10000)
model.top_layer.reset(20000, generator)  # after a clustering

The names of parameters are those of the released checkpoints.
"""

from torch import Tensor, nn

from .resnet import ARCHITECTURES, build_model
from .top_layer import POOL, Classifier, PlainNetwork, TopLayer

__all__ = ["PLAIN", "AlexNet", "ResNetClassifier", "TopLayer", "VGG16", "build_convnet"]


class AlexNet(PlainNetwork):
    """AlexNet with batch norm, as DeepCluster trains it (Caron et al. 2018, arXiv:1807.05520, 3.3).

    Krizhevsky et al. 2012 in one column of five convolutions, with batch norm in the place of local
    response normalisation. Made for images of 224 px, and takes others from 63 px on; see PlainNetwork.
    """

    convolutions = (
        *((96, 11, 4, 2), POOL),
        *((256, 5, 1, 2), POOL),
        *((384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1), POOL),
    )
    pool, cells, smallest = (3, 2), 6, 63

    @staticmethod
    def linear_layers(inputs: int, num_features: int, dropout: float) -> list[nn.Module]:
        """The layers between the last map, flattened to (B, inputs), and the features (B, num_features)."""
        return [
            nn.Dropout(dropout),
            nn.Linear(inputs, num_features),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(num_features, num_features),
        ]


class VGG16(PlainNetwork):
    """VGG-16 with batch norm, as DeepCluster and DeeperCluster train it.

    Simonyan & Zisserman 2015, arXiv:1409.1556, configuration D; Caron et al. 2018, arXiv:1807.05520,
    and 2019, arXiv:1905.01278. Made for images of 224 px, and takes others from 32 px on; see
    PlainNetwork.
    """

    convolutions = (
        *((64, 3, 1, 1), (64, 3, 1, 1), POOL),
        *((128, 3, 1, 1), (128, 3, 1, 1), POOL),
        *((256, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), POOL),
        *((512, 3, 1, 1), (512, 3, 1, 1), (512, 3, 1, 1), POOL) * 2,
    )
    pool, cells, smallest = (2, 2), 7, 32

    @staticmethod
    def linear_layers(inputs: int, num_features: int, dropout: float) -> list[nn.Module]:
        """The layers between the last map, flattened to (B, inputs), and the features (B, num_features)."""
        return [
            nn.Linear(inputs, num_features),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(num_features, num_features),
        ]


PLAIN = {"alexnet": AlexNet, "vgg16": VGG16}


class ResNetClassifier(Classifier):
    """A trunk of src.nets.resnet, (B, C, S, S) -> (B, num_features) pooled, under Sobel and a top layer.

    Its parameters are called sobel.*, trunk.* and top_layer.*.
    """

    def __init__(
        self, trunk: nn.Module, num_classes: int, sobel: bool, sobel_padding: int, in_chans: int
    ):
        features = trunk.num_features
        super().__init__({"trunk": trunk}, features, num_classes, sobel, sobel_padding, in_chans)

    def forward_backbone(self, x: Tensor) -> Tensor:
        """Features (B, num_features) of images (B, C, S, S)."""
        return self.trunk.forward_backbone(self.edges(x))

    def before_top(self, x: Tensor) -> Tensor:
        """What the top layer takes, of the features."""
        return x  # the pooled output of a ReLU


def build_convnet(
    arch: str,
    num_classes: int = 0,
    sobel: bool = False,
    sobel_padding: int = 1,
    in_chans: int = 3,
    stem: str = "imagenet",
    width: float = 1.0,
    zero_init_residual: bool = False,
    dropout: float = 0.5,
    image_padding: int = 0,
) -> nn.Module:
    """The untrained network of `arch`, with a top layer if there are classes; see Classifier.

    arch: alexnet or vgg16, ours, with batch norm; a name of src.nets.resnet.ARCHITECTURES or, without
    Sobel, a torchvision classification network. sobel_padding: see src.nets.sobel.Sobel. stem: of ResNets,
    and not used by others, which presets give it too; nor is dropout used by ResNets. image_padding:
    zeros around the images of vgg16 where there are no Sobel filters, 1 in DeeperCluster; not used by
    others. Raises ValueError on an unknown name and on options that do not fit.
    """
    filters = {"sobel": sobel, "sobel_padding": sobel_padding, "in_chans": in_chans}
    if arch in PLAIN:
        if zero_init_residual:
            raise ValueError(f"--zero_init_residual needs a ResNet: for --arch {arch} leave it out")
        if arch == "vgg16":
            filters["image_padding"] = image_padding
        return PLAIN[arch](num_classes, width=width, dropout=dropout, **filters)
    options = {"width": width, "zero_init_residual": zero_init_residual}
    if sobel and arch not in ARCHITECTURES:
        names = ", ".join([*PLAIN, *ARCHITECTURES])
        raise ValueError(f"--sobel true needs one of {names}, not --arch {arch}")
    if arch in ARCHITECTURES:
        options["stem"] = stem
    trunk = build_model(arch, in_chans=2 if sobel else in_chans, **options)
    return ResNetClassifier(trunk, num_classes, **filters)
