"""DINO's head, and the passage of crops through a backbone and a head.

DINO (Caron et al. 2021, arXiv:2104.14294), section 3.1 and appendix C: a deeper MLP with GELU, an
L2-normalised bottleneck and a weight-normalised layer of K outputs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import forward_crops


def unit_rows(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x / max(|x|, eps) over the last dimension, computed in float32, returned in x's dtype.

    Rows are divided by their largest entry first, so that no square overflows or vanishes; the
    quotient does not depend on that divisor, nor does its gradient.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.detach().abs().amax(-1, keepdim=True)
    wide = wide / largest.clamp(min=eps)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    # Only rows shorter than eps are clamped: at the bound itself, the norm of a row with one entry,
    # clamp has no gradient.
    return (wide / torch.where(largest < eps, norm.clamp(min=1), norm)).to(x.dtype)


class WeightNormLinear(nn.Module):
    """A Linear without bias whose rows are weight_g * weight_v / |weight_v|, (B, in) -> (B, out).

    Salimans & Kingma 2016, arXiv:1602.07868, Eq. 2. weight_g (out, 1) starts at 1, weight_v
    (out, in) as a torch Linear; the names are those of torch's first weight_norm, so that released
    heads load. In float32 a row of weight_v may be of any length from 1e-17 to 1e17.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        # Fused: weight_v is read once here and once in the backward pass, and no more of it kept.
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DINOHead(nn.Module):
    """DINO's projection head, features (B, in_dim) -> scores (B, out_dim), before any softmax.

    nlayers            Linear layers of the MLP, GELU between them, hidden_dim wide
    bottleneck_dim     outputs of the MLP, L2-normalised before the last layer
    use_bn             BatchNorm1d before every GELU
    norm_last_layer    the rows of the last layer keep length 1: its weight_g is not trained
    l2_bottleneck      False: neither bottleneck nor normalisation (Caron 2021, thesis, 5.6.6 and
                       Figure 5.9), nlayers Linear layers in all, last_layer a Linear with bias

    Linear weights start as a truncated normal of 0.02, biases at 0. Raises ValueError.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        l2_bottleneck: bool = True,
    ):
        super().__init__()
        if min(in_dim, out_dim, nlayers, hidden_dim, bottleneck_dim) < 1:
            raise ValueError(
                f"--out_dim {out_dim}, --head_layers {nlayers}, --hidden_dim {hidden_dim} and "
                f"--bottleneck_dim {bottleneck_dim} must be positive"
            )
        self.l2_bottleneck = l2_bottleneck
        layers, dim = [], in_dim
        for _ in range(nlayers - 1):
            layers.append(nn.Linear(dim, hidden_dim))
            layers += [nn.BatchNorm1d(hidden_dim), nn.GELU()] if use_bn else [nn.GELU()]
            dim = hidden_dim
        if l2_bottleneck:
            layers.append(nn.Linear(dim, bottleneck_dim))
            self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
            self.last_layer.weight_g.requires_grad_(not norm_last_layer)
        else:
            self.last_layer = nn.Linear(dim, out_dim)
        self.mlp = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        return self.last_layer(unit_rows(x) if self.l2_bottleneck else x)


class MultiCropWrapper(nn.Module):
    """A backbone and a head; the backbone's own classifier `fc` or `head`, if any, is taken out.

    A tensor or a list of crops (B, C, S_i, S_i) -> the head's output (sum of B, K), rows in the
    order of the crops. Consecutive crops of one size share a pass of the backbone, those of all
    sizes that of a vision transformer, see forward_crops; the head sees all rows at once.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        for name in ("fc", "head"):
            if isinstance(getattr(backbone, name, None), nn.Module):
                setattr(backbone, name, nn.Identity())
        self.backbone, self.head = backbone, head

    def compile(self, *args, **options) -> None:
        """Compile backbone and head, so that each is fast by itself too; options of torch.compile."""
        for part in (self.backbone, self.head):
            part.compile(*args, **{"dynamic": False, **options})  # few sizes, each worth a graph

    def forward_backbone(self, x: Tensor) -> Tensor:
        """Images (B, C, S, S) -> features (B, in_dim)."""
        return self.backbone(x)

    def forward(self, crops: Tensor | Sequence[Tensor]) -> Tensor:
        return self.head(forward_crops(self.backbone, crops))
