"""What comes before the first iteration: data, networks, optimizer, random draws, the printed plan."""

import logging

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

from .. import dist
from ..data.datasets import EpochSampler
from ..data.multicrop import MultiCropDataset, multicrop_loader
from ..dist.syncbn import sync_batchnorm
from ..optim import LARC, LARS
from . import checkpoint

logger = logging.getLogger(__name__)


def generator(*keys: int) -> torch.Generator:
    """A CPU generator seeded by all of `keys`, such as (seed, epoch, iteration, rank)."""
    seed = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) % 2**63)


def multicrop_loading(
    dataset, resolutions, process, batch_size, workers, seed, interpolation, sampler=None
) -> tuple[MultiCropDataset, Sampler, DataLoader]:
    """The crops of a dataset, the order of its samples, and the loader of this process's batches.

    resolutions: numbers, sizes, smallest and largest scales of the crops, see MultiCropDataset.
    sampler: an EpochSampler unless given.
    """
    crops = MultiCropDataset(dataset, *resolutions, seed=seed, interpolation=interpolation)
    place = (len(dataset), batch_size, process.rank, process.world_size, seed)
    if sampler is None:
        sampler = EpochSampler(*place, groups=dataset.groups)
    return (
        crops,
        sampler,
        multicrop_loader(crops, sampler, batch_size, workers, process.device.type),
    )


def start_teacher(student, teacher, init_from: str | None) -> None:
    """Give both networks the weights of a file, if any; else the teacher starts as the student.

    A file with the sections "student" and "teacher" fills both; the head may be missing. Raises as
    src.nets.weights.load_weights. The teacher is not trained by gradients.
    """
    there = checkpoint.sections(init_from) if init_from else []
    if init_from:
        key = "student" if "student" in there else None
        checkpoint.load_weights(student, init_from, key, allow_missing=("head.",))
    teacher.load_state_dict(student.state_dict())
    if "teacher" in there:
        checkpoint.load_weights(teacher, init_from, "teacher", allow_missing=("head.",))
    teacher.requires_grad_(False)


def place_network(module, process, sync_bn, group_size, compiled):
    """Move a network to its device for training, and return it.

    Channels last, batch norm over groups of `group_size` processes, compiled on request. Names of
    parameters stay as they are.
    """
    module = module.to(process.device, memory_format=torch.channels_last)
    module = sync_batchnorm(module, sync_bn, group_size, process)
    if compiled:
        module.compile()
    return module


def wrap_network(module, process, sync_bn, group_size, compiled):
    """place_network, and in DDP where there are several processes: (module, network)."""
    module = place_network(module, process, sync_bn, group_size, compiled)
    return module, average_gradients(module, process)


def average_gradients(module, process):
    """The network in DDP where there are several processes; again whenever a parameter was resized."""
    if process.world_size == 1:
        return module
    devices = None if process.device.type == "cpu" else [process.device.index]
    return DistributedDataParallel(module, device_ids=devices)


def share_buffers(module) -> None:
    """Give all processes the batch statistics of rank 0, which are those of the checkpoint."""
    for buffer in module.buffers():
        buffer.copy_(dist.broadcast(buffer))


def build_optimizer(name: str, parameters: list[Tensor] | list[dict], weight_decay: float):
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


def log_plan(run, crops, peak_lr: float) -> None:
    """Say what will be computed, before it is. crops: the MultiCropDataset."""
    args, process, dataset = run.arguments, run.process, crops.dataset
    resolutions = zip(crops.num_crops, crops.size_crops, crops.scales, strict=True)
    for line in (
        f"preset      {args['preset']}",
        f"data        {dataset.name}: {len(dataset):,} images",
        "crops       "
        + " + ".join(f"{n} x {s} px (scale {a}-{b})" for n, s, (a, b) in resolutions if n),
        f"batch       {args['batch_size']} x {process.world_size} processes "
        f"({process.launcher}) = {run.global_batch}; {run.iters_per_epoch:,} iterations an "
        f"epoch, {args['epochs']} epochs, {run.iters_per_epoch * args['epochs']:,} iterations",
        f"optimizer   {args.get('optimizer', 'sgd')}, peak learning rate {peak_lr:.4g} (scaling "
        f"{args['lr_scaling']}), {args.get('warmup_epochs', 0)} epochs of warm-up",
        f"network     {args['arch']}, {run.precision} on {process.device}",
    ):
        logger.info(line)
    if args.get("optimizer") == "larc" and run.global_batch <= 1024 and peak_lr > 2:
        logger.info(
            "note: the learning rate %.3g is for 4096 images; --lr_scaling linear fits it to %d",
            *(peak_lr, run.global_batch),
        )
    if args["knn_freq"] and dataset.labels is None:
        logger.info("note: --knn_freq needs labels, and --data_path has no labels: no k-NN")
