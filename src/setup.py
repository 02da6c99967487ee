"""What comes before the first iteration: network, optimizer, random draws, the plan that is printed."""

import logging

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from src.optim import LARC, LARS
from src.syncbn import sync_batchnorm

logger = logging.getLogger(__name__)


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


def log_plan(run, dataset, peak_lr: float) -> None:
    """Say what will be computed, before it is."""
    args, process = run.arguments, run.process
    names = ("nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops")
    crops = zip(*(args[name] for name in names), strict=True)
    for line in (
        f"preset      {args['preset']}",
        f"data        {dataset.name}: {len(dataset):,} images",
        "crops       " + " + ".join(f"{n} x {s} px (scale {a}-{b})" for n, s, a, b in crops),
        f"batch       {args['batch_size']} x {process.world_size} processes "
        f"({process.launcher}) = {run.global_batch}; {run.iters_per_epoch:,} iterations an "
        f"epoch, {args['epochs']} epochs, {run.iters_per_epoch * args['epochs']:,} iterations",
        f"optimizer   {args['optimizer']}, peak learning rate {peak_lr:.4g} (--base_lr "
        f"{args['base_lr']}, scaling {args['lr_scaling']}), {args['warmup_epochs']} epochs of "
        "warm-up",
        f"network     {args['arch']}, {run.precision} on {process.device}",
    ):
        logger.info(line)
    if args["preset"] == "imagenet" and run.global_batch <= 1024 and peak_lr > 2:
        logger.info(
            "note: the learning rate %.3g is for 4096 images; --lr_scaling linear fits it to %d",
            *(peak_lr, run.global_batch),
        )
    if args["knn_freq"] and dataset.labels is None:
        logger.info("note: --knn_freq needs labels, and --data_path has no labels: no k-NN")
