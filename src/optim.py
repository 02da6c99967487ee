"""LARC, LARS, groups of parameters and the cosine schedule, without a host synchronisation on a GPU.

LARC: layer-wise adaptive rates around any optimizer, equal to NVIDIA apex's (You et al. 2017,
arXiv:1708.03888). What SwAV's paper calls LARS (arXiv:2006.09882, appendix A.1) is this.
LARS: from the same paper, in the form that DINO's training code uses.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from . import dist

SMALL = 2**18  # values up to which tensors are scaled together
TINY = 1e-30  # keeps ratio / lr finite at lr = 0, and is nothing beside any real learning rate


# ============ gradients ============
def same_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors by device and dtype, as the foreach operations want them."""
    kinds = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each of n tensors of one kind, (n,), in float32 at least."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype))


def scale_each(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """x <- x factor in place, for n tensors of one kind and factors (n,), nothing read by the host."""
    if tensors[0].is_cuda:
        scale_in_few_launches(tensors, factors)
    else:
        torch._foreach_mul_(tensors, factors.unbind())


def scale_in_few_launches(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """The same, where the foreach operation would launch a kernel a tensor: small ones go through a copy."""
    is_small = [x.numel() <= SMALL and is_dense(x) for x in tensors]
    for x, factor, small in zip(tensors, factors.unbind(), is_small, strict=True):
        if not small:
            x.mul_(factor)
    pairs = list(zip(tensors, is_small, strict=True))
    flat = [x.as_strided((x.numel(),), (1,)) for x, small in pairs if small]
    if flat:
        sizes = tuple(x.numel() if small else 0 for x, small in pairs)
        factor_of_value = factors.index_select(0, owners_of(sizes, factors.device))
        scaled = torch.cat(flat).mul_(factor_of_value)
        torch._foreach_copy_(flat, scaled.split([len(x) for x in flat]))


def is_dense(x: Tensor) -> bool:
    """Whether the values of x lie one after the other in memory, in whatever order."""
    layouts = (torch.contiguous_format, torch.channels_last)
    return any(x.is_contiguous(memory_format=layout) for layout in layouts)


@functools.lru_cache(maxsize=8)
def owners_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """0 as often as the first of sizes says, then 1, ...: (sum of sizes,) int32, on the device."""
    owners = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(torch.tensor(sizes))
    return dist.to_device(owners, device)


def clip_gradients(parameters: Iterable[Tensor], most: float) -> Tensor:
    """Scale every gradient whose norm exceeds `most` down to it, each parameter by itself, in place.

    g <- g min(1, most / (|g| + 1e-6)); most = 0 clips nothing. Returns the norms before, (n,) float32,
    of the n parameters that have a gradient. A gradient that is not finite stays so.
    """
    found = []
    for grads in same_kind(p.grad for p in parameters if p.grad is not None):
        before = norms(grads)  # (n,)
        if most:
            scale_each(grads, (most / (before + 1e-6)).clamp(max=1))
        found.append(before.float())
    return torch.cat(found) if found else torch.zeros(0)


def grad_norm(parameters: Tensor | Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together: a 0-d float32 tensor, nothing read by the host.

    Parameters without a gradient are left out; without any gradient the norm is 0.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    found = [norms(kind).to(grads[0].device, torch.float32) for kind in same_kind(grads)]
    return torch.linalg.vector_norm(torch.cat(found))


# ============ optimizers ============
class LARC(torch.optim.Optimizer):
    """Layer-wise adaptive rate control around `optimizer`, whose groups and state stay its own.

    For every parameter p with gradient g, both of non-zero norm, and the weight decay of its group,
        a = trust_coefficient |p| / (|g| + weight_decay |p| + eps),    g <- a (g + weight_decay p),
    and the optimizer then steps without weight decay. `clip=True` uses min(a / lr, 1) for a, so
    that a bounds the learning rate. A parameter or gradient of zero norm is left as it is: neither
    scaled nor decayed. Norms are taken in float32; a norm that overflows gives a = 0.

    It can stand wherever the optimizer can (schedulers, GradScaler, closures, checkpoints).
    As with apex, the gradients hold a (g + weight_decay p) after a step.
    Raises ValueError on a trust coefficient that is not positive.
    """

    # GradScaler must unscale gradients before their norms are taken, also if `optimizer` is fused.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        trust_coefficient: float = 1e-3,
        clip: bool = False,
        eps: float = 1e-8,
    ):
        if not trust_coefficient > 0:
            raise ValueError(f"the trust coefficient must be positive, not {trust_coefficient}")
        self.optim = optimizer  # and no super().__init__(): nothing is kept twice
        self.trust_coefficient, self.clip, self.eps = trust_coefficient, clip, eps

    def __getattr__(self, name):  # param_groups, state, defaults, hooks
        if name == "optim":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.optim, name)

    def __getstate__(self):
        names = "optim", "trust_coefficient", "clip", "eps"
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state):
        vars(self).update(state)

    def state_dict(self) -> dict:
        """The memory of the wrapped optimizer."""
        return self.optim.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over what state_dict gave."""
        self.optim.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optim.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict) -> None:
        """More parameters, as torch's optimizers take them."""
        self.optim.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """One step; returns the loss of `closure` (called once, before the norms) or None."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        decays = [group.get("weight_decay", 0) for group in self.param_groups]
        try:
            for group, decay in zip(self.param_groups, decays, strict=True):
                for params in same_kind(p for p in group["params"] if p.grad is not None):
                    _scale_gradients(
                        params,
                        lr=group["lr"],
                        weight_decay=decay,
                        trust_coefficient=self.trust_coefficient,
                        clip=self.clip,
                        eps=self.eps,
                    )
                if decay:
                    group["weight_decay"] = 0
            self.optim.step()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                if decay:
                    group["weight_decay"] = decay
        return loss


def _scale_gradients(params, *, lr, weight_decay, trust_coefficient, clip, eps):
    """In place g <- a (g + weight_decay p) for parameters of one kind, nothing read by the host."""
    grads = [p.grad for p in params]
    param_norms, grad_norms = norms(params), norms(grads)  # (n,)
    ratios = trust_coefficient * param_norms / (grad_norms + weight_decay * param_norms + eps)
    if clip:
        ratios = (ratios / (lr + TINY)).clamp(max=1)
    # Where a norm is 0 so is the tensor, and with these factors the gradient stays what it was.
    ratios = torch.where(param_norms == 0, 1.0, ratios)
    ratios = torch.where(grad_norms == 0, 0.0, ratios)
    if weight_decay:
        torch._foreach_add_(grads, params, alpha=weight_decay)
    scale_each(grads, ratios)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step in each matrix or kernel p follows the norm of p.

        g <- (g + weight_decay p) eta |p| / |g + weight_decay p|    (factor 1 where a norm is 0)
        m <- momentum m + g,    p <- p - lr m
    1-D parameters (biases, BatchNorm) are neither decayed nor scaled. State: "mu" is m.
    The gradients are left as they are. Raises ValueError on a negative learning rate.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 1e-3,
    ):
        if not lr >= 0:
            raise ValueError(f"the learning rate of LARS, {lr}, must be at least 0")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """One step; returns the loss of `closure` or None."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            for p in (p for p in with_grad if "mu" not in self.state[p]):
                self.state[p]["mu"] = torch.zeros_like(p)
            matrices = same_kind(p for p in with_grad if p.ndim != 1)
            vectors = same_kind(p for p in with_grad if p.ndim == 1)
            for params in matrices + vectors:
                updates = [p.grad for p in params]
                if params[0].ndim != 1:
                    updates = torch._foreach_add(updates, params, alpha=group["weight_decay"])
                    param_norms, update_norms = norms(params), norms(updates)  # (n,)
                    scaled = (param_norms > 0) & (update_norms > 0)
                    ratios = torch.where(scaled, group["eta"] * param_norms / update_norms, 1.0)
                    scale_each(updates, ratios)
                mu = [self.state[p]["mu"] for p in params]
                torch._foreach_mul_(mu, group["momentum"])
                torch._foreach_add_(mu, updates)
                torch._foreach_add_(params, mu, alpha=-group["lr"])
        return loss


