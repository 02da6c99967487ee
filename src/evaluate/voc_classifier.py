"""A pre-trained network under a new classifier of 20 classes, to be fine-tuned on PASCAL VOC 2007."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..nets.top_layer import PlainNetwork

WEIGHT_STD, BIAS = 0.01, 0.1  # of the classifier at the start, as published


class VOCClassifier(nn.Module):
    """Images (B, C, S, S) -> scores (B, num_classes).

    backbone: the model of src.nets.pretrained.open_pretrained. Of AlexNet and VGG16 with batch norm the
    linear layers start anew and belong to the classifier; of other networks a linear layer alone is
    one. The rest, the trunk, is frozen with only_classifier; train_batchnorm leaves the scale and shift
    of its batch norms to be trained. In training, too, the trunk is in evaluation mode: its batch
    norms use the statistics they have.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        only_classifier: bool,
        train_batchnorm: bool,
        generator: torch.Generator,
    ):
        super().__init__()
        self.backbone, self.top = backbone, nn.Linear(backbone.num_features, num_classes)
        if only_classifier:
            self.trunk().requires_grad_(False)
        if train_batchnorm:
            for module in self.trunk().modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(True)
        with torch.no_grad():
            for layer in self._linear_layers():
                weight = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(weight * WEIGHT_STD)
                nn.init.constant_(layer.bias, BIAS)

    def trunk(self) -> nn.Module:
        """What comes before the classifier."""
        plain = isinstance(self.backbone, PlainNetwork)
        return self.backbone.features if plain else self.backbone

    def _linear_layers(self) -> Iterator[nn.Linear]:
        if isinstance(self.backbone, PlainNetwork):
            yield from (x for x in self.backbone.classifier if isinstance(x, nn.Linear))
        yield self.top

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone.forward_backbone(images)  # (B, num_features)
        before_top = getattr(self.backbone, "before_top", nn.Identity())  # a ReLU, or nothing
        return self.top(before_top(features))

    def train(self, mode: bool = True) -> "VOCClassifier":
        super().train(mode)
        self.trunk().eval()
        return self
