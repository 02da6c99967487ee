"""State of a training run: saving, resuming, logging, stopping. The loop itself is the script's."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch

from .. import dist
from ..evaluate.probe import knn_probe, open_validation
from ..pictures import curves
from . import checkpoint, flags, resume
from .log import RunLog, duration
from .setup import share_buffers
from .stop import StopSignal, leave

logger = logging.getLogger(__name__)

STOP_CHECK = 10  # iterations between agreeing on a signal, when there are several processes


class Run:
    """What the next iteration depends on, and the files that keep it.

    method: its name, so that no run goes on as one of another method.
    module: the network without wrappers; network: the same, wrapped for several processes.
    saved: the networks of the checkpoint by name, {"model": module} unless given.
    method_state: the method's own state by name (a queue, a memory bank), objects with state_dict()
    and load_state_dict() that all processes call together.
    num_images: of the data. global_batch: images of an iteration over all processes.
    """

    def __init__(
        self, args, process, precision, module, network, augment, optimizer, num_images,
        global_batch, method_state=None, saved=None, *, method,
    ):  # fmt: skip
        self.method, self.process, self.precision = method, process, precision
        self.module, self.network = module, network
        self.augment, self.optimizer = augment, optimizer
        self.scaler = dist.grad_scaler(process.device, precision)
        self.num_images, self.global_batch = num_images, global_batch
        self.iters_per_epoch = num_images // global_batch  # the last, smaller batch is left out
        self.method_state, self.saved = method_state or {}, saved or {"model": module}
        self.arguments, self.folder = dict(vars(args)), Path(args.dump_path)
        self.log = RunLog(self.folder if process.rank == 0 else None, args.tensorboard)
        self.stop, self.stopping = StopSignal(), False
        self.last = ()  # tensors that must be finite: the latest loss and gradient norm
        self.history, self.diagnosis = [], None
        self.validation = []  # the val split, opened at the first k-NN
        self.pictured = False

    # ============ saving and resuming ============
    def save(self, epoch: int, done: int, keep: bool = False) -> None:
        """Save the run after `done` iterations of `epoch`; keep: also as checkpoints/ckp-<epoch>.pth.

        All processes call it; one writes. Refuses to replace a good checkpoint by a broken one.
        """
        self.check_finite()
        if done == self.iters_per_epoch:
            epoch, done = epoch + 1, 0
        state = {
            **{name: module.state_dict() for name, module in self.saved.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "method_state": {name: part.state_dict() for name, part in self.method_state.items()},
            "method": self.method,
            "epoch": epoch,
            "samples_done": done * self.global_batch,  # of the epoch
            "args": self.arguments,
            "num_images": self.num_images,
        }
        checkpoint.save_together(self.folder, state, keep_as=f"ckp-{epoch}" if keep else None)

    def resume(self) -> tuple[int, int]:
        """Take over the newest checkpoint of the folder, if any: (epoch, iteration) to go on from."""
        state = checkpoint.load_checkpoint(self.folder)
        place = (state["epoch"], state["samples_done"]) if state else (-1, 0)
        resume.check_same_place(*place, self.folder)
        if state is None:
            return 0, 0
        resume.check_same_run(
            *(state, self.method, list(self.saved), self.arguments, self.num_images, self.folder)
        )
        for name, module in self.saved.items():
            checkpoint.load_state(module, state[name], self.folder)
        resume.load_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        for name, part in self.method_state.items():
            if name in state["method_state"]:
                part.load_state_dict(state["method_state"][name])
        start = min(state["samples_done"] // self.global_batch, self.iters_per_epoch - 1)
        if state["epoch"] >= self.arguments["epochs"]:
            logger.info(
                "%s is trained for %d epochs already: raise --epochs, or use another --dump_path",
                *(self.folder, state["epoch"]),
            )
        else:
            logger.info("continues from epoch %d, iteration %d", state["epoch"] + 1, start)
        return state["epoch"], start

    # ============ stopping ============
    def must_stop(self, done: int) -> bool:
        """Whether SIGTERM or SIGUSR1 asked any process to stop; all processes agree on the answer.

        done: iterations of the epoch done. Several processes ask each other now and then only.
        """
        if self.process.world_size == 1 or done % STOP_CHECK == 0 or done == self.iters_per_epoch:
            self.stopping = self.stop.agreed()
        return self.stopping

    def check_finite(self) -> None:
        """Stop the run if the latest loss or gradient is not finite; what is saved stays as it is."""
        values = self.last[:1] if self.scaler.is_enabled() else self.last  # the scaler skips inf
        bad = sum((~torch.isfinite(value.detach().float())).sum() for value in values)
        if not values or not dist.all_reduce_max(bad).item():
            return
        raise flags.RunError(
            f"the loss or its gradient is not finite; {self.folder / 'checkpoint.pth'} holds the last "
            "good state, if one was saved; lower --base_lr or --lr, lengthen --warmup_epochs, or use "
            "--precision fp32"
        )

    def diagnose(self, line: dict, judge: Callable[[list[dict]], str | None]) -> None:
        """Say it when the log lines show a collapse, once for each kind of trouble; or stop.

        judge: the last ten lines -> what is wrong with them, see src.run.diagnosis.
        """
        self.history = [*self.history, {**line, "batch": self.global_batch}][-10:]
        found = judge(self.history)
        if found and self.arguments["abort_on_collapse"]:
            raise flags.RunError(f"--abort_on_collapse: {found}")
        if found and (self.diagnosis is None or found[:20] != self.diagnosis[:20]):
            logger.warning("WARNING: %s", found)
        self.diagnosis = found

    def mean_over_processes(self, value: torch.Tensor) -> float:
        """Mean over processes of a 0-d tensor."""
        mean = dist.all_reduce_sum(value.cpu().double()) / self.process.world_size
        return mean.item() if math.isfinite(mean.item()) else math.nan

    def finished(self) -> int:
        """Leave after the last epoch. Returns the exit status."""
        logger.info("all epochs are done: %s", self.folder / checkpoint.NEWEST)
        self.log.close()
        self.stop.restore()
        dist.shutdown()
        return 0

    def stopped(self) -> int:
        """Leave after a signal: the run is saved; under Slurm, have it run again. Returns the status."""
        self.log.close()
        return leave(self.stop, "the same command continues the run")

    # ============ looking at it ============
    def report(self, epoch: int, iteration: int, rates: dict, health: dict, text: str) -> dict:
        """Write a log line, for people with `text` behind it; returns it. All processes call it."""
        self.check_finite()
        loss, gradient_norm = self.last
        line = {
            "epoch": epoch,
            "epoch_float": (iteration + 1) / self.iters_per_epoch,
            "iteration": iteration,
            "loss": self.mean_over_processes(loss),
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": gradient_norm.item(),
            "peak_memory_mb": dist.peak_memory_mb(self.process.device),
            **rates,
            **health,
        }
        self.log.write(iteration, line)
        logger.info(
            "epoch %d/%d it %d loss %.4f lr %.4g grad %.3g | %.0f img/s data %.0f%% eta %s mem %.0f MB"
            " | %s",
            *(epoch + 1, self.arguments["epochs"], iteration + 1),
            *(line["loss"], line["lr"], line["gradient_norm"]),
            *(rates["images_per_second"], 100 * rates["data_share"]),
            *(duration(rates["eta_seconds"]), line["peak_memory_mb"], text),
        )
        return line

    def probe(self, network, dataset, epoch: int, size: int, workers: int) -> None:
        """Evaluate by k-NN, if the data has labels, and log it; all processes call it.

        network: with forward_backbone, of one of the networks saved.
        """
        if dataset.labels is None:
            return
        share_buffers(network)
        if not self.validation:
            where = (self.arguments["data_path"], self.arguments["in_chans"])
            self.validation = [open_validation(dataset, *where)]
        top1 = knn_probe(
            network,
            dataset,
            self.validation[0],
            size=size,
            mean=self.augment.mean.flatten().tolist(),
            std=self.augment.std.flatten().tolist(),
            device=self.process.device,
            num_workers=workers,
            precision=self.precision,
        )
        iteration = (epoch + 1) * self.iters_per_epoch - 1
        line = {"epoch": epoch, "epoch_float": epoch + 1.0, "iteration": iteration, "knn": top1}
        self.log.write(iteration, line)
        val = self.validation[0]
        of = f"the {len(val):,} validation images" if val else "every tenth training image"
        logger.info("epoch %d: 20-NN top-1 %.2f %% of %s", epoch + 1, top1, of)

    def picture_crops(self, crops: list[torch.Tensor], most: int = 8) -> None:
        """Draw a batch's crops to plots/crops.png, once in a run."""
        path = self.folder / "plots" / "crops.png"
        if self.process.rank == 0 and not self.pictured and not path.exists():
            mean, std = self.augment.mean, self.augment.std
            curves.crop_sheet([curves.to_uint8(crop[:most], mean, std) for crop in crops], path)
        self.pictured = True

    def plot(self, num_prototypes: int) -> None:
        """Draw the log to plots/curves.png."""
        if self.process.rank == 0:
            try:
                curves.plot_curves(self.folder, num_prototypes)
            except ImportError:
                logger.info("no curves: pip install matplotlib")
            except OSError as error:
                logger.warning("no curves: %s", error)
