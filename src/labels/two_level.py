"""DeeperCluster's assignment phase: k-means of all images, then a k-means inside each of its clusters.

Caron et al. 2019, arXiv:1905.01278; thesis, section 3.3.1, "Distributed k-means". Features lie in
mapped files, and each step leaves one: a run that was killed repeats a chunk and an iteration at most.
"""

import contextlib
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import dist
from ..cluster.exact_sums import member_means
from ..cluster.kmeans import euclidean_kmeans, initial_centroids
from ..cluster.pca import Whitening, fit_whitening, whiten
from ..run import flags
from ..run.log import duration
from ..run.stop import Stopped
from .features import share
from .row_file import RowFile, check_space, load_tensors, wait_for, write_array, write_tensors

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0


class TwoLevelClustering:
    """Clusters of N images in two levels, by steps that are done once.

    folder: of this assignment, shared by all processes; its files belong to `settings` (plain values
    on which they depend), and others are removed. groups: of processes, one for each first-level
    cluster, in which this process is member of number `member`; None: all processes work on one
    cluster after the other. device: where blocks of features are computed. stop: whether this
    process was asked to stop.
    """

    def __init__(self, folder, settings, num_images, groups, member, device, backend, stop):
        self.folder, self.num_images, self.device = Path(folder), num_images, device
        self.groups, self.member, self.backend, self.stop = groups, member, backend, stop
        if dist.is_main():
            self._keep_if_same(settings)
        dist.barrier()

    def _keep_if_same(self, settings):
        path = self.folder / "settings.pt"
        if path.exists() and load_tensors(path) == settings:
            logger.info("continues the clustering in %s", self.folder)
            (self.folder / "stop").unlink(missing_ok=True)
            return
        if self.folder.exists():
            logger.info("%s is of another clustering: begins anew", self.folder)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        write_tensors(path, settings)

    # ============ features ============
    def whitened(self, extract, num_features: int, dim: int) -> RowFile:
        """Whitened features (N, d), in a file.

        extract: called with the images that are missing, numbers (n,) from 0 to N-1, and with
        write(first, features), to which it gives theirs, in batches. num_features: their width.
        """
        rows = RowFile(self.folder, "rows", self.num_images, min(dim, num_features))
        if not self._there("rows.pt"):
            needed = 4 * self.num_images * (num_features + rows.shape[1])
            check_space(self.folder, needed, f"the clustering of {self.num_images:,} features")
            features = RowFile(self.folder, "features", self.num_images, num_features)
            self._extract(features, extract)
            fitted = self.folder / "whitening.pt"
            if self._there(fitted.name):
                whitening = Whitening(**load_tensors(fitted))
            else:
                mine = features.read()[_slice(share(self.num_images))]
                whitening = fit_whitening(mine, dim, device=self.device)
                self._save(fitted, vars(whitening))
            chunks = features.read()
            for chunk in rows.mine():
                some = rows.rows(chunk)
                rows.write(some.start, whiten(chunks[_slice(some)], whitening, device=self.device))
                rows.mark(chunk)
                if self.stop.requested:
                    break
            self._leave_if_asked(lambda: not rows.missing())
            self._save(self.folder / "rows.pt", {})
        RowFile(self.folder, "features", 0, num_features).remove()
        return rows

    def _extract(self, features, extract):
        chunks = features.mine()
        some = [features.rows(chunk) for chunk in chunks]
        numbers = np.concatenate([np.arange(rows.start, rows.stop) for rows in some or [range(0)]])

        def write(first, batch):
            at = 0
            while at < len(batch):  # rows of one chunk at a time
                number = int(numbers[first + at])
                end = features.rows(features.chunk_of(number)).stop
                stop = min(len(batch) - at, end - number)
                features.write(number, batch[at : at + stop])
                at += stop
                if number + stop == end:
                    features.mark(features.chunk_of(number))
            if self.stop.requested:
                raise Stopped

        with contextlib.suppress(Stopped):
            if chunks:
                extract(numbers, write)
        self._leave_if_asked(lambda: not features.missing())

    # ============ k-means ============
    def clusters(
        self, rows: RowFile, num_super: int, num_sub: int, iterations: int, seed: int, previous=None
    ) -> tuple[Tensor, Tensor]:
        """First- and second-level clusters (N,), (N,) int64 of the rows.

        Every first-level cluster is split in num_sub, or in as many as it has images. previous: such
        a pair, of the assignment before, whose means k-means then starts from.
        """
        first = self._first_level(rows, num_super, iterations, seed, previous)
        order = first.argsort(stable=True)  # images of cluster 0, of cluster 1, ...
        sizes = first.bincount(minlength=num_super).tolist()
        if min(sizes) == 0:
            raise flags.RunError(
                f"collapse: {sizes.count(0)} of {num_super} first-level clusters have no image, since "
                "features are all alike; lower --lr, or use fewer --super_classes"
            )
        sorted_rows = self._sort(rows, order) if num_super > 1 else rows
        starts = [sum(sizes[:i]) for i in range(num_super)]
        with contextlib.suppress(Stopped):
            for cluster in range(num_super):
                if self.groups and cluster != self.member:
                    continue
                with dist.within(self.groups[cluster] if self.groups else None):
                    if self._there(f"sub-{cluster}.npy"):
                        continue
                    mine = share(sizes[cluster])
                    there = range(starts[cluster] + mine.start, starts[cluster] + mine.stop)
                    before = None
                    if previous is not None:
                        sub = previous[1][order[_slice(there)]]
                        before = sub.where(previous[0][order[_slice(there)]] == cluster, -1)
                    number = (min(num_sub, sizes[cluster]), iterations, (seed, 1 + cluster), before)
                    labels = self._kmeans(sorted_rows, there, *number)
                    if dist.is_main():
                        write_array(self.folder / f"sub-{cluster}.npy", labels)
        paths = [self.folder / f"sub-{i}.npy" for i in range(num_super)]
        self._leave_if_asked(lambda: all(path.exists() for path in paths))
        sub = torch.empty_like(first)
        sub[order] = torch.from_numpy(np.concatenate([np.load(x) for x in paths]).astype(np.int64))
        return first, sub

    def _first_level(self, rows, num_super, iterations, seed, previous):
        path = self.folder / "super.npy"
        if num_super == 1:
            return torch.zeros(self.num_images, dtype=torch.int64)
        if self._there(path.name):
            return torch.from_numpy(np.load(path).astype(np.int64))
        there = share(self.num_images)
        before = None if previous is None else previous[0][_slice(there)]
        labels = self._kmeans(rows, there, num_super, iterations, (seed, 0), before)
        if dist.is_main():
            write_array(path, labels)
        return labels.long()

    def _kmeans(self, rows, there, num_clusters, iterations, seed, before):
        """Clusters of all rows of the group (n,) int32, of which `there` are this process's."""
        if num_clusters == 0:
            return torch.zeros(0, dtype=torch.int32)
        features, name = rows.read()[_slice(there)], f"kmeans-{seed[1]}.pt"
        began = logged = time.perf_counter()
        if self._there(name):
            state = load_tensors(self.folder / name)
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
                write_tensors(self.folder / name, {"step": done, "centroids": centroids.cpu()})
            if self.stop.agreed():
                raise Stopped
            if dist.is_main() and now - logged > LOG_SECONDS:
                logged = now
                logger.info(
                    "k-means %d: iteration %d of %d, %d clusters, eta %s",
                    *(seed[1], done, iterations, num_clusters),
                    duration((now - began) / (done - state["step"]) * (iterations - done)),
                )

        _, labels = euclidean_kmeans(
            *(features, state["centroids"], iterations, "reseed", self.backend),
            **{"device": self.device, "on_step": on_step, "first_step": state["step"]},
        )
        return dist.all_gather_rows(labels.cpu().int())

    def _sort(self, rows, order):
        """The rows in the order of their clusters, so that each cluster's lie together, in a file."""
        file = RowFile(self.folder, "sorted", *rows.shape)
        source = rows.read()
        for chunk in file.mine():
            some = file.rows(chunk)
            file.write(some.start, source[order[_slice(some)]])
            file.mark(chunk)
            if self.stop.requested:
                break
        self._leave_if_asked(lambda: not file.missing())
        return file

    # ============ files ============
    def remove(self) -> None:
        """Delete the files, when their result is saved elsewhere."""
        dist.barrier()
        if dist.is_main():
            shutil.rmtree(self.folder)

    def _there(self, name):
        """Whether a file is there: what the first process of the group sees holds for all."""
        return dist.broadcast_object((self.folder / name).exists())

    def _save(self, path, values):
        if dist.is_main():
            write_tensors(path, {name: x.cpu() for name, x in values.items()})
        dist.barrier()

    def _leave_if_asked(self, done):
        """Wait until all processes have `done` their part; all leave if one was asked to stop."""
        wait_for(done, self.stop, self.folder)
        if self.stop.agreed():
            raise Stopped


def _slice(some: range) -> slice:
    return slice(some.start, some.stop)
