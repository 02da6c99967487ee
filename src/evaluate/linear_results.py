"""What linear classifiers have reached: a row for each learning rate, for people and as JSON."""

import json
import logging
import math
import statistics
from pathlib import Path

from .. import dist
from ..errors import RunError
from ..run import checkpoint
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

    history: by epoch, what src.evaluate.linear_classifiers.accuracies returned and `epoch`. The best
    epoch is the first with the largest top-1, or mean average precision.
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
    logger.info(f"learning rate  {first:>6}  {second:>6}  best {first}  {second:>6}  epoch")
    for i, row in enumerate(rows):
        lr = "-" if row["lr"] is None else f"{row['lr']:g}"
        last = "  ".join(f"{row[name]:6.2f}" for name in names)
        best_first, best_second = (row[f"best_{name}"] for name in names)
        epoch = row["best_epoch"] or "-"
        mark = "  <- best" if i == best and len(rows) > 1 else ""
        logger.info(
            f"{lr:13}  {last}     {best_first:{2 + len(first)}.2f}  {best_second:6.2f}  {epoch:>5}{mark}"
        )
    if untrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, a mere baseline")
    logger.info(f"written to {path}")


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
        values = [
            f"{text} {row[name]:.2f} +- {row[f'{name}_std']:.2f}"
            for name, text in ((first, f"best {names[first[5:]]}"), *names.items())
        ]
        logger.info(f"{len(folds)} folds, learning rate {row['lr']:g}: {', '.join(values)}")
    logger.info(f"written to {path}")


def log_epoch(
    log: RunLog, epoch: int, iters_per_epoch: int, lrs: list, history: list[dict]
) -> None:
    """Write a line with the accuracies of an epoch; people see those of the best classifier."""
    rows, best = summary(lrs, history)
    names = figures(history)
    iteration = (epoch + 1) * iters_per_epoch - 1
    values = {name: history[-1][name] for name in names}
    log.write(
        iteration,
        {"epoch": epoch, "epoch_float": epoch + 1.0, "iteration": iteration, **values},
    )
    row, (first, second) = rows[best], names
    of_lr = f" with learning rate {row['lr']:g}" if len(rows) > 1 else ""
    logger.info(
        f"epoch {epoch + 1}: {names[first]} {row[first]:.2f} {names[second]} {row[second]:.2f} "
        f"(best {names[first]} {row[f'best_{first}']:.2f}, epoch {row['best_epoch']}){of_lr}"
    )


def log_progress(
    log: RunLog,
    *,
    epoch: int,
    epochs: int,
    it: int,
    iters_per_epoch: int,
    lrs: list[float],
    loss: list[float],
    rates: dict,
    folder: Path,
) -> None:
    """Write a log line; of several classifiers people see the lowest loss.

    it: iteration of the epoch. lrs, loss: of each classifier. rates: of Stopwatch.rates. folder: of
    what is saved. Raises RunError if no classifier has a finite loss; what is saved stays as it is.
    """
    finite = [x for x in loss if math.isfinite(x)]
    if not finite:
        raise RunError(
            f"the loss is not finite; {folder / checkpoint.NEWEST} holds the last good state, if one "
            "was saved; lower --lr"
        )
    iteration = epoch * iters_per_epoch + it
    line = {
        "epoch": epoch,
        "epoch_float": epoch + (it + 1) / iters_per_epoch,
        "iteration": iteration,
        "lrs": lrs,
        "losses": [x if x in finite else None for x in loss],
    }
    log.write(iteration, {**line, **rates})
    logger.info(
        f"epoch {epoch + 1}/{epochs} it {it + 1}/{iters_per_epoch} loss {min(finite):.4f} | "
        f"{rates['images_per_second']:.0f} img/s data {100 * rates['data_share']:.0f}% "
        f"eta {duration(rates['eta_seconds'])}"
    )


def report_logistic(rows: list[dict], settings: dict, path: Path, untrained: bool) -> None:
    """Log the results of logistic regression, a table and a line of JSON, and write them to `path`.

    rows: `labels`, `images`, `top1`, `top5`, `penalty` and `held_out` of each set of labelled images.
    One process does it.
    """
    if not dist.is_main():
        return
    path.write_text(json.dumps({"results": rows, "settings": settings}, indent=1) + "\n")
    logger.info("| labels | images | top-1 | top-5 | penalty |")
    logger.info("|---|---|---|---|---|")
    for row in rows:
        logger.info(
            f"| {row['labels']} | {row['images']:,} | {row['top1']:.2f} | {row['top5']:.2f} | "
            f"{row['penalty']:g} |"
        )
        tried = [fit["penalty"] for fit in row["held_out"]]
        if tried and row["penalty"] in (tried[0], tried[-1]):
            logger.info(
                f"note: of {row['labels']} of the labels the penalty {row['penalty']:g} is at the end of "
                "those tried: more --penalties may do better"
            )
    short = [{name: row[name] for name in ("labels", "images", "top1", "penalty")} for row in rows]
    logger.info(json.dumps({"evaluation": path.stem, "results": short}))
    if untrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, a mere baseline")
    logger.info(f"written to {path}")
