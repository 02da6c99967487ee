"""What linear classifiers have reached: a row for each learning rate, for people and as JSON."""

import json
import logging
import math
import statistics
from pathlib import Path

from .. import dist
from ..run import checkpoint, flags
from ..run.log import RunLog, duration

logger = logging.getLogger(__name__)

# The figures of images of one class, and of several classes each; the first of them decides.
FIGURES = {
    "top1": {"top1": "top-1", "top5": "top-5"},
    "map": {"map": "mAP", "map_11points": "11-pt"},
}


def figures(history: list[dict]) -> dict[str, str]:
    """The figures by name, as people call them, in the results `history`."""
    return next(names for first, names in FIGURES.items() if first in history[-1])


def summary(lrs: list, history: list[dict]) -> tuple[list[dict], int]:
    """A row of results for each learning rate, and the number of the best by validation.

    history: by epoch, what src.evaluate.linear_classifiers.accuracies returned and `epoch`. The best epoch is the
    first with the largest top-1, or mean average precision.
    """
    names, rows = list(figures(history)), []
    for i, lr in enumerate(lrs):
        best = max(history, key=lambda line, i=i: line[names[0]][i])
        row = {name: history[-1][name][i] for name in (*names, "loss")}
        row |= {f"best_{name}": best[name][i] for name in names}
        rows.append({"lr": lr, **row, "best_epoch": best["epoch"]})
    return rows, max(range(len(rows)), key=lambda i: rows[i][f"best_{names[0]}"])


def report(lrs: list, history: list[dict], settings: dict, path: Path, untrained: bool) -> None:
    """Log the results and write them to `path` as JSON; one process does."""
    if not dist.is_main():
        return
    rows, best = summary(lrs, history)
    names = figures(history)
    chosen = (*names, *(f"best_{name}" for name in names), "best_epoch", "lr")
    result = {name: rows[best][name] for name in chosen}
    path.write_text(json.dumps({**result, "results": rows, "settings": settings}, indent=1) + "\n")
    first, second = names.values()
    logger.info("learning rate  %6s  %6s  best %s  %6s  epoch", first, second, first, second)
    for i, row in enumerate(rows):
        values = [row[name] for name in (*names, *(f"best_{name}" for name in names))]
        logger.info(
            "%-13s  %6.2f  %6.2f     %*.2f  %6.2f  %5s%s",
            *("-" if row["lr"] is None else f"{row['lr']:g}", *values[:2]),
            *(2 + len(first), *values[2:], row["best_epoch"] or "-"),
            "  <- best" if i == best and len(rows) > 1 else "",
        )
    if untrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, a mere baseline")
    logger.info("written to %s", path)


def report_folds(paths: list[Path], path: Path) -> None:
    """Mean and standard deviation over folds of the results in `paths`, logged and written to `path`.

    The deviation is that of a sample, n - 1 in the denominator. One process does it.
    """
    if not dist.is_main():
        return
    folds = [json.loads(file.read_text()) for file in paths]
    rows = []
    for results in zip(*(fold["results"] for fold in folds), strict=True):
        row = {"lr": results[0]["lr"]}
        for name in results[0]:
            values = [result[name] for result in results]
            if name not in ("lr", "best_epoch") and None not in values:
                row |= {name: statistics.mean(values), f"{name}_std": statistics.stdev(values)}
        rows.append(row)
    names = figures([folds[0]])
    first = f"best_{next(iter(names))}"
    best = max(rows, key=lambda row: row[first])
    settings = {**folds[0]["settings"], "fold": None}
    path.write_text(
        json.dumps({**best, "results": rows, "folds": folds, "settings": settings}, indent=1) + "\n"
    )
    for row in rows:
        said = [
            f"{text} {row[name]:.2f} +- {row[f'{name}_std']:.2f}"
            for name, text in ((first, f"best {names[first[5:]]}"), *names.items())
        ]
        logger.info("%d folds, learning rate %g: %s", len(folds), row["lr"], ", ".join(said))
    logger.info("written to %s", path)


def log_epoch(log: RunLog, epoch: int, iters_per_epoch: int, lrs: list, history: list[dict]):
    """Write a line with the accuracies of an epoch; people see those of the best classifier."""
    rows, best = summary(lrs, history)
    names = figures(history)
    iteration = (epoch + 1) * iters_per_epoch - 1
    place = {"epoch": epoch, "epoch_float": epoch + 1.0, "iteration": iteration}
    log.write(iteration, {**place, **{name: history[-1][name] for name in names}})
    row, (first, second) = rows[best], names
    logger.info(
        "epoch %d: %s %.2f %s %.2f (best %s %.2f, epoch %d)%s",
        *(epoch + 1, names[first], row[first], names[second], row[second]),
        *(names[first], row[f"best_{first}"], row["best_epoch"]),
        f" with learning rate {row['lr']:g}" if len(rows) > 1 else "",
    )


def log_progress(log: RunLog, epoch, epochs, it, iters_per_epoch, lrs, loss, rates, folder) -> None:
    """Write a log line; of several classifiers people see the lowest loss.

    Raises RunError if no classifier has a finite loss; what is saved stays as it is.
    """
    finite = [x for x in loss if math.isfinite(x)]
    if not finite:
        raise flags.RunError(
            f"the loss is not finite; {folder / checkpoint.NEWEST} holds the last good state, if one "
            "was saved; lower --lr"
        )
    place = {"epoch": epoch, "epoch_float": epoch + (it + 1) / iters_per_epoch}
    iteration = epoch * iters_per_epoch + it
    known = [x if x in finite else None for x in loss]
    log.write(iteration, {**place, "iteration": iteration, "lrs": lrs, "losses": known, **rates})
    logger.info(
        "epoch %d/%d it %d/%d loss %.4f | %.0f img/s data %.0f%% eta %s",
        *(epoch + 1, epochs, it + 1, iters_per_epoch, min(finite)),
        *(rates["images_per_second"], 100 * rates["data_share"], duration(rates["eta_seconds"])),
    )
