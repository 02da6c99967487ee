"""Fine-tuning by iterations: what is saved and resumed; and the batches of random crops of VOC 2007."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import dist
from ..data.augment import apply_draws, draw_parameters
from ..data.datasets import EpochSampler, ImageDataset
from ..data.loading import TIMEOUT
from ..data.multicrop import MultiCropDataset, generator, multicrop_loader
from ..optim import build_optimizer
from ..run import checkpoint
from ..run.run import average_gradients, place_network
from .linear_features import ONLY_FLIP
from .linear_files import begun

FLIP = {**ONLY_FLIP, "flip_prob": 0.5}


class Training:
    """The network, its optimizer, and the folder that keeps them.

    module: the network without wrappers; network: the same, in DDP where there are several
    processes. settings: all that the result depends on; a folder with others is not continued. sync_bn:
    "pytorch" for batch norm over all processes. groups: of the optimizer, of the module; all parameters in
    one unless given.
    """

    def __init__(
        self,
        model: nn.Module,
        weight_decay: float,
        process: dist.Process,
        precision: str,
        folder: str | Path,
        settings: dict,
        sync_bn: str = "none",
        groups: Callable[[nn.Module], list[dict]] | None = None,
    ):
        self.process, self.precision = process, precision
        self.folder, self.settings = folder, settings
        self.module = place_network(
            model, process, sync_bn=sync_bn, syncbn_process_group_size=0, compiled=False
        )
        self.network = average_gradients(self.module, process)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(
            "sgd", groups(self.module) if groups else trained, weight_decay
        )
        self.scaler = dist.grad_scaler(process.device, precision)

    def save(self, iteration: int) -> None:
        """Save the state after so many iterations; all processes call it, one writes."""
        parts = {name: getattr(self, name) for name in ("module", "optimizer", "scaler")}
        state = {name: part.state_dict() for name, part in parts.items()}
        checkpoint.save_together(
            self.folder, {**state, "iteration": iteration, "settings": self.settings}
        )

    def resume(self) -> int:
        """Take over what the folder holds; the iterations done, 0 if it holds nothing.

        Raises CheckpointError if that was made with other settings.
        """
        state = begun(self.folder, self.settings, counted_by="iteration")
        if state is None:
            return 0
        checkpoint.load_state(self.module, state["module"], self.folder)
        checkpoint.load_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        return state["iteration"]


def training_images(
    dataset: ImageDataset,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    normalisation: tuple[list[float], list[float]],
    batch_size: int,
    process: dist.Process,
    seed: int,
    workers: int,
    loader_timeout: float = TIMEOUT,
) -> Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]:
    """A function: iterations from `start` to before `stop` -> the batches of this process.

    A batch is normalised random resized crops (B, C, size, size) on the device, mirrored or not, and
    their sample indices (B,). scale: range of the area of a crop as a share of the image, ratio: of
    width / height. normalisation: mean and standard deviation of each channel.

    The crops depend on (seed, epoch, index), the mirroring on (seed, epoch, iteration) and the place
    in the batch of all processes: both not on the number of processes.
    """
    smallest, largest = scale
    crops = MultiCropDataset(dataset, [1], [size], [smallest], [largest], seed=seed, ratio=ratio)
    sampler = EpochSampler(
        len(dataset), batch_size, rank=process.rank, world_size=process.world_size, seed=seed
    )
    loader = multicrop_loader(
        crops,
        sampler,
        batch_size,
        num_workers=workers,
        device_type=process.device.type,
        timeout=loader_timeout,
    )
    total, first = batch_size * process.world_size, process.rank * batch_size
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in normalisation)  # (C, 1, 1)

    def batches(start, stop):
        iters_per_epoch = len(dataset) // total  # the last, smaller batch is left out
        while start < stop:
            epoch, first_iteration = divmod(start, iters_per_epoch)
            sampler.set_epoch(epoch, first_iteration)
            for it, ((images,), indices) in enumerate(loader, first_iteration):
                draws = draw_parameters(generator(seed, epoch, it), 1, total, **FLIP)
                images = images.to(process.device, non_blocking=True).flatten(0, 1)  # (B, C, S, S)
                images = apply_draws(images, draws[first : first + len(images)], mean, std)
                yield images.contiguous(memory_format=torch.channels_last), indices
                start += 1
                if start == stop:
                    return

    return batches
