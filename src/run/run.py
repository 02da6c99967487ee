"""What surrounds a training loop: seeds, devices, gradients, log, checkpoints, stopping, k-NN.

The loop is the script's. It calls the methods of Run, in this order, and none calls it back:

    for iteration, crops, indices in run.iterate(loader, epoch, start):
        with run.autocast():
            ...                             # forward passes of run.network
        run.backward(loss)
        ...                                 # what the paper does to gradients
        if run.step():
            ...                             # what keeps something of the batch: a queue, a teacher
        if run.is_log_step():
            run.report(run.read(means, own), text)
        if run.save_or_stop():
            return
"""

import argparse
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import dist
from ..data.augment import Augment
from ..data.datasets import ImageDataset
from ..data.loading import Loader
from ..data.multicrop import MultiCropDataset, generator
from ..errors import RunError
from ..optim import LARC, grad_norm, norms, same_kind
from . import checkpoint
from .health import UNIQUE_DISTANCE, Trouble, count_unique, in_float64
from .lock import hold_folder
from .log import Pauses, RunLog, Stopwatch, describe_run, duration
from .nonfinite import REMEDIES, FiniteSteps, Iteration
from .stop import StopSignal, finish, leave

logger = logging.getLogger(__name__)

STOP_CHECK = 10  # iterations between agreeing on a signal, when there are several processes
NUM_PICTURED = 4  # images on the sheet of crops
HISTORY = 10  # log lines that a diagnosis sees
PACE_AFTER = 10  # iterations of a process, of which the first is slow
UNIQUE_COST = 2**28  # K^2 D up to which each log line counts the unique prototypes
LONG_SECONDS = 1800.0  # a run that takes longer is told what shortens it
DRAWING_SHARE = 20  # drawing the curves takes at most one part in so many of the time


