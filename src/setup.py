"""What comes before the first iteration: the network on its device, its optimizer, random draws."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from src.optim import LARC, LARS
from src.syncbn import sync_batchnorm


def generator(*keys: int) -> torch.Generator:
    """A CPU generator seeded by all of `keys`, such as (seed, epoch, iteration, rank)."""
    seed = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) % 2**63)


def wrap_network(module, process, sync_bn, group_size, compiled):
    """Move a network to its device for training: (module, network), the latter in DDP if need be.

    Channels last, batch norm over groups of `group_size` processes, compiled on request. Names of
    parameters stay as they are.
    """
    module = module.to(process.device, memory_format=torch.channels_last)
    module = sync_batchnorm(module, sync_bn, group_size, process)
    if compiled:
        module.compile()
    if process.world_size == 1:
        return module, module
    devices = None if process.device.type == "cpu" else [process.device.index]
    return module, DistributedDataParallel(module, device_ids=devices)


def build_optimizer(name: str, parameters: list[Tensor], weight_decay: float):
    """ "larc" (around SGD, as SwAV is trained), "lars", "sgd", all with momentum 0.9, or "adamw".

    The learning rate is 0 until the training loop sets it, at every iteration.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=weight_decay)
    options = {"lr": 0.0, "momentum": 0.9, "weight_decay": weight_decay}
    if name == "lars":
        return LARS(parameters, **options)
    sgd = torch.optim.SGD(parameters, **options)
    return LARC(sgd, trust_coefficient=0.001, clip=False) if name == "larc" else sgd