def parameter_groups(module: nn.Module) -> list[dict]:
    """Two groups for an optimizer: matrices and kernels, then biases and the parameters of norms.

    The second, all that is 1-D, has weight decay 0. Frozen parameters are in neither.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.ndim == 1 or name.endswith(".bias")]
    decayed = [p for name, p in trained if not (p.ndim == 1 or name.endswith(".bias"))]
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def cosine_schedule(
    base_value: float,
    final_value: float,
    epochs: int,
    iters_per_epoch: int,
    warmup_epochs: float = 0,
    start_value: float = 0.0,
) -> np.ndarray:
    """Linear warm-up, then a cosine: one value an iteration, float64 (epochs * iters_per_epoch,).

    As published, the warm-up contains both its ends, so that base_value comes twice in a row, and
    the cosine stops one iteration before final_value. Raises ValueError, naming the flag.
    """
    if epochs < 1:
        raise ValueError(f"--epochs {epochs} must be at least 1")
    if iters_per_epoch < 1:
        raise ValueError(f"an epoch of {iters_per_epoch} iterations: --batch_size is too large")
    if not 0 <= warmup_epochs <= epochs:
        raise ValueError(f"--warmup_epochs {warmup_epochs} must be between 0 and --epochs {epochs}")
    num_warmup = int(warmup_epochs * iters_per_epoch)
    num_cosine = epochs * iters_per_epoch - num_warmup
    angles = np.pi * np.arange(num_cosine) / max(num_cosine, 1)
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(angles))
    return np.concatenate([np.linspace(start_value, base_value, num_warmup), cosine])


def step_lr(lr: float, epoch: int, decay_epochs: list[int], gamma: float) -> float:
    """Learning rate of an epoch, from 0 on."""
    return lr * gamma ** sum(epoch >= at for at in decay_epochs)


def build_optimizer(
    name: str, parameters: list[Tensor] | list[dict], weight_decay: float
) -> torch.optim.Optimizer | LARC:
    """ "larc" (around SGD, as SwAV is trained), "lars", "sgd", all with momentum 0.9, or "adamw".

    parameters: tensors, or groups with options of their own. The learning rate is 0 until the
    training loop sets it, at every iteration.
    """
    if name == "adamw":
        groups = [g["params"] if isinstance(g, dict) else [g] for g in parameters]
        fused = all(p.device.type != "mps" for group in groups for p in group)  # 5 times faster
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=weight_decay, fused=fused)
    options = {"lr": 0.0, "momentum": 0.9, "weight_decay": weight_decay}
    if name == "lars":
        return LARS(parameters, **options)
    sgd = torch.optim.SGD(parameters, **options)
    return LARC(sgd, trust_coefficient=0.001, clip=False) if name == "larc" else sgd