class Run:
    """A training run: what its next iteration depends on, and the files that keep it.

    args: the command line. process: of dist.init. method: its name, so that no run goes on as one of
    another method. module: the network without wrappers; network: the same, wrapped for several
    processes. augment: crops on the device -> augmented crops. dataset: the images; num_images: how
    many of them are in use, all unless given.
    global_batch: images of an iteration over all processes. method_state: the method's own state by
    name (a queue, a memory bank), objects with state_dict() and load_state_dict() that all processes
    call together. saved: the networks of the checkpoint by name, {"model": module} unless given.
    evaluated: what k-NN evaluates, networks with forward_backbone by name, {"": module} unless given; the
    first is the one that `knn` is of, and names are what their accuracies begin with, as in teacher_knn.
    image_size: of its images, in pixels. num_prototypes: whose logarithm the curves show as the loss of
    knowing nothing.

    The folder is locked from here on. Raises CheckpointError where another run writes into it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        process: dist.Process,
        *,
        method: str,
        module: nn.Module,
        network: nn.Module,
        augment: Augment,
        optimizer: torch.optim.Optimizer | LARC,
        dataset: ImageDataset,
        global_batch: int,
        image_size: int,
        num_prototypes: int | None,
        num_images: int | None = None,
        method_state: dict[str, Any] | None = None,
        saved: dict[str, nn.Module] | None = None,
        evaluated: dict[str, nn.Module] | None = None,
    ):
        self.arguments, self.folder = dict(vars(args)), Path(args.dump_path)
        hold_folder(self.folder)
        self.process, self.method = process, method
        self.precision = dist.resolve_precision(args.precision, process.device)
        self.module, self.network = module, network
        self.augment, self.optimizer = augment, optimizer
        self.scaler = dist.grad_scaler(process.device, self.precision)
        self.dataset, self.images_digest = dataset, dataset.digest()
        self.num_images, self.global_batch = num_images or len(dataset), global_batch
        self.evaluated = evaluated or {"": module}
        self.image_size, self.num_prototypes = image_size, num_prototypes
        # The last, smaller batch is left out.
        self.iters_per_epoch = self.num_images // global_batch
        self.method_state, self.saved = method_state or {}, saved or {"model": module}
        self.log = RunLog(self.folder if process.rank == 0 else None, args.tensorboard)
        self.stop, self.stopping = StopSignal(), False
        self.epoch, self.done = 0, 0  # iterations of the epoch done, the one under way included
        self.loss, self.gradient_norm = None, None  # of the latest iteration, on the device
        self.indices, self.skips = None, False  # its samples, and whether its step is skipped
        parts = [part for part in self.method_state.values() if isinstance(part, nn.Module)]
        self.steps = FiniteSteps(
            args.max_nonfinite,
            self.folder,
            modules=[*self.saved.values(), *parts],
            scaled=self.scaler.is_enabled(),
        )
        self.stopwatch, self.pauses = None, Pauses()
        self.history, self.trouble = [], None  # of what kind the latest trouble is
        self.repeats = False  # whether fewer than half of the prototypes were unique
        self.resumed_at, self.logged = (0, 0), []  # the place, and the lines of the log up to it
        self.validation = None  # the val split, where there is one
        self.pictured = False
        self.probe_sets = {}  # of --probe_data: training and validation images by name
        # Of the evaluations what --guard_knn looks at, and the best (top-1, epoch) of it so far.
        self.guarded, self.best = guarded_key(args.probe_data), None
        self.seen, self.first_done_at = 0, 0.0  # iterations of this process; without its pauses
        self.drawn_at, self.drawing_seconds = time.monotonic(), 1.0  # of the curves

    # ============ what the loop calls, in this order ============
    def iterate(
        self,
        loader: Loader,
        epoch: int,
        start: int,
        picture_crops: bool = True,
        changed: Iterable[Tensor] = (),
    ) -> Iterator[tuple[int, list[Tensor], Tensor]]:
        """The iterations of an epoch from `start` on: (iteration of the run, crops, sample indices).

        crops: one (B, C, S, S) tensor a crop, on the device, augmented. Photometry and what the
        network draws (dropout, stochastic depth) come from (seed, epoch, iteration of the epoch,
        rank). picture_crops: draw the first ones to plots/crops.png. changed: parameters that the loop
        changes before the step, beside the buffers of the networks; where a step is skipped, all are as
        they were.
        """
        if self.stopwatch is None:
            logger.info(
                f"started; the first iteration loads and computes {self.global_batch} images"
            )
        self.epoch, self.stopwatch = epoch, Stopwatch()
        self.network.train()
        trains = epoch < self.arguments["epochs"]  # the pass that fills a memory bank does not
        if trains:
            self.pauses.end()
        for it, (batch, indices) in enumerate(self.stopwatch.watch(loader), start):
            self.done, self.indices, self.skips = it + 1, indices, False
            self.steps.begin(changed)
            draws = generator(self.arguments["seed"], epoch, it, self.process.rank)
            torch.manual_seed(draws.initial_seed())
            crops = [crop.to(self.process.device, non_blocking=True) for crop in batch]
            crops = self.augment(crops, draws)
            if picture_crops:
                self.picture_crops(crops)
            yield self.iteration, crops, indices
            if trains:
                self.announce_pace()
        self.pauses.begin()

    @property
    def iteration(self) -> int:
        """Number of the iteration under way, from the start of the run."""
        return self.epoch * self.iters_per_epoch + self.done - 1

    @property
    def num_iterations(self) -> int:
        """Iterations of the whole run."""
        return self.iters_per_epoch * self.arguments["epochs"]

    def announce_pace(self) -> None:
        """After the first iterations of this process say how long the run will take."""
        self.seen += 1
        if self.seen not in (1, PACE_AFTER):
            return
        dist.synchronize(self.process.device)
        now = time.monotonic()
        if self.seen == 1:
            self.first_done_at = now - self.pauses.seconds
            logger.info("the first iteration is done")
            return
        seconds = (now - self.pauses.seconds - self.first_done_at) / (PACE_AFTER - 1)
        to_go = seconds * (self.num_iterations - self.iteration - 1) + self.pauses_to_come()
        advice = ""
        if to_go > LONG_SECONDS:
            advice = (
                "; less --epochs, --nmb_crops, --size_crops, or a smaller --arch make that shorter"
            )
        logger.info(
            f"pace        {self.global_batch / seconds:.3g} images/s, {duration(to_go)} to go{advice}"
        )

    def pauses_to_come(self) -> float:
        """Seconds that the rest of the run will take between its epochs, if these are as those before."""
        return self.pauses.mean() * (self.arguments["epochs"] - self.epoch - 1)

    def autocast(self) -> AbstractContextManager:
        """Context in which the network computes in --precision."""
        return dist.autocast(self.process.device, self.precision)

    def backward(self, loss: Tensor) -> None:
        """New gradients of all parameters, of the loss itself: scaled for fp16, then unscaled."""
        self.loss = loss.detach()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)

    def step(self, gradient_norm: Tensor | None = None) -> bool:
        """A step of the optimizer; whether nothing was wrong with the batch.

        The scaler of fp16 skips the step where a gradient is not finite. With --max_nonfinite all
        processes skip it where the loss of one, or without the scaler its gradient, is not finite: then
        the answer is False, and nothing of the batch may be kept. gradient_norm: what the log shall
        say, the norm of all gradients unless given.
        """
        if gradient_norm is None:
            gradient_norm = grad_norm(self.module.parameters())
        self.gradient_norm = gradient_norm
        iteration = Iteration(
            self.epoch, self.iteration, self.indices, loss=self.loss, gradient_norm=gradient_norm
        )
        self.skips = not self.steps.admits(iteration)
        if self.skips:
            self.scaler.update(self.scaler.get_scale())  # the scale stays, and it may unscale again
            return False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return True

    def is_log_step(self) -> bool:
        """Whether this iteration writes a log line: each --log_freq, the epoch's last, the run's first.

        One whose step was skipped writes none.
        """
        regular = self.done % self.arguments["log_freq"] == 0
        ends = self.done == self.iters_per_epoch or self.iteration == 0
        return (regular or ends) and not self.skips

    def save_or_stop(self) -> bool:
        """Save inside an epoch where asked for; whether a signal asked to stop before its end."""
        if self.done == self.iters_per_epoch:
            return False
        if self.must_stop(self.done):
            self.save(self.epoch, self.done)
            return True
        every = self.arguments["checkpoint_iters"]
        if every and self.done % every == 0:
            self.save(self.epoch, self.done)
        return False

    # ============ after an epoch, and after the last ============
    def end_epoch(self, epoch: int) -> bool:
        """Save, evaluate by k-NN, draw the curves; whether to leave, since a signal asked for it.

        Where epochs are short, the curves are drawn now and then, and at the end.
        """
        if self.stopping:
            self.plot()
            return True
        is_last = epoch + 1 == self.arguments["epochs"]
        keep = is_last or (epoch + 1) % self.arguments["checkpoint_freq"] == 0
        self.save(epoch, self.iters_per_epoch, keep=keep)
        owes_knn = self.is_knn_epoch(epoch)
        is_done = is_last and not owes_knn
        leaving = not is_done and self.must_stop(self.iters_per_epoch)
        if owes_knn and not leaving:
            self.probe(epoch)
        if is_last or leaving or self.is_time_to_draw():
            self.plot()
        return leaving

    def is_time_to_draw(self) -> bool:
        """Whether the curves may be drawn again without taking more than their share of the time."""
        return time.monotonic() - self.drawn_at > DRAWING_SHARE * self.drawing_seconds

    def is_knn_epoch(self, epoch: int) -> bool:
        """Whether k-NN evaluates the network at the end of an epoch."""
        every, is_last = self.arguments["knn_freq"], epoch + 1 == self.arguments["epochs"]
        is_due = bool(every) and (is_last or (epoch + 1) % every == 0)
        return is_due and (self.dataset.labels is not None or bool(self.arguments["probe_data"]))

    def begin(self) -> None:
        """Describe the run in its folder, and do what the epoch before still owed: k-NN and curves.

        All processes call it, after resume(), and not before: a run that may not go on leaves the
        folder as it was. Raises ValueError and FileNotFoundError for validation images or --probe_data that
        cannot be used.
        """
        if self.process.rank == 0:
            describe_run(self.arguments, self.folder)
        for name, path in self.arguments["probe_data"]:
            from ..evaluate.probe import open_probe_set

            self.probe_sets[name] = open_probe_set(name, path, self.arguments["in_chans"])
        if self.arguments["knn_freq"] and self.dataset.labels is not None:
            from ..evaluate.probe import (
                open_validation,  # now, or a fault in it is found hours later
            )

            data_path, in_chans = self.arguments["data_path"], self.arguments["in_chans"]
            self.validation = open_validation(self.dataset, data_path, in_chans)
        epoch, start = self.resumed_at
        self.best = dist.broadcast_object(self.best_that_is_kept())  # the main process has the log
        if epoch > 0 and start == 0:
            self.make_up_for(epoch - 1)
        self.pauses.begin()

    def best_that_is_kept(self) -> tuple[float, int] | None:
        """The best (top-1, epoch) of the log if its state is there to go back to, else None."""
        best = best_of(self.logged, self.guarded)
        kept = self.folder / "checkpoints" / checkpoint.BEST
        is_newest = best is not None and self.resumed_at == (best[1] + 1, 0)
        return best if is_newest or kept.exists() else None

    def make_up_for(self, epoch: int) -> None:
        """Do what an epoch that was done before still owes: k-NN and curves. All processes call it."""
        if self.best is not None and self.best[1] == epoch and self.is_guarding():
            checkpoint.keep_best(self.folder)
        owed = not any("knn" in line and line["epoch"] == epoch for line in self.logged)
        if self.is_knn_epoch(epoch) and dist.broadcast_object(owed):
            logger.info(f"k-NN of epoch {epoch + 1}, which the run did not come to")
            self.probe(epoch)
        picture, log = self.folder / "plots" / "curves.png", self.folder / "log.jsonl"
        if not picture.exists() or picture.stat().st_mtime < log.stat().st_mtime:
            self.plot()

    def leave(self) -> int:
        """End the process group and close the log; returns the exit status."""
        return self.stopped() if self.stopping else self.finished()

    # ============ saving and resuming ============
    def save(self, epoch: int, done: int, keep: bool = False) -> None:
        """Save the run after `done` iterations of `epoch`; keep: also as checkpoints/ckp-<epoch>.pth.

        All processes call it; one writes. Refuses to replace a good checkpoint by a broken one.
        """
        self.steps.check()
        networks = {name: module.state_dict() for name, module in self.saved.items()}
        self.check_weights(networks)
        if done == self.iters_per_epoch:
            epoch, done = epoch + 1, 0
        state = {
            **networks,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "method_state": {name: part.state_dict() for name, part in self.method_state.items()},
            "method": self.method,
            "epoch": epoch,
            "samples_done": done * self.global_batch,  # of the epoch
            "skipped_steps": self.steps.skipped,
            "args": self.arguments,
            "num_images": self.num_images,
            "images_digest": self.images_digest,
        }
        checkpoint.save_together(self.folder, state, keep_as=f"ckp-{epoch}" if keep else None)

    def resume(self) -> tuple[int, int]:
        """Take over the newest checkpoint of the folder, if any: (epoch, iteration) to go on from."""
        state = checkpoint.load_checkpoint(self.folder)
        if state is not None:
            checkpoint.check_is_of_a_run(state, self.folder)
        epoch, samples_done = (state["epoch"], state["samples_done"]) if state else (-1, 0)
        checkpoint.check_same_place(epoch, samples_done, self.folder)
        if state is None:
            self.log.rewind(0.0, assigned=False)
            return 0, 0
        checkpoint.check_same_run(
            state,
            method=self.method,
            networks=list(self.saved),
            arguments=self.arguments,
            num_images=self.num_images,
            images_digest=self.images_digest,
            folder=self.folder,
        )
        for name, module in self.saved.items():
            checkpoint.load_state(module, state[name], self.folder)
        checkpoint.load_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        for name, part in self.method_state.items():
            if name in state["method_state"]:
                part.load_state_dict(state["method_state"][name])
        self.steps.skipped = state.get("skipped_steps", 0)  # earlier versions skipped none
        start = min(samples_done // self.global_batch, self.iters_per_epoch - 1)
        if epoch >= self.arguments["epochs"]:
            logger.info(
                f"{self.folder} is trained for {epoch} epochs already: raise --epochs, or use another "
                "--dump_path"
            )
        else:
            logger.info(f"continues from epoch {epoch + 1}, iteration {start}")
        labels = state["method_state"].get("pseudo_labels", {})
        self.logged = self.log.rewind(
            (epoch * self.iters_per_epoch + start) / self.iters_per_epoch,
            assigned=labels.get("epoch") == epoch,
        )
        self.resumed_at = epoch, start
        return epoch, start

    # ============ stopping ============
    def must_stop(self, done: int) -> bool:
        """Whether SIGTERM or SIGUSR1 asked any process to stop; all processes agree on the answer.

        done: iterations of the epoch done. Several processes ask each other now and then only.
        """
        if self.process.world_size == 1 or done % STOP_CHECK == 0 or done == self.iters_per_epoch:
            self.stopping = self.stop.agreed()
        return self.stopping

    def check_weights(self, networks: dict[str, dict[str, Tensor]]) -> None:
        """Stop the run rather than save weights that are not finite, or so large that their norm is not.

        networks: the state dicts that would be saved, by name.
        """
        tensors = [x for weights in networks.values() for x in weights.values()]
        floating = [x for x in tensors if x.is_floating_point()]
        total = sum(norms(kind).float().sum().cpu() for kind in same_kind(floating))
        if dist.all_reduce_max((~torch.isfinite(total)).long()).item():
            raise RunError(
                "the weights are not finite, or beyond all bounds, and were not saved; "
                f"{self.folder / 'checkpoint.pth'} holds the last good state, if one was saved; "
                f"{REMEDIES}"
            )

    def finished(self) -> int:
        """Leave after the last epoch. Returns the exit status."""
        logger.info(f"all epochs are done: {self.folder / checkpoint.NEWEST}")
        self.log.close()
        return finish(self.stop)

    def stopped(self) -> int:
        """Leave after a signal: the run is saved; under Slurm, have it run again. Returns the status."""
        self.log.close()
        return leave(self.stop, "the same command continues the run")

    # ============ the log ============
    def read(self, means: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, float]:
        """What a log line says, brought from the device at once: the host waits for nothing else of it.

        means: 0-d tensors of this process, whose means over all are wanted, NaN where one is not finite.
        own: 0-d tensors that are taken as they are. Beside them come `loss`, a mean, and `gradient_norm`.
        Raises RunError where the latest iteration is not finite. All processes call it.
        """
        means = {"loss": self.loss, **means}
        own = {"gradient_norm": self.gradient_norm, **own}
        are_bad = self.steps.unchecked()
        sums = dist.all_reduce_sum(_stacked(means.values()))
        parts = [sums / self.process.world_size, _stacked(own.values())]
        numbers = torch.cat([*parts, are_bad.to(sums)]).tolist()
        self.steps.check([number > 0 for number in numbers[len(means) + len(own) :]])
        values = dict(zip([*means, *own], numbers, strict=False))
        finite = {name: values[name] if math.isfinite(values[name]) else math.nan for name in means}
        return values | finite

    def report(self, health: dict[str, float], text: str) -> dict:
        """Write a log line of what read() gave, for people with `text` behind it; returns it.

        All processes call it.
        """
        rates = self.stopwatch.rates(self.global_batch, self.num_iterations - self.iteration - 1)
        rates["eta_seconds"] += self.pauses_to_come()
        line = {
            "epoch": self.epoch,
            "epoch_float": (self.iteration + 1) / self.iters_per_epoch,
            "iteration": self.iteration,
            "loss": health["loss"],
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": health["gradient_norm"],
            "peak_memory_mb": dist.peak_memory_mb(self.process.device),
            "broken_images": self.dataset.share_broken(),
            "skipped_steps": self.steps.skipped,
            **rates,
            **health,
        }
        self.log.write(self.iteration, line)
        to_go = duration(rates["eta_seconds"]) if self.seen else "?"  # the first one is slow
        troubles = f"{line['broken_images']:,} broken images | " if line["broken_images"] else ""
        if self.steps.skipped:
            troubles += f"{self.steps.skipped} steps skipped | "
        logger.info(
            f"epoch {self.epoch + 1}/{self.arguments['epochs']} it {self.iteration + 1} "
            f"loss {line['loss']:.4f} lr {line['lr']:.4g} grad {line['gradient_norm']:.3g} | "
            f"{rates['images_per_second']:.0f} img/s data {100 * rates['data_share']:.0f}% "
            f"eta {to_go} mem {line['peak_memory_mb']:.0f} MB | {troubles}{text}"
        )
        return line

    def diagnose(self, line: dict, judge: Callable[[list[dict]], Trouble | None]) -> None:
        """Say it when the log lines show a collapse, once while it lasts; or stop.

        judge: the last ten lines -> what is wrong with them, or None.
        """
        self.history = [*self.history, {**line, "batch": self.global_batch}][-HISTORY:]
        found = judge(self.history)
        if found and self.arguments["abort_on_collapse"]:
            raise RunError(f"--abort_on_collapse: {found.sentence}")
        kind = found.kind if found else None
        if found and kind != self.trouble:
            logger.warning(f"WARNING: {found.sentence}")
        self.trouble = kind

    def count_unique(
        self, prototypes: Sequence[Tensor], flag: str, holders: Sequence[int] | None = None
    ) -> tuple[dict[str, int], str]:
        """`unique`, the unique prototypes of all heads, for a log line, and what it says of them.

        prototypes: (K, D) of each head. flag: that sets K, for the warning where fewer than half are
        unique, once while that lasts. holders: of heads that are shared out, how many processes hold each
        of this one's; all have the same shape then. Many prototypes are counted in the last line of an
        epoch only; nothing is returned in others. All processes call it.
        """
        cost = max(len(weight) * weight.numel() for weight in prototypes)
        if cost > UNIQUE_COST and self.done != self.iters_per_epoch:
            return {}, ""
        counts = [[count_unique(weight), len(weight)] for weight in prototypes]
        sums = torch.tensor(counts, dtype=torch.float64)  # (heads, 2)
        if holders is None:
            sums = sums.sum(0)
        else:
            sums = dist.all_reduce_sum((sums / torch.tensor(holders).unsqueeze(1)).sum(0))
        unique, total = (round(x) for x in sums.tolist())
        repeats = 2 * unique < total
        if repeats and not self.repeats:
            logger.warning(
                f"WARNING: only {unique:,} of {total:,} prototypes are unique, the others lie within a "
                f"cosine distance of {UNIQUE_DISTANCE:g} of one of these: so many add nothing, lower {flag}"
            )
        self.repeats = repeats
        return {"unique": unique}, f", {unique} of {total} unique"

    # ============ k-NN and pictures, whose rooms are opened where they are used ============
    def probe(self, epoch: int) -> None:
        """Evaluate by k-NN, and by a linear probe on --probe_data, and log it; all processes call it.

        Everything is saved: a signal ends the process at once, and the next start makes up for this.
        Raises RunError where --guard_knn asks to go back to the best state.
        """
        self.log.flush()
        for network in self.evaluated.values():
            share_buffers(network)
        with self.stop.at_once():
            accuracies, sentences = self.evaluate()
        first = next(iter(accuracies.values()))  # of the data, or the first of --probe_data
        iteration = (epoch + 1) * self.iters_per_epoch - 1
        line = {"epoch": epoch, "epoch_float": epoch + 1.0, "iteration": iteration, "knn": first}
        line |= accuracies
        self.log.write(iteration, line)
        logger.info(f"epoch {epoch + 1}: {'; '.join(sentences)}")
        if self.is_guarding():
            self.guard(line[self.guarded], epoch)

    def evaluate(self) -> tuple[dict[str, float], list[str]]:
        """Accuracies (%) by name, of the first network also without its own, and what to say of them."""
        extraction = {
            "size": self.image_size,
            "mean": self.augment.mean.flatten().tolist(),
            "std": self.augment.std.flatten().tolist(),
            "device": self.process.device,
            "num_workers": self.arguments["workers"],
            "loader_timeout": self.arguments["loader_timeout"],
            "precision": self.precision,
        }
        accuracies, sentences = {}, []
        for name, network in self.evaluated.items():
            found, said = self.evaluate_network(network, extraction)
            accuracies = accuracies or dict(found)
            if name:
                accuracies |= {f"{name}_{key}": value for key, value in found.items()}
                said = [f"{name} {sentence}" for sentence in said]
            sentences += said
        return accuracies, sentences

    def evaluate_network(
        self, network: nn.Module, extraction: dict[str, Any]
    ) -> tuple[dict[str, float], list[str]]:
        """Accuracies (%) of a network by name, and what to say of them; see src.evaluate.probe."""
        from ..evaluate.probe import knn_probe, probe_set

        accuracies, sentences = {}, []
        if self.dataset.labels is not None:
            val = self.validation
            accuracies["knn"] = knn_probe(network, self.dataset, val, **extraction)
            images = f"the {len(val):,} validation images" if val else "every tenth training image"
            sentences.append(f"20-NN top-1 {accuracies['knn']:.2f} % of {images}")
        for name, (train, val) in self.probe_sets.items():
            knn, linear = probe_set(network, train, val, **extraction)
            accuracies |= {f"knn_{name}": knn, f"linear_{name}": linear}
            sentences.append(f"{name}: 20-NN {knn:.2f} %, linear {linear:.2f} %")
        return accuracies, sentences

    def is_guarding(self) -> bool:
        """Whether --guard_knn watches the evaluations."""
        return self.arguments["guard_knn"] is not None

    def guard(self, top1: float, epoch: int) -> None:
        """Keep the best state; go back to it, and raise RunError, when k-NN has fallen too far below it."""
        if self.best is None or top1 >= self.best[0]:
            self.best = (top1, epoch)
            checkpoint.keep_best(self.folder)
            return
        allowed, (best, best_epoch) = self.arguments["guard_knn"], self.best
        if top1 >= best - allowed:
            return
        checkpoint.go_back_to_best(self.folder)
        self.plot()
        raise RunError(
            f"--guard_knn {allowed:g}: 20-NN fell from {best:.2f} % after epoch {best_epoch + 1} to "
            f"{top1:.2f} % after epoch {epoch + 1}: {self.folder / 'checkpoint.pth'} is that of epoch "
            f"{best_epoch + 1} again; use it, or train with a lower learning rate"
        )

    def picture_crops(self, crops: list[Tensor]) -> None:
        """Draw a batch's crops to plots/crops.png, once in a run."""
        if self.pictured:
            return
        self.pictured = True
        path = self.folder / "plots" / "crops.png"
        if self.process.rank != 0 or path.exists():
            return
        try:
            from ..pictures.crops import draw_batch
            from ..pictures.sheets import to_uint8
        except ImportError:
            logger.info("no picture of the crops: src/pictures is not there")
            return
        mean, std = self.augment.mean, self.augment.std
        pictures = [to_uint8(crop[:NUM_PICTURED], mean, std) for crop in crops]
        indices = self.indices[:NUM_PICTURED].tolist()
        title = f"First crops of {self.method} on {self.dataset.name}, epoch {self.epoch + 1}"
        try:
            draw_batch(self.dataset, indices, pictures, path, title)
        except OSError as error:
            logger.warning(f"no picture of the crops: {error}")

    def plot(self) -> None:
        """Draw the log to plots/curves.png."""
        if self.process.rank != 0:
            return
        try:
            from ..pictures import curves
        except ImportError:  # said by picture_crops
            return
        begun = time.monotonic()
        try:
            curves.plot_curves(self.folder, self.num_prototypes)
        except ImportError:
            logger.info("no curves: pip install matplotlib")
        except OSError as error:
            logger.warning(f"no curves: {error}")
        self.drawn_at = time.monotonic()
        self.drawing_seconds = self.drawn_at - begun


