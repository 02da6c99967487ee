"""Which images an epoch trains on when all clusters, large and small, shall have the same share.

Source: the thesis, section 3.2.1 ("sample images based on a uniform distribution over the classes").
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def uniform_over_clusters(
    labels: np.ndarray, total: int, rng: np.random.RandomState | np.random.Generator
) -> np.ndarray:
    """Indices (total,) int64 into `labels`, in which every non-empty cluster has the same share.

    labels: (N,) integers, the cluster of each image; images with a label below 0 are never drawn.
    With C non-empty clusters, total // C + 1 members of each are drawn, in increasing order of the
    labels: different ones where the cluster has more than that, else with replacement. All are
    shuffled, and the first `total` of them returned, so that a cluster has total / C on average.
    rng draws everything: the same labels and the same state give the same indices.
    Raises ValueError when total is below 0, or no image has a cluster.
    """
    labels = np.asarray(labels)
    members = np.count_nonzero(labels >= 0)
    if labels.ndim != 1 or total < 0 or members == 0:
        raise ValueError(
            f"{total} images cannot be drawn from {labels.shape} labels, {members} of them in a "
            f"cluster: give labels (N,) of which one at least is not below 0, and a total from 0 on"
        )
    order = np.argsort(labels, kind="stable")[len(labels) - members :]  # by cluster
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))  # (C,)
    sizes = np.diff(starts, append=members)
    share = total // len(sizes) + 1
    drawn = np.empty((len(sizes), share), dtype=np.int64)
    for row, start, size in zip(drawn, starts.tolist(), sizes.tolist(), strict=True):
        row[:] = rng.choice(size, share, replace=size <= share)
        row += start
    drawn = order[drawn.reshape(-1)]
    rng.shuffle(drawn)
    return drawn[:total]


class PlannedSampler(Sampler):
    """Triples `(epoch, index, place)` of images that were drawn beforehand, for MultiCropDataset.

    `place` numbers the images of an epoch over all processes: (iteration * world_size + rank) *
    batch_size + i for the i-th of a batch. Its crops are drawn by it, so that an image which
    an epoch holds twice is seen in two ways.
    """

    def __init__(self, batch_size: int, rank: int, world_size: int):
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.set_epoch(0, np.empty((0, batch_size), dtype=np.int64))

    def set_epoch(self, epoch: int, order: np.ndarray, start: int = 0) -> None:
        """Choose an epoch's images and how many of its iterations were already made.

        order: (iterations, batch_size) indices of the samples of this process.
        Raises ValueError for another shape.
        """
        if order.ndim != 2 or order.shape[1] != self.batch_size:
            raise ValueError(
                f"the order of an epoch must be (iterations, {self.batch_size}), as the batch size "
                f"is {self.batch_size}, not {tuple(order.shape)}"
            )
        self.epoch, self.order, self.start = epoch, order, start

    def __len__(self) -> int:
        return max(0, len(self.order) - self.start) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for iteration in range(self.start, len(self.order)):
            first = (iteration * self.world_size + self.rank) * self.batch_size
            for place, index in enumerate(self.order[iteration].tolist(), first):
                yield self.epoch, index, place
