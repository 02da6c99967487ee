"""Training a detector, saved and resumed, and the detections that it makes in a test set."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import dist
from ..data.datasets import EpochSampler
from ..data.loading import TIMEOUT, Loader
from ..errors import RunError
from ..optim import step_lr
from ..run import checkpoint
from ..run.log import RunLog, Stopwatch, duration
from ..run.run import share_buffers
from ..run.stop import StopSignal
from .detection_ap import gather_lists
from .detection_samples import set_draws
from .detection_sets import DetectionSet, TestImages, TrainingImages
from .masks import runs_of_masks
from .progress import Progress
from .voc_training import Training

logger = logging.getLogger(__name__)

STOP_CHECK = 10  # iterations between agreeing on a signal, when there are several processes
MASK_THRESHOLD = 0.5
DRAWS = 2  # of the keys of generators: what is drawn in a step, and not for an image
# Iteration to begin at, iteration to stop before -> (images, targets, keys of their draws).
Batches = Callable[[int, int], Iterator[tuple[list[Tensor], list[dict], list[tuple[int, ...]]]]]


# ============ batches ============
def training_batches(
    images: TrainingImages,
    batch_size: int,
    process: dist.Process,
    seed: int,
    workers: int,
    loader_timeout: float = TIMEOUT,
) -> Batches:
    """A function: iterations from `start` to before `stop` -> the batches of this process.

    A batch is images (C, h, w) from 0 to 1 on the device, their targets as torchvision has them, and the key
    of the draws of each: (seed, iteration, place in the batch of all processes). The last, smaller batch of
    an epoch is left out.
    """
    sampler = EpochSampler(
        len(images), batch_size, rank=process.rank, world_size=process.world_size, seed=seed
    )
    loader = Loader(
        images,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        device_type=process.device.type,
        timeout=loader_timeout,
        collate=list,
        persistent_workers=workers > 0,
    )
    iters_per_epoch = len(images) // (batch_size * process.world_size)
    first = process.rank * batch_size

    def batches(start, stop):
        while start < stop:
            epoch, first_iteration = divmod(start, iters_per_epoch)
            sampler.set_epoch(epoch, first_iteration)
            for samples in loader:
                keys = [(seed, DRAWS, start, first + i) for i in range(len(samples))]
                yield *_on_device(samples, process.device), keys
                start += 1
                if start == stop:
                    return

    return batches


def _on_device(samples, device):
    """Images and targets of the samples of TrainingImages."""
    images, targets = [], []
    for image, boxes, labels, masks, _ in samples:
        images.append(image.to(device, non_blocking=True).float() / 255)
        target = {"boxes": boxes.to(device), "labels": labels.to(device)}
        targets.append({**target, "masks": masks.to(device)})
    return images, targets


# ============ training ============
def learning_rate(
    lr: float,
    iteration: int,
    *,
    steps: Sequence[int],
    gamma: float,
    warmup_iters: int,
    warmup_factor: float,
) -> float:
    """lr, a gamma-th after each of the iterations `steps`; it rises linearly from warmup_factor of it."""
    rate = step_lr(lr, iteration, list(steps), gamma)
    if iteration >= warmup_iters:
        return rate
    share = iteration / warmup_iters
    return rate * (warmup_factor * (1 - share) + share)


def train(
    state: Training,
    batches: Batches,
    lr_of: Callable[[int], float],
    *,
    start: int,
    iterations: int,
    batch: int,
    log_freq: int,
    checkpoint_iters: int,
    stop: StopSignal,
    log: RunLog,
) -> int:
    """Train from iteration `start` on; returns the iterations done, fewer when a signal stopped it.

    batch: images of an iteration over all processes. Raises RunError where the loss is not finite.
    """
    process, optimizer, scaler = state.process, state.optimizer, state.scaler
    stopwatch = Stopwatch()
    state.network.train()
    for it, (images, targets, keys) in enumerate(
        stopwatch.watch(batches(start, iterations)), start
    ):
        for group in optimizer.param_groups:
            group["lr"] = lr_of(it)

        # ============ losses of proposals, classes, boxes, masks ============
        set_draws(state.module, keys)
        with dist.autocast(process.device, state.precision):
            losses = state.network(images, targets)
            loss = sum(losses.values())

        # ============ backward and optim step ============
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # ============ log, save, stop ============
        done = it + 1
        stopping = (process.world_size == 1 or done % STOP_CHECK == 0) and stop.agreed()
        if stopping or done % log_freq == 0 or done == iterations:
            rates = stopwatch.rates(batch, iterations - done)
            log_progress(state, it, iterations, losses=losses, rates=rates, log=log)
        if stopping or done % checkpoint_iters == 0 or done == iterations:
            state.save(done)
        if stopping:
            return done
    return iterations


def log_progress(
    state: Training,
    it: int,
    iterations: int,
    *,
    losses: dict[str, Tensor],
    rates: dict,
    log: RunLog,
) -> None:
    """Write a log line; RunError where a loss is not finite, what is saved stays as it is."""
    names = sorted(losses)
    values = torch.stack([losses[name].detach().float() for name in names])
    means = (dist.all_reduce_sum(values) / state.process.world_size).tolist()
    if not all(map(math.isfinite, means)):
        newest = state.folder / checkpoint.NEWEST
        raise RunError(
            f"the loss is not finite; {newest} holds the last good state, if one was saved; lower --lr"
        )
    lr = state.optimizer.param_groups[0]["lr"]
    parts = dict(zip(names, means, strict=True))
    log.write(it, {"iteration": it, "loss": sum(means), "lr": lr, **parts, **rates})
    words = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in parts.items())
    logger.info(
        f"it {it + 1}/{iterations} loss {sum(means):.4f} lr {lr:.4g} | {words} | "
        f"{rates['images_per_second']:.3g} img/s data {100 * rates['data_share']:.0f}% "
        f"eta {duration(rates['eta_seconds'])}"
    )


def detector_groups(module: nn.Module) -> list[dict]:
    """Two groups for the optimizer: the parameters of batch norms, which are not decayed, and all others."""
    norms = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
        for parameter in part.parameters()
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in norms]},
        {"params": [p for p in trained if id(p) in norms], "weight_decay": 0.0},
    ]


# ============ evaluation ============
@torch.no_grad()
def detect(
    detector: nn.Module,
    data: DetectionSet,
    *,
    short_side: int,
    longest: int,
    process: dist.Process,
    precision: str,
    workers: int,
    loader_timeout: float = TIMEOUT,
) -> list[dict]:
    """The detections in all images, in COCO's format, of all processes and the same on each; all call it.

    Images are detected in one by one, so that neither the number of processes nor the images beside it
    change what is found. Boxes and masks are of the image as it was before it was resized. detector: of
    src.evaluate.detection_networks.
    """
    share_buffers(detector)
    detector.eval()
    own = list(range(process.rank, len(data), process.world_size))
    loader = Loader(
        TestImages(data, short_side, longest),
        sampler=own,
        batch_size=1,
        num_workers=workers,
        device_type=process.device.type,
        timeout=loader_timeout,
        collate=list,
    )
    found, progress = [], Progress(len(own), "images")
    for ((image, index, before),) in loader:
        detector.transform.original_sizes = [before]
        with dist.autocast(process.device, precision):
            (result,) = detector([image.to(process.device).float() / 255])
        found += detections_of_image(result, index, data)
        progress.count("detecting")
    detector.transform.original_sizes = None
    places = {name: place for place, name in enumerate(data.ids)}
    return sorted(gather_lists(found), key=lambda x: places[x["image_id"]])


def detections_of_image(result: dict[str, Tensor], index: int, data: DetectionSet) -> list[dict]:
    """What a detector of torchvision has found in image `index`, in COCO's format."""
    result = {name: x.cpu() for name, x in result.items()}
    boxes = result["boxes"].double()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    labels, scores = result["labels"].tolist(), result["scores"].double().tolist()
    segments = [None] * len(boxes)
    if "masks" in result:
        segments = runs_of_masks((result["masks"][:, 0] > MASK_THRESHOLD).numpy())
    found = []
    for box, label, score, segment in zip(boxes, labels, scores, segments, strict=True):
        detection = {"image_id": data.ids[index], "category_id": data.categories[label - 1]}
        detection |= {"bbox": box, "score": score}
        found.append(detection if segment is None else {**detection, "segmentation": segment})
    return found


def folder_of(dump_path: str | Path, detector: str) -> Path:
    """Where the training of a detector is kept."""
    return Path(dump_path) / "detection" / detector
