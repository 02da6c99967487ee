"""Linear classifiers of frozen features: several at once, one for each learning rate.

All share a pass over the features; none influences another. Gradients are summed over processes
by hand, so that a process may have fewer rows of a batch than another, or none.
"""

import hashlib
import logging
import math
from bisect import bisect_right
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import checkpoint, distributed, resume

logger = logging.getLogger(__name__)

MOMENTUM = 0.9  # of SGD, as published
BN_MOMENTUM, BN_EPS = 0.1, 1e-5  # those of PyTorch's batch norm


class LinearClassifiers(nn.Module):
    """L linear classifiers of D features into C classes: (B, D) -> scores (L, B, C), in float32.

    W ~ N(0, 0.01), the same for all L, b = 0. bn_channels: also a batch norm of so many channels
    before each, whose statistics are those of all processes; the features of a channel lie together.
    The names of parameters are those of published linear weights, which lack the first dimension.
    """

    def __init__(self, num, dim, num_classes, bn_channels=0, seed=0):
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
            count = distributed.all_reduce_sum(x.new_tensor(len(x) * x.shape[2]))
            mean = distributed.all_reduce_sum(x.sum((0, 2))) / count
            var = distributed.all_reduce_sum((x - mean[:, None]).square().sum((0, 2))) / count
            unbiased = var * count / (count - 1).clamp(min=1)
            self.bn.running_mean.lerp_(mean, BN_MOMENTUM)
            self.bn.running_var.lerp_(unbiased, BN_MOMENTUM)
        return (x - mean[:, None]) * (var[:, None] + BN_EPS).rsqrt()


class ManySGD:
    """torch.optim.SGD with momentum 0.9, and a learning rate for each of the L classifiers."""

    def __init__(self, module: nn.Module, weight_decay: float, nesterov: bool = False):
        self.parameters, self.options = dict(module.named_parameters()), (weight_decay, nesterov)
        self.momentum = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, lrs: Tensor) -> None:
        """One step with the gradients summed over processes, which are then gone. lrs: (L,)."""
        weight_decay, nesterov = self.options
        for name, p in self.parameters.items():
            gradient = distributed.all_reduce_sum(p.grad).add(p, alpha=weight_decay)
            p.grad = None
            momentum = self.momentum[name].mul_(MOMENTUM).add_(gradient)
            step = gradient.add(momentum, alpha=MOMENTUM) if nesterov else momentum
            p.sub_(lrs.view(-1, *[1] * (p.ndim - 1)) * step)


def epoch_lr(lr: float, epoch: int, epochs: int, final_lr: float = 0.0, decay=None) -> float:
    """Learning rate of an epoch, counted from 0: a cosine from lr to final_lr, which it never takes.

    decay: instead (factor, epochs at which lr is multiplied by it).
    """
    if decay is not None:
        factor, decay_epochs = decay
        return lr * factor ** bisect_right(sorted(decay_epochs), epoch)
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Sums of the cross-entropies of scores (L, B, C) with labels (B,): (L,)."""
    num = len(scores)
    loss = F.cross_entropy(scores.flatten(0, 1), labels.repeat(num), reduction="none")  # (L * B,)
    return loss.view(num, -1).sum(1)


@torch.no_grad()
def accuracies(classifiers: nn.Module, features: Tensor, labels: Tensor, device) -> dict:
    """Top-1, top-5 (%) and mean loss over the rows of all processes: lists of L numbers by name.

    features (n, D), labels (n,): of this process, n may be 0. Fewer than 5 classes make a top-5 of
    100. A score that is not a number is wrong.
    """
    classifiers.eval()
    sums = 0.0
    for x, y in zip(features.split(1024), labels.split(1024), strict=True):
        x, y = x.to(device), y.to(device)
        scores = classifiers(x)  # (L, B, C)
        own = scores.gather(2, y.expand(len(scores), -1)[:, :, None])  # (L, B, 1)
        before = (
            torch.arange(scores.shape[2], device=device) < y[:, None]
        )  # (B, C), of equal scores
        ranks = (~((scores < own) | (scores == own) & ~before)).sum(2)  # (L, B)
        ranks[~own[..., 0].isfinite()] = scores.shape[2]
        right = [(ranks < min(k, scores.shape[2])).sum(1).float() for k in (1, 5)]
        sums = sums + torch.stack([*right, losses(scores, y)]).cpu().double()  # (3, L)
    count = distributed.all_reduce_sum(torch.tensor(len(labels)))
    top1, top5, loss = distributed.all_reduce_sum(sums) / count
    loss = [x if math.isfinite(x) else None for x in loss.tolist()]  # None: diverged
    return {"top1": (100 * top1).tolist(), "top5": (100 * top5).tolist(), "loss": loss}


def fingerprint(module: nn.Module) -> str:
    """A few letters that tell networks with other weights apart."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class Probe:
    """The classifiers, their optimizer and results, and the folder that keeps them.

    settings: all that the result depends on; a folder with others is not continued.
    """

    def __init__(self, classifiers: LinearClassifiers, optimizer: ManySGD, folder, settings: dict):
        self.classifiers, self.optimizer = classifiers, optimizer
        self.folder, self.settings = Path(folder), settings
        self.history = []  # results by epoch, see accuracies

    def save(self, epoch: int, samples_done: int) -> None:
        """Save to the folder's checkpoint.pth; all processes call it, one writes."""
        failed = None
        if distributed.is_main():
            state = {
                "state_dict": self.classifiers.state_dict(),
                "momentum": self.optimizer.momentum,
                "epoch": epoch,
                "samples_done": samples_done,  # of the epoch
                "history": self.history,
                "settings": self.settings,
            }
            try:
                checkpoint.save_checkpoint(self.folder, state)
            except checkpoint.CheckpointError as error:
                failed = error
        if distributed.all_reduce_max(torch.tensor(int(failed is not None))).item():
            raise failed or checkpoint.CheckpointError("rank 0 could not save, see its message")

    def resume(self) -> tuple[int, int]:
        """Take over what the folder holds: (epoch, samples of it done) to go on from.

        Raises CheckpointError if that was made with other settings.
        """
        state = checkpoint.load_checkpoint(self.folder)
        place = (state["epoch"], state["samples_done"]) if state else (-1, 0)
        resume.check_same_place(*place, self.folder)
        if state is None:
            return 0, 0
        check_settings(state, self.settings, self.folder)
        checkpoint.load_state(self.classifiers, state["state_dict"], self.folder)
        for name, momentum in self.optimizer.momentum.items():
            momentum.copy_(state["momentum"][name])
        self.history = state["history"]
        return place


