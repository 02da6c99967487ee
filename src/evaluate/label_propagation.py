"""Labels of the first frame of a video carried to all others by the similarity of features.

Jabri et al., Space-Time Correspondence as a Contrastive Random Walk, arXiv:2006.14613, appendix, as DINO
(Caron et al. 2021, arXiv:2104.14294, section 4.2) has it: a patch of a frame takes the weighted labels of
the patches that are most like it, in the first frame and the last few, none of them far away.
Features and labels are of a grid of patches by rows, N = rows * columns; K counts the labels.
"""

from collections import deque
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BYTES = 64 << 20  # that the similarities which are computed at once may take


def propagate_labels(
    features: Tensor,
    context: Tensor,
    labels: Tensor,
    grid: tuple[int, int],
    *,
    radius: int,
    topk: int,
    temperature: float,
    most_bytes: int = BYTES,
) -> Tensor:
    """The labels of a frame from those of earlier ones: sums to 1 stay sums to 1, (N, K).

    features (N, D) of the frame, context (C, N, D) of the earlier frames, all of length 1, and their
    labels (C, N, K); grid: (rows, columns). Of the patches of all earlier frames at most `radius` rows
    and columns away, 0: of all, the `topk` of the largest cosine count, each by
    exp(cosine / temperature). Some rows are computed at a time, so that cosines take no more than
    `most_bytes`, or as much as one row needs. All in float32.
    """
    rows, columns = grid
    frames, device = len(context), features.device
    reach = radius or max(grid)
    context = context.unflatten(1, grid)  # (C, rows, columns, D)
    labels = labels.unflatten(1, grid)  # (C, rows, columns, K)
    row_numbers = torch.arange(rows, device=device)
    column_numbers = torch.arange(columns, device=device)
    is_aside = (column_numbers[:, None] - column_numbers).abs() > reach  # (columns, columns)
    at_once = _rows_at_once(grid, frames, reach, most_bytes)
    propagated = []
    for first in range(0, rows, at_once):
        end = min(first + at_once, rows)
        near = slice(max(0, first - reach), min(rows, end + reach))  # rows that may be near enough
        keys = context[:, near].flatten(0, 2)  # (C * near * columns, D)
        cosines = features[first * columns : end * columns] @ keys.T
        is_above = (row_numbers[first:end, None] - row_numbers[near]).abs() > reach
        is_far = is_above[:, None, :, None] | is_aside[:, None]  # (b, columns, near, columns)
        by_frame = cosines.view(end - first, columns, frames, -1, columns)
        by_frame.masked_fill_(is_far[:, :, None], -torch.inf)
        values, chosen = cosines.topk(min(topk, cosines.shape[1]), dim=1)  # (b * columns, k)
        weights = (values / temperature).softmax(1)
        of_chosen = labels[:, near].flatten(0, 2)[chosen]  # (b * columns, k, K)
        propagated.append((weights[:, :, None] * of_chosen).sum(1))
    return torch.cat(propagated)


def _rows_at_once(grid, frames, reach, most_bytes):
    """How many rows of a frame fit into `most_bytes`, at least one."""
    rows, columns = grid

    def size(number):
        return 4 * number * columns * frames * min(rows, number + 2 * reach) * columns

    return max((n for n in range(1, rows + 1) if size(n) <= most_bytes), default=1)


def propagate_video(
    features: Iterator[Tensor],
    first_labels: Tensor,
    grid: tuple[int, int],
    *,
    n_last_frames: int,
    radius: int,
    topk: int,
    temperature: float,
) -> Iterator[Tensor]:
    """The labels (N, K) of each frame but the first, one after the other.

    features: those of each frame (N, D), of any length, from the first on. first_labels (N, K). The
    labels of a frame come from the first frame and from the `n_last_frames` before it, with what those
    were given.
    """
    first = F.normalize(next(features).float(), dim=1)
    recent = deque(maxlen=n_last_frames)  # (features, labels) of the frames before
    for current in features:
        current = F.normalize(current.float(), dim=1)
        labels = propagate_labels(
            current,
            torch.stack([first, *(earlier for earlier, _ in recent)]),
            torch.stack([first_labels, *(earlier for _, earlier in recent)]),
            grid,
            radius=radius,
            topk=topk,
            temperature=temperature,
        )
        recent.append((current, labels))
        yield labels


def most_likely(labels: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """The label of each pixel, uint8 (rows * stride, columns * stride), of soft labels (N, K).

    The map of each label is enlarged, then stretched from its smallest value to its largest, 0 to 1, as
    published: a small object would else lose its outer patches to the background. Of equal ones the
    first label is taken.
    """
    maps = labels.T.unflatten(1, grid)[None]  # (1, K, rows, columns)
    maps = F.interpolate(maps, scale_factor=stride, mode="bilinear", align_corners=False)[0]
    lowest, highest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = (maps - lowest) / (highest - lowest).clamp(min=torch.finfo(maps.dtype).tiny)
    return maps.argmax(0).to(torch.uint8)
