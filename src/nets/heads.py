"""Heads on top of a backbone: projection MLP, prototypes, and the passage of crops through both.

SwAV (Caron et al. 2020, arXiv:2006.09882), section 3.1 and appendix A.1: features are projected
by a small MLP, L2-normalised and multiplied with K trainable prototypes.
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

    Consecutive crops of one size share one pass, so that batch statistics are those of a resolution; a
    backbone with `forward_sizes` takes all of these batches at once. Raises ValueError on an empty list.
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
    batches = [torch.cat(group) if len(group) > 1 else group[0] for group in groups]
    if len(batches) > 1 and hasattr(backbone, "forward_sizes"):
        return backbone(batches)  # by __call__, which may be compiled
    features = [backbone(batch) for batch in batches]
    return torch.cat(features) if len(features) > 1 else features[0]
