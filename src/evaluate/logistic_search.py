"""Logistic regression with the penalty that a held-out part of the training images likes best.

Fits follow one another from the largest penalty to the smallest, each from the weights of the one before;
a last one, with the best penalty, is of all labelled images. What a stopped search has done is in a file.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import dist
from ..labels.features import share
from ..labels.row_file import load_tensors, write_tensors
from ..run.log import duration
from ..run.stop import StopSignal
from .linear_files import check_settings
from .logistic import Problem, held_out, minimise, scores_of, unit_rows

logger = logging.getLogger(__name__)

# Lambda n of lambda / 2 |W|^2, from the largest; 0.1 is what was published with DINO's logistic regression.
PENALTIES = [10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001]
HELD_OUT = 0.2  # of the labelled images of each class
LOG_SECONDS, SAVE_SECONDS = 5.0, 60.0
BLOCK = 4096  # rows that are scored at a time


class Search:
    """The fits of one set of labelled images, and the file that keeps them.

    name: of the set, for people. path: of the file. settings: all that the fits depend on, as JSON has
    it; a file with others is not continued. features (n, D) of norm 1, labels (n,) and held_out (n,)
    bool, those that the penalty is chosen by: of this process, on the device; n may be 0.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        settings: dict,
        features: Tensor,
        labels: Tensor,
        held_out: Tensor,
        num_classes: int,
        penalties: Sequence[float],
        intercept: bool,
    ):
        self.name, self.path, self.settings = name, path, settings
        self.features, self.labels, self.held_out = features, labels, held_out
        self.num_classes, self.intercept = num_classes, intercept
        self.penalties = sorted(penalties, reverse=True)
        shape = (num_classes, features.shape[1] + intercept)
        start = torch.zeros(shape, dtype=torch.float64, device=features.device)
        # fits: what was found with each penalty. solver: of the fit that was stopped, {} for none.
        self.state = {"fits": [], "weights": start, "best": start, "solver": {}, "final": False}
        if path.exists():
            stored = load_tensors(path)
            check_settings(stored, settings, path)
            self.state = _on_device(
                {k: v for k, v in stored.items() if k != "settings"}, start.device
            )

    def run(self, stop: StopSignal) -> dict | None:
        """`weights` of all labelled images, the `penalty` chosen, and `held_out`: results by penalty.

        None when a signal asked to stop; what is done is saved then. All processes call it.
        """
        state, self.began = self.state, time.perf_counter()
        self.logged = self.saved = self.began
        self.done_before = len(state["fits"])
        if len(self.penalties) > 1:
            for penalty in self.penalties[len(state["fits"]) :]:
                if not self._fit(penalty, ~self.held_out, state["weights"], stop):
                    return None
                found = accuracy(
                    self.features[self.held_out],
                    self.labels[self.held_out],
                    state["weights"],
                    self.intercept,
                )
                state["fits"].append({"penalty": penalty, **found})
                if self._best() == len(state["fits"]) - 1:
                    state["best"] = state["weights"]
        penalty = self.penalties[self._best() if state["fits"] else 0]
        if not state["final"]:
            every = torch.ones_like(self.held_out)
            if not self._fit(penalty, every, state["best"], stop):
                return None
            state["final"] = True
            self._save()
        return {"weights": state["weights"], "penalty": penalty, "held_out": state["fits"]}

    def _best(self):
        """The number of the best penalty: of equal accuracies that of the lowest loss."""
        fits = self.state["fits"]
        return max(range(len(fits)), key=lambda i: (fits[i]["top1"], -fits[i]["loss"]), default=0)

    def _fit(self, penalty, chosen, start, stop):
        """Whether the weights of a penalty were found, which then are state["weights"]."""
        features, labels = self.features, self.labels
        if not chosen.all():
            features, labels = features[chosen], labels[chosen]
        problem = Problem(features, labels, self.num_classes, penalty, self.intercept)
        stopped_solver = self.state["solver"]

        def on_steps(solver):
            now, asked = time.perf_counter(), stop.agreed()
            self._log(penalty, solver, now)
            if asked or now - self.saved > SAVE_SECONDS:
                self.saved = now
                self.state["solver"] = solver
                self._save()
            return asked

        found = minimise(problem, start, stopped_solver or None, on_steps)
        if found is None:
            return False
        self.state["solver"], self.state["weights"] = {}, found
        return True

    def _log(self, penalty, solver, now):
        if now - self.logged < LOG_SECONDS or not dist.is_main():
            return
        self.logged, fits = now, len(self.state["fits"])
        total = len(self.penalties) + 1 if len(self.penalties) > 1 else 1
        done = fits - self.done_before
        left = (now - self.began) / done * (total - fits) if done else float("inf")
        logger.info(
            f"{self.name}: penalty {penalty:g} ({fits + 1} of {total} fits), {solver['steps']} steps, "
            f"loss {solver['loss']:.5f}, at most {solver['excess']:.1e} above the minimum | "
            f"ETA {duration(left)}"
        )

    def _save(self):
        if dist.is_main():
            write_tensors(self.path, {**self.state, "settings": self.settings})


