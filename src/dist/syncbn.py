"""Batch normalisation over several processes, in groups, on GPUs and on a CPU.

Statistics over groups of 8 GPUs cost less than over all and lose nothing (facebookresearch/swav,
issue 22). Parameters, buffers and state-dict keys are those of the plain layers.
"""

import logging

import torch
import torch.distributed as dist
import torch.nn as nn

from .collectives import new_groups
from .process import Process, sharing_processes

logger = logging.getLogger(__name__)


def sync_batchnorm(model: nn.Module, kind: str, group_size: int, process: Process) -> nn.Module:
    """`model` with its batch normalisations computed over groups of `group_size` processes.

    kind: "pytorch", "apex" (where NVIDIA's apex is installed, else as pytorch) or "none". group_size: 0, or
    more than there are: all processes. One process: the model as it was. Every rank must call
    this, since each one has to create every group. Raises ValueError naming --sync_bn or
    --syncbn_process_group_size.
    """
    if kind not in ("pytorch", "apex", "none"):
        raise ValueError(f"--sync_bn must be pytorch, apex or none, not {kind!r}")
    world_size = process.world_size
    size = sharing_processes(group_size, world_size)
    if kind == "none" or size == 1:
        return model
    logger.info("batch normalisation (%s) over groups of %d processes", kind, size)
    if kind == "apex" and process.device.type != "cpu":
        try:
            from apex.parallel import convert_syncbn_model
        except ImportError:  # the published command lines ask for it; the statistics are the same
            logger.info("apex is not installed: --sync_bn pytorch computes the same statistics")
        else:
            return convert_syncbn_model(model, process_group=_own_group(process, size))
    group = _own_group(process, size)
    if process.device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = CrossProcessBatchNorm
            module.group = group
    return model


def _own_group(process, size):
    """The group of `size` processes that this one is in, with the time limit of all collectives."""
    starts = range(0, process.world_size, size)
    groups = new_groups([range(start, start + size) for start in starts])
    return groups[process.rank // size]


class CrossProcessBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the processes of `group`, for gloo (torch's own is for GPUs only).

    Equals one process on the whole batch: output, running statistics and gradients, also when the
    processes hold different numbers of samples, 0 included. (B, C, ...) -> (B, C, ...).
    """

    group = None  # None: all processes

    def _check_input_dim(self, x):
        if x.dim() < 2:
            raise ValueError(f"batch normalisation needs (B, C, ...), not {tuple(x.shape)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.group)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            share = self.momentum
            if share is None:  # average over all batches so far
                share = 1 / self.num_batches_tracked.item()
            unbiased = var * count / (count - 1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        return y


class _Normalise(torch.autograd.Function):
    """Returns the normalised x, and mean, variance and count over all processes of the group."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight, bias, eps, group):
        channels = x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [dim for dim in range(x.dim()) if dim != 1]
        local = x.new_zeros(1 + 2 * channels, dtype=torch.float64)  # count, means, sums of squares
        if x.numel():
            local[0] = x.numel() / channels
            var, mean = torch.var_mean(wide, dims, correction=0)
            local[1:] = torch.cat([mean, var.double() * local[0]])
        shares = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shares, local, group=group)
        counts, means, squares = torch.stack(shares).split([1, channels, channels], 1)  # (W, C)
        count = counts.sum()
        if count <= 1:
            raise ValueError(
                "batch normalisation needs more than one value per channel in training"
            )
        mean = (counts * means).sum(0) / count  # (C,)
        # Sums of squares about each process's mean, moved to the common one (Chan et al., 1979).
        var = (squares + counts * (means - mean) ** 2).sum(0) / count
        scale = (var + eps).rsqrt()
        shape = [1, channels] + [1] * (x.dim() - 2)
        normal = (wide - mean.to(wide).view(shape)) * scale.to(wide).view(shape)
        y = normal if weight is None else normal * weight.view(shape)
        y = y if bias is None else y + bias.view(shape)
        ctx.save_for_backward(normal, weight, scale, count)
        ctx.dims, ctx.shape, ctx.group, ctx.has_bias = dims, shape, group, bias is not None
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx, grad, *_):
        normal, weight, scale, count = ctx.saved_tensors
        wide = grad.to(normal.dtype)
        grad_bias, grad_weight = wide.sum(ctx.dims), (wide * normal).sum(ctx.dims)  # (C,)
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([grad_bias, grad_weight]).double()  # (2, C)
            dist.all_reduce(sums, group=ctx.group)
            of_bias, of_weight = (sums / count).to(wide).view(2, *ctx.shape)
            factor = scale.to(wide) if weight is None else scale.to(wide) * weight
            grad_x = (wide - of_bias - normal * of_weight) * factor.view(ctx.shape)
            grad_x = grad_x.to(grad.dtype)
        grad_weight = None if weight is None else grad_weight
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None
