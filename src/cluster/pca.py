"""PCA, whitening and l2 normalisation of the features of all processes, in blocks.

What DeepCluster and DeeperCluster do before k-means (thesis, section 3.2.1). Features may be a
memory-mapped tensor that fits into no memory: they are read twice to fit, and once to whiten.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dist
from .exact_sums import block_rows
from .neighbours import full_precision

# Products of numbers below 2^BITS add up over ROWS to 2^53, exact in float64.
BITS, ROWS = 20, 2**13
COLUMNS = 512  # of the covariance computed at a time; what is above its diagonal is left out


@dataclass(frozen=True)
class Whitening:
    """x -> components (x - mean): entries of mean 0, variance 1 and no correlation.

    mean: (D,). components: (d, D), the eigenvectors of the d largest eigenvalues, divided by their
    square roots; the largest entry of each is positive. eigenvalues: (d,), the largest first.
    All are float64.
    """

    mean: Tensor
    components: Tensor
    eigenvalues: Tensor


@torch.no_grad()
def fit_whitening(
    features: Tensor,
    dim: int,
    floor: float = 1e-5,
    device: torch.device | None = None,
    centred: bool = True,
) -> Whitening:
    """PCA to min(dim, D) entries of the rows of all processes, with a covariance divided by N.

    centred: False: the eigenvectors are those of the second moment about 0, while the mean is subtracted
    from what is whitened all the same, as DINO's copy detection does it.

    features: (n, D), this process's rows, any floating type; n may be 0. floor: eigenvalues below
    this share of the largest are raised to it. Where no feature varies, nothing is divided.
    device: where blocks of features are computed, and what the result is on; the features' own by
    default. Rank 0 finds the eigenvectors, which all then have.

    Features are rounded to 2^-20 of half of their range (each to its own; to 2^-17 for 100 million
    rows), and their sums are exact: any number of processes finds the same covariance, to the bit.
    That moves a covariance by some 1e-6 / sqrt(N) of the product of the two deviations.
    Memory: 40 D^2 bytes, and a block. Raises ValueError on all processes for no row at all,
    features that are not finite in float32, dim below 1, or a floor outside of (0, 1].
    """
    if features.ndim != 2 or features.shape[1] == 0 or dim < 1 or not 0 < floor <= 1:
        raise ValueError(
            f"PCA of features {tuple(features.shape)} to {dim} dimensions with a floor of {floor} "
            f"needs features (n, D), a dimension of at least 1 and a floor in (0, 1]"
        )
    device = _device(features, device)
    total, low, high = _ends(features, device)
    mean, covariance = _moments(features, (low + high) / 2, (high - low) / 2, total)
    if not centred:
        covariance.addr_(mean, mean)
    eigenvalues = mean.new_zeros(min(dim, len(mean)))
    components = mean.new_zeros(len(eigenvalues), len(mean))
    if dist.is_main():
        values, vectors = torch.linalg.eigh(covariance)  # of its lower half
        eigenvalues = values.flip(0)[: len(eigenvalues)]
        eigenvalues = eigenvalues.clamp(min=eigenvalues[0] * floor)
        components = vectors.T.flip(0)[: len(eigenvalues)]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        deviations = eigenvalues.where(eigenvalues > 0, 1.0).sqrt()
        components = components * largest.sign() / deviations[:, None]
    eigenvalues = dist.broadcast(eigenvalues)
    return Whitening(mean, dist.broadcast(components), eigenvalues)


@torch.no_grad()
def whiten(
    features: Tensor,
    whitening: Whitening,
    out: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Whitened, l2-normalised rows (n, d) float32; a row at the mean stays 0.

    features: (n, D), any floating type. out: where to write them, which may be a memory-mapped
    tensor and on another device; by default a new tensor beside the features. device: where blocks
    are computed, the features' own by default. Products are float32, whatever autocast says.
    Raises ValueError when the shapes do not fit.
    """
    dim, size = whitening.components.shape
    if features.ndim != 2 or features.shape[1] != size:
        raise ValueError(f"whitening is for features (n, {size}), not {tuple(features.shape)}")
    if out is None:
        out = torch.empty(len(features), dim, device=features.device)
    if out.shape != (len(features), dim):
        raise ValueError(f"out {tuple(out.shape)} must be ({len(features)}, {dim})")
    device = _device(features, device)
    mean, components = whitening.mean.to(device), whitening.components.to(device)
    weights = (components / components.abs().amax()).T.float()  # a factor changes no unit row
    weights = F.pad(weights, (0, -dim % 32))
    # The mean is subtracted in two parts, so that a mean far from 0 costs no digit of a feature.
    reach = math.frexp(max(mean.abs().amax().item(), 1 / components.abs().amax().item()))[1]
    scale = 2.0 ** -max(-100, min(100, reach))
    coarse = (mean * scale).float()
    fine = (mean * scale - coarse).float()
    # Blocks have one shape, the last one being filled up, and no last few columns: the bits of a row
    # must not depend on how many there are, nor on its place among them.
    length = block_rows(device, size, 2**18) // 64 * 64
    rows = weights.new_zeros(length, size)
    product = weights.new_empty(length, weights.shape[1])
    with full_precision():
        for block, target in zip(features.split(length), out.split(length), strict=True):
            centred = rows[: len(block)]
            centred.copy_(block).mul_(scale).sub_(coarse).sub_(fine)
            largest = torch.linalg.vector_norm(centred, ord=math.inf, dim=1, keepdim=True)
            centred.div_(largest.where(largest > 0, 1.0))  # of any size: no square overflows
            torch.mm(rows, weights, out=product)
            target.copy_(F.normalize(product[:, :dim])[: len(block)])
    return out


