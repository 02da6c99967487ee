"""Iterations whose loss or gradient is not finite: which samples they had, and a run without them."""

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import dist
from ..errors import RunError, cause
from ..optim import same_kind

logger = logging.getLogger(__name__)

FILE = "nonfinite.jsonl"
REMEDIES = "lower --base_lr or --lr, lengthen --warmup_epochs, or use --precision fp32"


@dataclass
class Iteration:
    """One of this process: its number from the start of the run, its samples (B,), and what came out."""

    epoch: int
    number: int
    indices: Tensor
    loss: Tensor  # 0-d, as the gradient's norm
    gradient_norm: Tensor


class FiniteSteps:
    """Judges the iterations of a run, on all processes alike: a step is taken by all, or by none.

    limit: of --max_nonfinite, steps that the whole run may skip; with 0 nothing is asked of the device
    before check(). folder: of the run. modules: whose buffers a skipped iteration leaves as they were.
    scaled: the scaler of fp16 skips a step whose gradient is not finite, so that the loss alone counts.
    """

    def __init__(self, limit: int, folder: Path, modules: Iterable[nn.Module], scaled: bool):
        self.limit, self.folder, self.modules = limit, folder, list(modules)
        self.scaled = scaled
        self.skipped = 0  # steps, since the start of the run
        self._unchecked = []  # iterations since the last check, which each log line makes
        self._touched, self._copies = [], []  # tensors of one kind each, and what they were

    def begin(self, changed: Iterable[Tensor]) -> None:
        """Keep what an iteration may change before its step: buffers, and the parameters `changed`."""
        if not self.limit:
            return
        buffers = [buffer for module in self.modules for buffer in module.buffers()]
        self._touched = same_kind([*changed, *buffers])
        self._copies = [[torch.empty_like(x) for x in kind] for kind in self._touched]
        for copies, kind in zip(self._copies, self._touched, strict=True):
            torch._foreach_copy_(copies, [x.detach() for x in kind])

    def admits(self, iteration: Iteration) -> bool:
        """Whether its step may be taken; where not, what begin() has kept is put back.

        Raises RunError at the first iteration that exceeds the limit. All processes call it.
        """
        if not self.limit:
            # A worker's tensor has a file of its own in /dev/shm, as long as it is in use.
            iteration.indices = iteration.indices.clone()
            self._unchecked.append(iteration)
            return True
        if not self._are_bad([iteration]).item():
            return True
        for copies, kind in zip(self._copies, self._touched, strict=True):
            torch._foreach_copy_([x.detach() for x in kind], copies)
        if self.skipped >= self.limit:
            self._write(iteration, skipped=False)
            raise RunError(
                f"{_sentence(iteration)}, after {self.skipped} steps were skipped, and --max_nonfinite "
                f"{self.limit} allows no more; {self._files()}; {REMEDIES}, or raise --max_nonfinite"
            )
        self.skipped += 1
        self._write(iteration, skipped=True)
        if dist.is_main():
            logger.warning(
                f"WARNING: {_sentence(iteration)}: this step is skipped, number {self.skipped} of at "
                f"most {self.limit}; {self.folder / FILE} lists its samples"
            )
        return False

    def check(self, are_bad: list[bool] | None = None) -> None:
        """Stop the run if its latest iteration is not finite, and list the samples of the first such.

        The first is that after which all were so. are_bad: of unchecked(), where they were fetched with
        other values. Raises RunError. All processes call it.
        """
        if are_bad is None:
            are_bad = self.unchecked().tolist()
        iterations, self._unchecked = self._unchecked, []
        if not iterations or not are_bad[-1]:
            return
        first = len(are_bad) - 1
        while first > 0 and are_bad[first - 1]:
            first -= 1
        self._write(iterations[first], skipped=False)
        raise RunError(
            f"{_sentence(iterations[first])}; {self._files()}; {REMEDIES}, or skip such steps with "
            "--max_nonfinite 10"
        )

    def unchecked(self) -> Tensor:
        """Of each iteration since the last check whether it is not finite, on the device. All call it."""
        if not self._unchecked:
            return torch.zeros(0, dtype=torch.bool)
        return self._are_bad(self._unchecked)

    def _are_bad(self, iterations):
        """Of each whether it is not finite on any process, on the device."""
        device = iterations[0].loss.device
        values = [iteration.loss for iteration in iterations]
        if not self.scaled:
            values += [iteration.gradient_norm for iteration in iterations]
        values = torch.stack([value.detach().to(device, torch.float32) for value in values])
        are_bad = (~values.isfinite()).view(-1, len(iterations)).any(0)
        return dist.all_reduce_max(are_bad)

    def _write(self, iteration, skipped):
        """A line with the samples of all processes, and with what came out on each."""
        samples = dist.all_gather_rows(iteration.indices[None])  # (W, B)
        results = [x.detach().cpu().double() for x in (iteration.loss, iteration.gradient_norm)]
        losses, norms = dist.all_gather_rows(torch.stack(results)[None]).T.tolist()  # W of each
        if not dist.is_main():
            return
        line = {
            "epoch": iteration.epoch,
            "iteration": iteration.number,
            "skipped": skipped,
            "loss": [x if math.isfinite(x) else None for x in losses],
            "gradient_norm": [x if math.isfinite(x) else None for x in norms],
            "samples": samples.tolist(),
        }
        try:
            with open(self.folder / FILE, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # the run is worth more than the line
            logger.warning(f"{self.folder / FILE} cannot be written ({cause(error)})")

    def _files(self):
        return (
            f"{self.folder / FILE} lists its samples, and {self.folder / 'checkpoint.pth'} holds the "
            "last good state, if one was saved"
        )


def _sentence(iteration):
    return f"the loss or its gradient is not finite in iteration {iteration.number + 1} of the run"