def check_settings(state: dict, settings: dict, folder) -> None:
    """Raise CheckpointError if one of `settings` differs in the checkpoint `state` of `folder`."""
    for name, value in settings.items():
        before = state["settings"].get(name)
        if before != value:
            raise checkpoint.CheckpointError(
                f"{folder} holds an evaluation with {name} {before}, not {value}: use another "
                "--dump_path, or remove that folder to start afresh"
            )


def saved_classifiers(weights: str | None, folder, settings: dict, dim: int, num_classes: int):
    """Classifiers to evaluate, their learning rates and the epochs they were trained for.

    weights: a file of published linear weights, whose rate and epochs are None; without it, what
    `folder` holds, which must be for features with these settings. dim, num_classes: what they have
    to fit. Raises FileNotFoundError, ValueError and CheckpointError.
    """
    if weights:
        tensors, lrs, epoch, source = checkpoint.read_weights(weights), [None], None, weights
    else:
        state, source = checkpoint.load_checkpoint(folder), folder
        if state is None:
            raise FileNotFoundError(
                f"--evaluate: {folder} holds no classifier: train one by leaving --evaluate out, or "
                "name one by --linear_weights"
            )
        check_settings(state, settings, folder)
        tensors, lrs, epoch = state["state_dict"], state["settings"]["lrs"], state["epoch"]
    if not {"linear.weight", "linear.bias"} <= tensors.keys():
        raise ValueError(
            f"--linear_weights {source} has no linear.weight and linear.bias but "
            f"{', '.join(list(tensors)[:4])}: give the weights of a linear classifier"
        )
    if tensors["linear.weight"].ndim == 2:
        names = ("linear.weight", "linear.bias", "bn.weight", "bn.bias")
        tensors = {name: x[None] if name in names else x for name, x in tensors.items()}
    tensors = {name: x for name, x in tensors.items() if not name.endswith("num_batches_tracked")}
    num, classes, features = tensors["linear.weight"].shape
    if (features, classes) != (dim, num_classes):
        raise ValueError(
            f"{source} maps {features} features to {classes} classes, and here are {dim} and "
            f"{num_classes}: check --arch, --n_last_blocks, --avgpool_patchtokens, --global_pooling "
            "and the data"
        )
    channels = tensors["bn.weight"].shape[1] if "bn.weight" in tensors else 0
    classifiers = LinearClassifiers(num, dim, num_classes, channels)
    checkpoint.load_state(classifiers, tensors, source)
    return classifiers, lrs, epoch
