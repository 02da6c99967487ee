"""What linear classifiers have reached: a row for each learning rate, for people and as JSON."""

import json
import logging
from pathlib import Path

from src import distributed
from src.logger import RunLog

logger = logging.getLogger(__name__)


def summary(lrs: list, history: list[dict]) -> tuple[list[dict], int]:
    """A row of results for each learning rate, and the number of the best by validation.

    history: by epoch, what src.linear_probe.accuracies returned and `epoch`. The best epoch is the
    first with the largest top-1.
    """
    rows = []
    for i, lr in enumerate(lrs):
        best = max(history, key=lambda line, i=i: line["top1"][i])
        row = {name: history[-1][name][i] for name in ("top1", "top5", "loss")}
        row |= {"best_top1": best["top1"][i], "best_top5": best["top5"][i]}
        rows.append({"lr": lr, **row, "best_epoch": best["epoch"]})
    return rows, max(range(len(rows)), key=lambda i: rows[i]["best_top1"])


def report(lrs: list, history: list[dict], settings: dict, path: Path, untrained: bool) -> None:
    """Log the results and write them to `path` as JSON; one process does."""
    if not distributed.is_main():
        return
    rows, best = summary(lrs, history)
    names = ("top1", "top5", "best_top1", "best_top5", "best_epoch", "lr")
    result = {name: rows[best][name] for name in names}
    path.write_text(json.dumps({**result, "results": rows, "settings": settings}, indent=1) + "\n")
    logger.info("learning rate   top-1   top-5  best top-1   top-5  epoch")
    for i, row in enumerate(rows):
        logger.info(
            "%-13s  %6.2f  %6.2f      %6.2f  %6.2f  %5s%s",
            *("-" if row["lr"] is None else f"{row['lr']:g}", row["top1"], row["top5"]),
            *(row["best_top1"], row["best_top5"], row["best_epoch"] or "-"),
            "  <- best" if i == best and len(rows) > 1 else "",
        )
    if untrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, a mere baseline")
    logger.info("written to %s", path)


def log_epoch(log: RunLog, epoch: int, iters_per_epoch: int, lrs: list, history: list[dict]):
    """Write a line with the accuracies of an epoch; people see those of the best classifier."""
    rows, best = summary(lrs, history)
    iteration = (epoch + 1) * iters_per_epoch - 1
    place = {"epoch": epoch, "epoch_float": epoch + 1.0, "iteration": iteration}
    log.write(iteration, {**place, **{name: history[-1][name] for name in ("top1", "top5")}})
    row = rows[best]
    logger.info(
        "epoch %d: top-1 %.2f top-5 %.2f (best top-1 %.2f, epoch %d)%s",
        *(epoch + 1, row["top1"], row["top5"], row["best_top1"], row["best_epoch"]),
        f" with learning rate {row['lr']:g}" if len(rows) > 1 else "",
    )
