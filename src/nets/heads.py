"""Heads on top of a backbone: projection MLP, prototypes, and the passage of crops through both.

SwAV (Caron et al. 2020, arXiv:2006.09882), section 3.1 and appendix A.1: features are projected
by a small MLP, L2-normalised and multiplied with K trainable prototypes.
DINO (Caron et al. 2021, arXiv:2104.14294), section 3.1 and appendix C: a deeper MLP with GELU, an
L2-normalised bottleneck and a weight-normalised layer of K outputs.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiPrototypes(nn.Module):
    """Several independent sets of prototypes, named prototypes0, prototypes1, ...

    Maps an embedding (B, D) to a list of scores, (B, K_i) for the i-th set.
    """

    def __init__(self, dim: int, nmb_prototypes: Sequence[int]):
        super().__init__()
        self.nmb_heads = len(nmb_prototypes)
        for i, k in enumerate(nmb_prototypes):
            self.add_module(f"prototypes{i}", nn.Linear(dim, k, bias=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [getattr(self, f"prototypes{i}")(x) for i in range(self.nmb_heads)]


def build_head(
    num_features: int,
    output_dim: int = 0,
    hidden_mlp: int = 0,
    nmb_prototypes: int | Sequence[int] = 0,
    head_dims: Sequence[int] | None = None,
    head_bn: bool = True,
) -> tuple[nn.Module | None, nn.Module | None]:
    """The pair (projection head, prototypes) for features (B, num_features); None where not wanted.

    output_dim alone gives one Linear; with hidden_mlp, Linear, BatchNorm1d, ReLU, Linear.
    `head_dims` lists the outputs of every Linear of a free MLP and overrides both. Nothing follows
    the last Linear. `head_bn=False` leaves BatchNorm1d out, as in the released RN50-w5.
    `nmb_prototypes`: K, or a list with one K for each of several sets. Raises ValueError.
    """
    head_dims = list(head_dims or [])
    several = not isinstance(nmb_prototypes, int)
    if min(output_dim, hidden_mlp) < 0:
        raise ValueError(f"--feat_dim {output_dim}, --hidden_mlp {hidden_mlp} must be at least 0")
    if min(head_dims, default=1) < 1:
        raise ValueError(f"--head_dims {head_dims} must be positive sizes, such as 2048 2048 128")
    if (min(nmb_prototypes, default=0) < 1) if several else (nmb_prototypes < 0):
        raise ValueError(f"--nmb_prototypes {nmb_prototypes} must be positive, such as 3000")

    if not head_dims and output_dim:
        head_dims = [hidden_mlp, output_dim] if hidden_mlp else [output_dim]
    projection_head, dim = None, num_features
    if head_dims:
        layers = []
        for size in head_dims:
            layers.append(nn.Linear(dim, size))
            layers += [nn.BatchNorm1d(size), nn.ReLU(inplace=True)] if head_bn else [nn.ReLU()]
            dim = size
        layers = layers[: -2 if head_bn else -1]
        projection_head = nn.Sequential(*layers) if len(layers) > 1 else layers[0]

    prototypes = None
    if several:
        prototypes = MultiPrototypes(dim, nmb_prototypes)
    elif nmb_prototypes:
        prototypes = nn.Linear(dim, nmb_prototypes, bias=False)
    return projection_head, prototypes


def apply_head(
    x: Tensor, projection_head: nn.Module | None, prototypes: nn.Module | None, normalize: bool
) -> Tensor | tuple[Tensor, Tensor | list[Tensor]]:
    """Features (B, num_features) -> embedding (B, D); with prototypes (embedding, scores (B, K)).

    Under autocast the MLP runs in low precision, the normalisation and the scores in float32:
    scores are divided by epsilon = 0.05, where the 8 bits of bfloat16 would show.
    """
    if projection_head is not None:
        x = projection_head(x)  # (B, D)
    if normalize:
        x = F.normalize(x.float(), dim=1)
    if prototypes is None:
        return x
    with torch.autocast(x.device.type, enabled=False):
        return x, prototypes(x.to(next(prototypes.parameters()).dtype))  # (B, D), (B, K)


def forward_crops(backbone: Callable[[Tensor], Tensor], crops: Tensor | Sequence[Tensor]) -> Tensor:
    """Pass a tensor or a list of crops (B, C, S_i, S_i) through `backbone`, rows in input order.

    Consecutive crops of one size share one pass, so that batch statistics are those of a
    resolution. Raises ValueError on an empty list.
    """
    if isinstance(crops, Tensor):
        return backbone(crops)
    if not crops:
        raise ValueError("the list of crops is empty: give at least one tensor (B, C, S, S)")
    groups = [[crops[0]]]
    for crop in crops[1:]:
        if crop.shape[1:] == groups[-1][0].shape[1:]:
            groups[-1].append(crop)
        else:
            groups.append([crop])
    features = [backbone(torch.cat(group) if len(group) > 1 else group[0]) for group in groups]
    return torch.cat(features) if len(features) > 1 else features[0]


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
    order of the crops. Consecutive crops of one size share a pass of the backbone, see
    forward_crops; the head sees all rows at once.
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
