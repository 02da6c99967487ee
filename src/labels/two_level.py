"""DeeperCluster's assignment phase: k-means of all images, then a k-means inside each of its clusters.

Caron et al. 2019, arXiv:1905.01278; thesis, section 3.3.1, "Distributed k-means". Features lie in
mapped files, and each step leaves one: a killed run repeats a chunk and an iteration at most.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import dist
from ..cluster.exact_sums import member_means
from ..cluster.kmeans import euclidean_kmeans, initial_centroids
from ..cluster.pca import Whitening, fit_whitening, whiten
from ..errors import RunError, Stopped
from ..run.lock import FolderLock
from ..run.log import duration
from ..run.stop import StopSignal
from .features import share
from .row_file import RowFile, check_space, load_tensors, wait_for, write_array, write_tensors

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0


class TwoLevelClustering:
    """Clusters of N images in two levels, by steps that are done once.

    folder: of this assignment, shared by all processes; its files belong to `settings` (plain values
    on which they depend), and others are removed. groups: of processes, one for each first-level
    cluster, in which this process is member of number `member`; None: all processes work on one
    cluster after the other. device: where blocks of features are computed. backend: of k-means, see
    euclidean_kmeans. stop: whether this process was asked to stop.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict,
        *,
        num_images: int,
        groups: list | None,
        member: int,
        device: torch.device,
        backend: str,
        stop: StopSignal,
    ):
        self.folder, self.num_images, self.device = Path(folder), num_images, device
        self.groups, self.member, self.backend, self.stop = groups, member, backend, stop
        if dist.is_main():
            self._keep_files_of(settings)
        dist.barrier()
        self.lock, self.watched = None, []
        if dist.world_size() > 1:
            self._hold_lock()

    def _hold_lock(self):
        """Show the others that this process lives; the main one looks after all, and they after it."""
        self.lock = FolderLock(self.folder, f"process{dist.rank()}")
        watched = range(1, dist.world_size()) if dist.is_main() else [0]
        self.watched = [self.folder / f"process{rank}.lock" for rank in watched]
        dist.barrier()

    def _keep_files_of(self, settings):
        path = self.folder / "settings.pt"
        if path.exists() and load_tensors(path) == settings:
            logger.info(f"continues the clustering in {self.folder}")
            (self.folder / "stop").unlink(missing_ok=True)
            return
        if self.folder.exists():
            logger.info(f"{self.folder} is of another clustering: begins anew")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        write_tensors(path, settings)

    # ============ features ============
    def whitened(self, extract: Callable, num_features: int, dim: int) -> RowFile:
        """Whitened features (N, d), in a file.

        extract: called with the images that are missing, numbers (n,) from 0 to N-1, and with
        write(first, features), to which it gives theirs, in batches. num_features: their width.
        """
        rows = RowFile(self.folder, "rows", self.num_images, min(dim, num_features))
        if not self._exists("rows.pt"):
            needed = 4 * self.num_images * (num_features + rows.shape[1])
            check_space(self.folder, needed, f"the clustering of {self.num_images:,} features")
            features = RowFile(self.folder, "features", self.num_images, num_features)
            features.fill(extract, self.stop)
            self._leave_if_asked(lambda: not features.missing())
            whitening = self._fit(features, dim)
            matrix = features.read()
            for chunk in rows.own_missing():
                chunk_rows = rows.rows(chunk)
                white = whiten(matrix[_slice(chunk_rows)], whitening, device=self.device)
                rows.write(chunk_rows.start, white)
                rows.mark(chunk)
                if self.stop.requested:
                    break
            self._leave_if_asked(lambda: not rows.missing())
            self._save(self.folder / "rows.pt", {})
        RowFile(self.folder, "features", 0, num_features).remove()
        return rows

    def _fit(self, features, dim):
        path = self.folder / "whitening.pt"
        if self._exists(path.name):
            return Whitening(**load_tensors(path))
        own_features = features.read()[_slice(share(self.num_images))]
        whitening = fit_whitening(own_features, dim, device=self.device)
        self._save(path, vars(whitening))
        return whitening

    # ============ k-means ============
    def clusters(
        self,
        rows: RowFile,
        *,
        num_super: int,
        num_sub: int,
        iterations: int,
        seed: int,
        previous: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """First- and second-level clusters (N,), (N,) int64 of the rows.

        Every first-level cluster is split in num_sub, or in as many as it has images. previous: such
        a pair, of the assignment before, whose means k-means then starts from. Raises RunError when
        a first-level cluster has no image, and Stopped.
        """
        first_level = self._first_level(
            rows,
            num_super,
            iterations=iterations,
            seed=seed,
            before=None if previous is None else previous[0],
        )
        order = first_level.argsort(stable=True)  # images of cluster 0, of cluster 1, ...
        sizes = first_level.bincount(minlength=num_super).tolist()
        if min(sizes) == 0:
            raise RunError(
                f"collapse: {sizes.count(0)} of {num_super} first-level clusters have no image, since "
                "features are all alike; lower --lr, or use fewer --super_classes"
            )
        sorted_rows = self._sort(rows, order) if num_super > 1 else rows
        paths = [self.folder / f"sub-{cluster}.npy" for cluster in range(num_super)]
        with contextlib.suppress(Stopped):
            for cluster, path in enumerate(paths):
                if self.groups and cluster != self.member:
                    continue
                with dist.within(self.groups[cluster] if self.groups else None):
                    if self._exists(path.name):
                        continue
                    own_rows, before = self._own_rows_of(cluster, sizes, order, previous)
                    labels = self._kmeans(
                        sorted_rows,
                        own_rows,
                        num_clusters=min(num_sub, sizes[cluster]),
                        iterations=iterations,
                        seed=(seed, 1 + cluster),
                        before=before,
                    )
                    if dist.is_main():
                        write_array(path, labels)
        self._leave_if_asked(lambda: all(path.exists() for path in paths))
        second_level = torch.empty_like(first_level)
        labels = np.concatenate([np.load(path) for path in paths])
        second_level[order] = torch.from_numpy(labels.astype(np.int64))
        return first_level, second_level

    def _first_level(self, rows, num_super, *, iterations, seed, before):
        """First-level clusters (N,) int64. before: those of the assignment before, or None."""
        path = self.folder / "super.npy"
        if num_super == 1:
            return torch.zeros(self.num_images, dtype=torch.int64)
        if self._exists(path.name):
            return torch.from_numpy(np.load(path).astype(np.int64))
        own_rows = share(self.num_images)
        labels = self._kmeans(
            rows,
            own_rows,
            num_clusters=num_super,
            iterations=iterations,
            seed=(seed, 0),
            before=None if before is None else before[_slice(own_rows)],
        )
        if dist.is_main():
            write_array(path, labels)
        return labels.long()

    def _own_rows_of(self, cluster, sizes, order, previous):
        """This process's share of a first-level cluster's sorted rows, and what they were before.

        The latter are second-level clusters (n,), -1 for images that were in another first-level
        cluster, or None.
        """
        start, in_cluster = sum(sizes[:cluster]), share(sizes[cluster])
        own_rows = range(start + in_cluster.start, start + in_cluster.stop)
        if previous is None:
            return own_rows, None
        images = order[_slice(own_rows)]
        return own_rows, previous[1][images].where(previous[0][images] == cluster, -1)

    def _kmeans(self, rows, own_rows, *, num_clusters, iterations, seed, before):
        """Clusters (n,) int32 of all rows of the group, of which own_rows are this process's.

        seed: of the run, and the number of this k-means in the clustering. before: clusters of
        own_rows, whose means are the first centroids, or None.
        """
        if num_clusters == 0:
            return torch.zeros(0, dtype=torch.int32)
        features, path = rows.read()[_slice(own_rows)], self.folder / f"kmeans-{seed[1]}.pt"
        began = logged = time.perf_counter()
        if self._exists(path.name):
            state = load_tensors(path)
        else:
            draw = int(np.random.SeedSequence(seed).generate_state(1)[0])
            centroids = initial_centroids(features, num_clusters, draw)
            if before is not None:
                centroids = member_means(features, before, centroids)
            state = {"step": 0, "centroids": centroids}

        def on_step(step, centroids):
            nonlocal logged
            done, now = step + 1, time.perf_counter()
            if dist.is_main():
                write_tensors(path, {"step": done, "centroids": centroids.cpu()})
            if self.stop.agreed():
                raise Stopped
            if dist.is_main() and now - logged > LOG_SECONDS:
                logged = now
                seconds_a_step = (now - began) / (done - state["step"])
                logger.info(
                    f"k-means {seed[1]}: iteration {done} of {iterations}, {num_clusters} clusters, "
                    f"eta {duration(seconds_a_step * (iterations - done))}"
                )

        _, labels = euclidean_kmeans(
            features,
            state["centroids"],
            iterations=iterations,
            empty="reseed",
            backend=self.backend,
            device=self.device,
            on_step=on_step,
            first_step=state["step"],
        )
        return dist.all_gather_rows(labels.cpu().int())

    def _sort(self, rows, order):
        """The rows in the order of their clusters, so that each cluster's lie together, in a file."""
        num_rows, width = rows.shape
        sorted_rows, matrix = RowFile(self.folder, "sorted", num_rows, width), rows.read()
        for chunk in sorted_rows.own_missing():
            chunk_rows = sorted_rows.rows(chunk)
            sorted_rows.write(chunk_rows.start, matrix[order[_slice(chunk_rows)]])
            sorted_rows.mark(chunk)
            if self.stop.requested:
                break
        self._leave_if_asked(lambda: not sorted_rows.missing())
        return sorted_rows

    # ============ files ============
    def remove(self) -> None:
        """Delete the files, when their result is saved elsewhere."""
        dist.barrier()
        if self.lock is not None:
            self.lock.release()
            dist.barrier()
        if dist.is_main():
            shutil.rmtree(self.folder)

    def _exists(self, name):
        """Whether a file is there: what the first process of the group sees holds for all."""
        return dist.broadcast_object((self.folder / name).exists())

    def _save(self, path, values):
        if dist.is_main():
            write_tensors(path, {name: value.cpu() for name, value in values.items()})
        dist.barrier()

    def _leave_if_asked(self, is_done):
        """Wait until all processes have done their part; all leave if one was asked to stop."""
        wait_for(is_done, self.stop, self.folder, locks=self.watched)
        if self.stop.agreed():
            raise Stopped


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)
