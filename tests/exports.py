"""Networks to export, and models of other libraries for what is exported: what several tests share."""

import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops.misc import FrozenBatchNorm2d

from src.nets.pretrained import open_pretrained

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SWAV_RUN = {"stem": "imagenet", "width": 1.0, "in_chans": 3, "hidden_mlp": 16, "feat_dim": 8}
SWAV_RUN |= {"head_dims": None, "head_bn": True, "nmb_prototypes": [6], "size_crops": [64, 32]}
SWAV_RUN |= {"mean": None, "std": None, "seed": 3, "data_path": "my_images"}


@torch.no_grad()
def lively(network):
    """Have no tensor at the value that every network starts with, so that none can be left out."""
    generator = torch.Generator().manual_seed(1)
    for name, x in network.state_dict().items():
        if not x.is_floating_point():
            continue
        noise = torch.rand(x.shape, generator=generator)
        if name.endswith("running_var") or (x.ndim == 1 and name.endswith("weight")):
            x.copy_(0.8 + 0.4 * noise)
        elif x.ndim == 1 or "token" in name or "pos_embed" in name:
            x.copy_(0.2 * noise - 0.1)
    return network.eval()


def saved_trunk(folder, network, arch, **options):
    """A network as open_pretrained gives it, from a file of its weights."""
    path = folder / "weights.pth"
    torch.save(lively(network).state_dict(), path)
    return open_pretrained(path, arch, image_size=64, **options)


def assert_same(features, expected):
    """To 1e-5 of the largest feature."""
    assert features.shape == expected.shape and expected.std() > 0
    difference = (features - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-5, difference


class TinyDETR(nn.Module):
    """The names of DETR where its backbone is concerned, and a layer that the backbone's file lacks."""

    def __init__(self):
        super().__init__()
        trunk = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
        backbone = nn.Module()
        backbone.body = IntermediateLayerGetter(trunk, {"layer4": "0"})
        self.backbone = nn.Sequential(backbone, nn.Identity())
        self.class_embed = nn.Linear(8, 4)

    def forward(self, images):
        """The last map of the backbone, averaged over positions, (B, 2048)."""
        return self.backbone[0].body(images)["0"].mean((2, 3))