# ============ networks on several processes ============
def place_network(
    module: nn.Module,
    process: dist.Process,
    *,
    sync_bn: str,
    syncbn_process_group_size: int,
    compiled: bool,
) -> nn.Module:
    """Move a network to its device for training, and return it.

    Channels last, batch norm over groups of processes, compiled on request. Names of parameters stay
    as they are. Raises ValueError naming --sync_bn or --syncbn_process_group_size.
    """
    module = module.to(process.device, memory_format=torch.channels_last)
    if process.world_size > 1:
        from ..dist.syncbn import sync_batchnorm

        module = sync_batchnorm(module, sync_bn, syncbn_process_group_size, process)
    if compiled:
        module.compile()
    return module


def average_gradients(module: nn.Module, process: dist.Process) -> nn.Module:
    """The network in DDP where there are several processes; again whenever a parameter was resized."""
    if process.world_size == 1:
        return module
    devices = None if process.device.type == "cpu" else [process.device.index]
    return DistributedDataParallel(module, device_ids=devices)


def share_buffers(module: nn.Module) -> None:
    """Give all processes the batch statistics of rank 0, which are those of the checkpoint."""
    for buffer in module.buffers():
        buffer.copy_(dist.broadcast(buffer))


def _stacked(values):
    """0-d tensors as one, in float64."""
    return torch.stack([in_float64(value.detach()) for value in values])


