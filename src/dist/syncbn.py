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
# Its name before torch 2.14 and since.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
    key = _key_of(_own_group(process, size))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = CrossProcessBatchNorm
            module.group = key
    return model


def _own_group(process, size):
    """The group of `size` processes that this one is in, with the time limit of all collectives."""
    starts = range(0, process.world_size, size)
    groups = new_groups([range(start, start + size) for start in starts])
    return groups[process.rank // size]


# torch.compile takes an operation of torch.library as one node of a graph. Such an operation takes tensors,
# numbers and texts only, so that it is given the key of a group in this table. Its name is this module's: a
# copy of it in the same process has operations and groups of its own.
NAMESPACE = __name__.replace(".", "_")
ALL = "all processes"
_groups = {ALL: None}


def _key_of(group):
    key = ALL if group is None else group.group_name
    _groups[key] = group
    return key


class CrossProcessBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the processes of `group`, on GPUs and, with gloo, on a CPU.

    Equals one process on the whole batch: output, running statistics and gradients, also when the
    processes hold different numbers of samples, 0 included. (B, C, ...) -> (B, C, ...).

    torch.nn.SyncBatchNorm finds the processes without samples by a mask: the host waits for it three times a
    layer, and torch.compile breaks its graph there. Here the host waits for nothing.
    """

    group = ALL

    def _check_input_dim(self, x):
        if x.dim() < 2:
            raise ValueError(f"batch normalisation needs (B, C, ...), not {tuple(x.shape)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, statistics, _, _ = normalise(x, self.weight, self.bias, self.eps, self.group)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            share = self.momentum
            if share is None:  # average over all batches so far
                share = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
            mean, unbiased = statistics.detach().to(self.running_mean.dtype)
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(unbiased, share)
        return y


# ============ as one operation ============
@torch.library.custom_op(f"{NAMESPACE}::normalise", mutates_args=(), device_types="cpu")
def normalise(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (B, C, ...) normalised over all processes of the group, and its statistics.

    Returns the normalised x in its type; mean and unbiased variance (2, C); one over the standard
    deviation (C,); and the number of values a channel. On a CPU statistics are float64 and the number is
    that of all processes (); on a GPU they are float32, and the numbers those of each process (W,).
    Raises ValueError on a CPU where there is but one value a channel.
    """
    channels = x.shape[1]
    wide = _widened(x)
    local = x.new_zeros(1 + 2 * channels, dtype=torch.float64)  # count, means, sums of squares
    if x.numel():
        local[0] = x.numel() / channels
        var, mean = torch.var_mean(wide, _all_but_channels(x), correction=0)
        local[1:] = torch.cat([mean, var.double() * local[0]])
    process_group = _groups[group]
    shares = [torch.empty_like(local) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(shares, local, group=process_group)
    counts, means, squares = torch.stack(shares).split([1, channels, channels], 1)  # (W, C)
    count = counts.sum()
    if count <= 1:
        raise ValueError("batch normalisation needs more than one value per channel in training")
    mean = (counts * means).sum(0) / count  # (C,)
    # Sums of squares about each process's mean, moved to the common one (Chan et al., 1979).
    var = (squares + counts * (means - mean) ** 2).sum(0) / count
    scale = (var + eps).rsqrt()
    y = _normal(wide, mean, scale)
    y = y if weight is None else y * _beside(weight, x)
    y = y if bias is None else y + _beside(bias, x)
    return y.to(x.dtype), torch.stack([mean, var * count / (count - 1)]), scale, count


@normalise.register_kernel("cuda")
def _normalise_on_gpu(x, weight, bias, eps, group):
    """The same by torch's own kernels for it."""
    x = _dense(x)
    channels = x.shape[1]
    if x.numel():
        mean, scale = torch.batch_norm_stats(x, eps)
        count = mean.new_full((1,), x.numel() / channels)
    else:
        mean = x.new_zeros(channels, dtype=torch.float32)
        scale = torch.ones_like(mean)
        # In place of 0: the kernel divides by the number of values of the processes before and this one.
        count = mean.new_full((1,), 1e-30)
    process_group = _groups[group]
    local = torch.cat([mean, scale, count])
    shares = local.new_empty(dist.get_world_size(process_group), len(local))
    all_gather_into(shares, local, group=process_group)
    means, scales, counts = shares.split([channels, channels, 1], 1)
    counts = counts.reshape(-1)
    # The kernel also moves running statistics, with a momentum of 1 all the way to those of this batch.
    statistics = mean.new_zeros(2, channels)
    mean, scale = torch.batch_norm_gather_stats_with_counts(
        x, means, scales, statistics[0], statistics[1], 1.0, eps, counts
    )
    if x.numel():
        y = torch.batch_norm_elemt(x, weight, bias, mean, scale, eps)
    else:
        y = torch.empty_like(x)
    return y, statistics, scale, counts.to(torch.int32)


@normalise.register_fake
def _shapes_of_normalise(x, weight, bias, eps, group):
    on_gpu = x.device.type == "cuda"
    statistics = x.new_empty(2, x.shape[1], dtype=torch.float32 if on_gpu else torch.float64)
    scale = statistics.new_empty(x.shape[1])
    if on_gpu:
        counts = scale.new_empty(dist.get_world_size(_groups[group]), dtype=torch.int32)
        return torch.empty_like(_dense(x)), statistics, scale, counts
    return torch.empty_like(x), statistics, scale, scale.new_empty(())


# ------------ gradients
@torch.library.custom_op(f"{NAMESPACE}::normalise_backward", mutates_args=(), device_types="cpu")
def normalise_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    statistics: torch.Tensor,
    scale: torch.Tensor,
    count: torch.Tensor,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (B, C, ...), and of weight and bias (C,) by the samples of this process."""
    normal = _normal(_widened(x), statistics[0], scale)
    wide = grad.to(normal.dtype)
    dims = _all_but_channels(x)
    grad_bias, grad_weight = wide.sum(dims), (wide * normal).sum(dims)
    sums = torch.stack([grad_bias, grad_weight]).double()  # (2, C)
    dist.all_reduce(sums, group=_groups[group])
    of_bias, of_weight = (sums / count).to(wide)
    factor = scale.to(wide) if weight is None else scale.to(wide) * weight
    grad_x = (wide - _beside(of_bias, x) - normal * _beside(of_weight, x)) * _beside(factor, x)
    return grad_x.to(grad.dtype), grad_weight, grad_bias


@normalise_backward.register_kernel("cuda")
def _normalise_backward_on_gpu(grad, x, weight, statistics, scale, count, group):
    """The same by torch's own kernels for it."""
    x, grad, mean = _dense(x), _dense(grad), statistics[0]
    channels = x.shape[1]
    if x.numel():
        affine = weight is not None
        sum_dy, sum_dy_xmu, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, scale, weight, True, affine, affine
        )
        if not affine:
            grad_weight, grad_bias = torch.zeros_like(mean), torch.zeros_like(mean)
        sums = torch.cat([sum_dy, sum_dy_xmu])
    else:
        sums = mean.new_zeros(2 * channels)
        grad_weight, grad_bias = torch.zeros_like(mean), torch.zeros_like(mean)
    dist.all_reduce(sums, group=_groups[group])
    if not x.numel():
        return torch.empty_like(x), grad_weight, grad_bias
    sum_dy, sum_dy_xmu = sums.split(channels)
    grad_x = torch.batch_norm_backward_elemt(
        grad, x, mean, scale, weight, sum_dy, sum_dy_xmu, count
    )
    return grad_x, grad_weight, grad_bias


@normalise_backward.register_fake
def _shapes_of_normalise_backward(grad, x, weight, statistics, scale, count, group):
    dtype = torch.promote_types(x.dtype, torch.float32)
    of_weight = scale.new_empty(x.shape[1], dtype=dtype)
    on_gpu = x.device.type == "cuda"
    grad_x = torch.empty_like(_dense(x)) if on_gpu else torch.empty_like(grad)
    return grad_x, of_weight, torch.empty_like(of_weight)


def _keep(ctx, inputs, output):
    x, weight, bias, _, group = inputs
    _, statistics, scale, count = output
    ctx.save_for_backward(x, weight, statistics, scale, count)
    ctx.group, ctx.has_bias = group, bias is not None


def _gradients(ctx, grad, *_):
    x, weight, statistics, scale, count = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = normalise_backward(
        grad, x, weight, statistics, scale, count, ctx.group
    )
    grad_weight = None if weight is None else grad_weight
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None


normalise.register_autograd(_gradients, setup_context=_keep)


# ------------ of both
def _widened(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _all_but_channels(x):
    return [dim for dim in range(x.dim()) if dim != 1]


def _beside(per_channel, x):
    """(C,) in the shape that is multiplied with x (B, C, ...)."""
    return per_channel.view([1, -1] + [1] * (x.dim() - 2))


def _normal(wide, mean, scale):
    return (wide - _beside(mean.to(wide), wide)) * _beside(scale.to(wide), wide)


def _dense(x):
    """x in one of the two layouts that the kernels read."""
    for layout in (torch.channels_last, torch.channels_last_3d):
        if x.is_contiguous(memory_format=layout):
            return x
    return x.contiguous()
