"""Linear classifiers of frozen features: several at once, one for each learning rate.

All share a pass over the features; none influences another. Gradients are summed over processes
by hand, so that a process may have fewer rows of a batch than another, or none.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import dist
from .average_precision import mean_average_precision
from .voc import multilabel_loss

MOMENTUM = 0.9  # of SGD, as published
BN_MOMENTUM, BN_EPS = 0.1, 1e-5  # those of PyTorch's batch norm


class LinearClassifiers(nn.Module):
    """L linear classifiers of D features into C classes: (B, D) -> scores (L, B, C), in float32.

    W ~ N(0, 0.01), the same for all L, b = 0. bn_channels: also a batch norm of so many channels
    before each, whose statistics are those of all processes; the features of a channel lie together.
    The names of parameters are those of published linear weights, which lack the first dimension.
    """

    def __init__(self, num: int, dim: int, num_classes: int, bn_channels: int = 0, seed: int = 0):
        super().__init__()
        weight = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(seed)) * 0.01
        self.linear = nn.Module()
        self.linear.weight = nn.Parameter(weight.repeat(num, 1, 1))  # (L, C, D)
        self.linear.bias = nn.Parameter(torch.zeros(num, num_classes))
        self.bn = nn.Module() if bn_channels else None
        if bn_channels:
            self.bn.weight = nn.Parameter(torch.ones(num, bn_channels))
            self.bn.bias = nn.Parameter(torch.zeros(num, bn_channels))
            self.bn.register_buffer("running_mean", torch.zeros(bn_channels))
            self.bn.register_buffer("running_var", torch.ones(bn_channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        if self.bn is None:
            scores = x @ weight.flatten(0, 1).t()  # (B, L * C)
            return scores.unflatten(1, bias.shape).transpose(0, 1) + bias[:, None]
        x = self._normalise(x.unflatten(1, (self.bn.weight.shape[1], -1)))  # (B, channels, cells)
        x = x * self.bn.weight[:, None, :, None] + self.bn.bias[:, None, :, None]
        return torch.baddbmm(bias[:, None], x.flatten(2), weight.transpose(1, 2))

    def _normalise(self, x):
        mean, var = self.bn.running_mean, self.bn.running_var  # (channels,)
        if self.training:  # of the rows of all processes
            count = dist.all_reduce_sum(x.new_tensor(len(x) * x.shape[2]))
            mean = dist.all_reduce_sum(x.sum((0, 2))) / count
            var = dist.all_reduce_sum((x - mean[:, None]).square().sum((0, 2))) / count
            unbiased = var * count / (count - 1).clamp(min=1)
            self.bn.running_mean.lerp_(mean, BN_MOMENTUM)
            self.bn.running_var.lerp_(unbiased, BN_MOMENTUM)
        return (x - mean[:, None]) * (var[:, None] + BN_EPS).rsqrt()


class ManySGD:
    """torch.optim.SGD with momentum, and a learning rate for each of the L classifiers."""

    def __init__(
        self,
        module: nn.Module,
        weight_decay: float,
        nesterov: bool = False,
        momentum: float = MOMENTUM,
    ):
        self.parameters = dict(module.named_parameters())
        self.options = (weight_decay, nesterov, momentum)
        self.momentum = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, lrs: Tensor) -> None:
        """One step with the gradients summed over processes, which are then gone. lrs: (L,)."""
        weight_decay, nesterov, factor = self.options
        for name, p in self.parameters.items():
            gradient = dist.all_reduce_sum(p.grad).add(p, alpha=weight_decay)
            p.grad = None
            momentum = self.momentum[name].mul_(factor).add_(gradient)
            step = gradient.add(momentum, alpha=factor) if nesterov else momentum
            p.sub_(lrs.view(-1, *[1] * (p.ndim - 1)) * step)


def epoch_lr(
    lr: float,
    epoch: int,
    epochs: int,
    final_lr: float = 0.0,
    decay: tuple[float, Sequence[int]] | None = None,
) -> float:
    """Learning rate of an epoch, counted from 0: a cosine from lr to final_lr, which it never takes.

    decay: instead (factor, epochs at which lr is multiplied by it).
    """
    if decay is not None:
        factor, decay_epochs = decay
        return lr * factor ** bisect_right(sorted(decay_epochs), epoch)
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def inverse_sqrt_lr(lr: float, weight_decay: float, iteration: int) -> float:
    """lr / sqrt(1 + lr wd t) at iteration t, counted from 0 over all epochs, as DeepCluster's."""
    return lr / math.sqrt(1 + lr * weight_decay * iteration)


def losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Sums of the cross-entropies of scores (L, B, C) with labels (B,): (L,).

    labels (B, C): of several classes each, see src.evaluate.voc.multilabel_loss.
    """
    if labels.ndim == 2:
        return multilabel_loss(scores, labels).sum(1)
    num = len(scores)
    loss = F.cross_entropy(scores.flatten(0, 1), labels.repeat(num), reduction="none")  # (L * B,)
    return loss.view(num, -1).sum(1)


def view_scores(classifiers: nn.Module, x: Tensor, views: int, multilabel: bool) -> Tensor:
    """Scores (L, B, C) of x (B, views * D): of several views the logarithm of their summed softmax.

    multilabel: instead the mean of their scores. The features of a view lie together.
    """
    if views == 1:
        return classifiers(x)
    scores = classifiers(x.unflatten(1, (views, -1)).flatten(0, 1)).unflatten(1, (-1, views))
    if multilabel:
        return scores.mean(2)
    return scores.log_softmax(3).logsumexp(2)


@torch.no_grad()
def accuracies(
    classifiers: nn.Module, features: Tensor, labels: Tensor, device: torch.device, views: int = 1
) -> dict:
    """Top-1, top-5 (%) and mean loss over the rows of all processes: lists of L numbers by name.

    features (n, views * D), labels (n,): of this process, n may be 0. Fewer than 5 classes make a
    top-5 of 100. A score that is not a number is wrong. labels (n, C), of several classes each: mean
    average precisions instead, see src.evaluate.average_precision.
    """
    classifiers.eval()
    num, classes = classifiers.linear.bias.shape
    multilabel, kept, rows = labels.ndim == 2, [], max(1, 1024 // views)
    sums = torch.zeros(1 if multilabel else 3, num, dtype=torch.float64)
    for x, y in zip(features.split(rows), labels.split(rows), strict=True):
        if not len(x):  # a share of no images is one empty part
            continue
        x, y = x.to(device), y.to(device)
        scores = view_scores(classifiers, x, views, multilabel)  # (L, B, C)
        found = losses(scores, y)[None]  # (1, L)
        if multilabel:
            kept.append(scores.transpose(0, 1).cpu())  # (B, L, C)
        else:
            found = torch.cat([top_hits(scores, y), found])  # (3, L)
        sums = sums + found.cpu().double()
    count = dist.all_reduce_sum(torch.tensor(len(labels)))
    *hits, loss = dist.all_reduce_sum(sums) / count
    loss = [x if math.isfinite(x) else None for x in loss.tolist()]  # None: diverged
    if not multilabel:
        top1, top5 = hits
        return {"top1": (100 * top1).tolist(), "top5": (100 * top5).tolist(), "loss": loss}
    scores = torch.cat(kept) if kept else torch.zeros(0, num, classes)
    found = [mean_average_precision(scores[:, i], labels) for i in range(num)]
    return {**{name: [x[name] for x in found] for name in ("map", "map_11points")}, "loss": loss}


def top_hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Numbers of rows whose label is the first, and among the first five: (2, L)."""
    own = scores.gather(2, labels.expand(len(scores), -1)[:, :, None])  # (L, B, 1)
    classes = torch.arange(scores.shape[2], device=scores.device)
    before = classes < labels[:, None]  # (B, C), of equal scores
    ranks = (~((scores < own) | (scores == own) & ~before)).sum(2)  # (L, B)
    ranks[~own[..., 0].isfinite()] = scores.shape[2]
    return torch.stack([(ranks < min(k, scores.shape[2])).sum(1).float() for k in (1, 5)])
