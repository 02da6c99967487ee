"""A linear SVM for each class, its cost chosen by cross-validation; kept as groups of classes are done.

As VISSL's benchmark of VOC 2007 (Goyal et al. 2019, arXiv:1905.01235, section 6.1): the positive images
count twice, three folds decide the cost by average precision, and all images train the SVM that is tested.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import dist
from ..errors import Stopped
from ..labels.row_file import load_tensors, write_tensors
from ..run.log import duration
from ..run.stop import StopSignal
from .average_precision import average_precision
from .svm import Rows, solve

logger = logging.getLogger(__name__)

COSTS = [0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0]
FOLDS = 3
POSITIVE_WEIGHT = 2.0
NORM_EPS = 1e-5  # beside the norm of a row of features
GROUP = 5  # classes that are solved together, on however many processes
LOG_SECONDS = 5.0


def unit_rows(features: Tensor, device: torch.device) -> Tensor:
    """Features (n, D) divided by their norms, in float64 on the device."""
    features = features.to(device).double()
    return features / (features.norm(dim=1, keepdim=True) + NORM_EPS)


def stratified_folds(positive: Tensor, num_folds: int = FOLDS) -> Tensor:
    """The fold of each image (n,), so that each has its share of the positive ones and of the others.

    positive (n,) bool. Folds are consecutive images of a class, as scikit-learn's StratifiedKFold has it.
    """
    if not len(positive):
        return torch.empty(0, dtype=torch.int64)
    first = positive == positive[0]  # the class of the first image comes first
    size = int(first.sum())
    sizes = [len(range(i, size, num_folds)) for i in range(num_folds)]
    others = [len(range(i, len(positive), num_folds)) - sizes[i] for i in range(num_folds)]
    folds = torch.arange(num_folds)
    result = torch.empty(len(positive), dtype=torch.int64)
    result[first] = folds.repeat_interleave(torch.tensor(sizes))
    result[~first] = folds.repeat_interleave(torch.tensor(others))
    return result


def fit_group(
    rows: Rows,
    positive: Tensor,
    costs: Sequence[float],
    on_step: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """SVMs of G classes: `weights` (D + 1, G), `costs` (G,) chosen, `ap` (G, number of costs) in %, and
    `grid`, the costs from the smallest.

    positive (n, G) bool. ap: mean over folds of the average precision on a fold by an SVM of the others;
    a fold without a positive image is left out. The cheapest of the best costs is chosen; without
    any figure the first.
    """
    num = positive.shape[1]
    fold = torch.stack([stratified_folds(column.cpu()) for column in positive.t()], 1)  # (n, G)
    trained = [fold.ne(number) for number in range(FOLDS)]
    trained = torch.cat([*trained, torch.ones_like(trained[0])], 1).to(positive.device)
    signs = torch.where(positive, 1.0, -1.0).double().repeat(1, FOLDS + 1)  # (n, (FOLDS + 1) G)
    weights = torch.where(signs > 0, POSITIVE_WEIGHT, 1.0).double() * trained
    precisions, solutions, start = [], [], None
    for cost in sorted(costs):
        start = solve(rows, signs, cost * weights, start, on_step)
        scores = (rows.x @ start[:, :-num]).unflatten(1, (FOLDS, num)).cpu()  # (n, FOLDS, G)
        precisions.append(
            [
                _cross_validated(scores[:, :, i], positive[:, i].cpu(), fold[:, i])
                for i in range(num)
            ]
        )
        solutions.append(start[:, -num:])
    ap = torch.tensor(precisions, dtype=torch.float64).t()  # (G, costs)
    best = ap.nan_to_num(nan=-1.0).argmax(1)
    grid = torch.tensor(sorted(costs), dtype=torch.float64)
    solution = torch.stack([solutions[b][:, i] for i, b in enumerate(best.tolist())], 1)
    return {"weights": solution.cpu(), "costs": grid[best], "ap": ap, "grid": grid}


def _cross_validated(scores, positive, fold):
    """Mean average precision, in percent, of the folds; scores (n, FOLDS) by the SVM of the others."""
    found = []
    for number in range(FOLDS):
        own = fold == number
        if positive[own].any():
            found.append(average_precision(scores[own, number], positive[own])[0])
    return 100 * sum(found) / len(found) if found else float("nan")


def fit_classes(
    features: Tensor, positive: Tensor, costs: Sequence[float], folder: Path, stop: StopSignal
) -> dict[str, Tensor] | None:
    """As fit_group, for any number of classes, shared out to the processes; None when a signal came.

    features (n, D) and positive (n, C) bool: of all images, on the device. Each group of classes is a
    file in `folder`, the same on any number of processes, and is not computed again.
    All processes call it.
    """
    starts = range(0, positive.shape[1], GROUP)
    paths = [folder / f"classes_{start}.pth" for start in starts]
    missing = [i for i, path in enumerate(paths) if not _has_group(path, costs)]
    missing = dist.broadcast_object(missing)
    own = missing[dist.rank() :: dist.world_size()]
    rows = Rows(features) if own else None
    began, logged, done = time.perf_counter(), time.perf_counter(), 0

    def on_step():
        nonlocal logged
        if stop.requested:
            raise Stopped
        now = time.perf_counter()
        if dist.is_main() and now - logged > LOG_SECONDS:
            logged = now
            left = (now - began) / done * (len(own) - done) if done else float("inf")
            logger.info(
                f"SVMs: {done} of {len(own)} groups of {GROUP} classes, {len(costs)} costs and "
                f"{FOLDS} folds each, ETA {duration(left)}"
            )

    try:
        for i in own:
            group = positive[:, starts[i] : starts[i] + GROUP]
            write_tensors(paths[i], fit_group(rows, group, costs, on_step))
            done += 1
    except Stopped:
        pass
    if stop.agreed():  # all processes come here when their groups are done
        return None
    groups = [load_tensors(path) for path in paths]
    return {
        "weights": torch.cat([group["weights"] for group in groups], 1),
        "costs": torch.cat([group["costs"] for group in groups]),
        "ap": torch.cat([group["ap"] for group in groups]),
        "grid": groups[0]["grid"],
    }


def _has_group(path, costs):
    return path.exists() and load_tensors(path)["grid"].tolist() == sorted(costs)