def _on_device(value, device):
    """The tensors in nested dicts and lists, moved to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _on_device(part, device) for name, part in value.items()}
    if isinstance(value, list):
        return [_on_device(part, device) for part in value]
    return value


def accuracy(
    features: Tensor, labels: Tensor, weights: Tensor, intercept: bool
) -> dict[str, float]:
    """Top-1, top-5 (%) and mean cross-entropy, `loss`, of the rows of all processes.

    features (n, D), labels (n,): of this process, n may be 0. Among equal scores the lowest class is first.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=weights.device)
    for rows, own in zip(features.split(BLOCK), labels.split(BLOCK), strict=True):
        if not len(rows):
            continue
        scores = scores_of(rows.to(weights.device), weights, intercept)  # (b, C)
        own = own.to(weights.device)[:, None]
        value = scores.gather(1, own)
        earlier = torch.arange(scores.shape[1], device=own.device) < own
        ranks = ((scores > value) | ((scores == value) & earlier)).sum(1)
        loss = scores.logsumexp(1) - value[:, 0]
        sums += torch.stack(
            [(ranks < 1).sum(), (ranks < 5).sum(), loss.sum(), ranks.new_tensor(len(own))]
        )
    top1, top5, loss, count = dist.all_reduce_sum(sums).tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}


def stored_images(
    folder: Path, sets: dict[str, Tensor], num_images: int
) -> tuple[str, Tensor | None]:
    """The name of the file of features that serves some sets of images, and its images, None for all.

    Those of all images where one of the sets has them, or where they are there already.
    """
    union = torch.cat(list(sets.values())).unique()
    path = folder / "train.json"
    whole = path.is_file() and json.loads(path.read_text())["complete"]
    if len(union) == num_images or dist.broadcast_object(whole):
        return "train", None
    return f"train_{hashlib.blake2b(union.numpy().tobytes(), digest_size=4).hexdigest()}", union


def _digest_of(settings):
    """A few letters that tell settings from others: fits with other penalties have a file of their own."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def open_search(
    name: str,
    indices: Tensor,
    *,
    matrix: Tensor,
    union: Tensor | None,
    labels: Tensor,
    num_classes: int,
    folder: Path,
    settings: dict,
    device: torch.device,
    penalties: Sequence[float],
    intercept: bool,
    seed: int,
) -> Search:
    """The Search of the labelled images `indices` (n,), with this process's share of their rows.

    matrix: features of the images `union`, or of all. labels (N,): of all. Raises ValueError where
    several penalties are to be compared and no class has an image that could be held out.
    """
    penalties = sorted(penalties, reverse=True)
    mask = held_out(labels[indices], HELD_OUT, seed)
    if len(penalties) > 1 and not mask.any():
        raise ValueError(
            f"--penalties are compared on a fifth of each class's labelled images, and no class of "
            f"{name} has {round(1 / HELD_OUT)}: give one value, such as 0.1"
        )
    own = share(len(indices))
    own = slice(own.start, own.stop)
    rows = indices if union is None else torch.searchsorted(union, indices)
    settings = {**settings, "penalties": penalties, "intercept": intercept, "seed": seed}
    return Search(
        name,
        folder / f"fits_{_digest_of(settings)}.pth",
        settings,
        features=unit_rows(matrix[rows[own]], device),
        labels=labels[indices[own]].to(device),
        held_out=mask[own].to(device),
        num_classes=num_classes,
        penalties=penalties,
        intercept=intercept,
    )