def _device(features, device):
    device = features.device if device is None else torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device  # which has no float64


def _ends(features, device):
    """Number of rows of all processes, and the smallest and largest value of each feature (D,)."""
    ends = torch.full((2, features.shape[1]), -math.inf, device=device)
    for block in features.split(block_rows(device, features.shape[1], 2**20)):
        if len(block):
            block = block.to(device).float()
            ends = torch.maximum(ends, torch.stack([-block.amin(0), block.amax(0)]))
    broken = (ends.isnan() | ends.isposinf()).any()
    ends = torch.cat([ends.nan_to_num(nan=0.0, neginf=-math.inf).flatten(), broken.float()[None]])
    *ends, broken = dist.all_reduce_max(ends)
    total = dist.all_reduce_sum(torch.tensor([len(features)], device=device)).item()
    if broken or total == 0:
        raise ValueError(
            f"PCA needs finite features, and some of the {total} rows of all processes are NaN or "
            f"infinite, or there is no row"
        )
    low, high = torch.stack(ends).double().view(2, -1)
    return total, -low, high


def _moments(features, middle, half_range, total):
    """Mean (D,) and the lower half of the covariance (D, D) of all processes' rows, float64."""
    device, size = middle.device, len(middle)
    bits = min(BITS, (62 - total.bit_length()) // 2)  # no sum is beyond int64
    step = torch.ldexp(torch.ones_like(middle), half_range.frexp().exponent - bits)
    sums = torch.zeros(size, dtype=torch.int64, device=device)
    products = torch.zeros(size, size, dtype=torch.int64, device=device)
    for block in features.split(min(ROWS, block_rows(device, size, 2**23))):
        block = block.to(device).float().double().sub_(middle).div_(step).round_()
        sums += block.sum(0).long()
        for at in range(0, size, COLUMNS):
            product = block[:, at:].T @ block[:, at : at + COLUMNS]
            products[at:, at : at + COLUMNS] += product.long()
    mean = dist.all_reduce_sum(sums).double() / total
    covariance = dist.all_reduce_sum(products).double().div_(total)
    covariance.addr_(mean, mean, alpha=-1).mul_(step[:, None]).mul_(step)
    return middle + mean * step, covariance