# ============ the guard ============
def guarded_key(probe_data: list[tuple[str, str]]) -> str:
    """What of a log line --guard_knn looks at: k-NN on the first of --probe_data, else on the data."""
    return f"knn_{probe_data[0][0]}" if probe_data else "knn"


def best_of(lines: list[dict], key: str) -> tuple[float, int] | None:
    """The best (top-1, epoch) of the lines of a log, the later of equal ones; None without any."""
    found = [(line[key], line["epoch"]) for line in lines if key in line]
    return max(found, default=None)


# ============ the plan ============
def log_plan(run: Run, crops: MultiCropDataset, peak_lr: float) -> None:
    """Say what will be computed, before it is. crops: the MultiCropDataset."""
    args, process, dataset = run.arguments, run.process, crops.dataset
    resolutions = [
        f"{number} x {size} px (scale {smallest}-{largest})"
        for number, size, (smallest, largest) in zip(
            crops.num_crops, crops.size_crops, crops.scales, strict=True
        )
        if number
    ]
    chosen_for = f", made for {args['chosen_for']}" if args.get("chosen_for") else ""
    logger.info(f"preset      {args['preset']}{chosen_for}")
    left_out = f" (left out: {dataset.left_out})" if dataset.left_out else ""
    logger.info(f"data        {dataset.name}: {len(dataset):,} images{left_out}")
    logger.info(f"crops       {' + '.join(resolutions)}")
    logger.info(
        f"batch       {args['batch_size']} x {process.world_size} processes "
        f"({process.launcher}) = {run.global_batch}; {run.iters_per_epoch:,} iterations an "
        f"epoch, {args['epochs']} epochs, {run.num_iterations:,} iterations"
    )
    logger.info(
        f"optimizer   {args.get('optimizer', 'sgd')}, peak learning rate {peak_lr:.4g} (scaling "
        f"{args['lr_scaling']}), {args.get('warmup_epochs', 0)} epochs of warm-up"
    )
    logger.info(f"network     {args['arch']}, {run.precision} on {process.device}")
    if run.log.events is not None:
        logger.info(f"watch       tensorboard --logdir {shlex.quote(str(run.folder))}")
    if args.get("optimizer") == "larc" and run.global_batch <= 1024 and peak_lr > 2:
        logger.info(
            f"note: the learning rate {peak_lr:.3g} is for 4096 images; --lr_scaling linear fits it to "
            f"{run.global_batch}"
        )
    if args["knn_freq"] and dataset.labels is None and not args["probe_data"]:
        logger.info("note: --knn_freq needs labels, and --data_path has no labels: no k-NN")
