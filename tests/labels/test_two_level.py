"""Two-level clusters and row files: the same on any number of processes, and after any stop."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src import dist
from src.cluster.kmeans import euclidean_kmeans, initial_centroids
from src.cluster.pca import fit_whitening, whiten
from src.errors import RunError, Stopped
from src.labels import row_file
from src.labels.row_file import RowFile
from src.labels.super_classes import cluster_groups
from src.labels.two_level import TwoLevelClustering
from tests.gloo import run_ranks

N, WIDTH, DIM, SUPER, SUB, ITERATIONS, SEED = 203, 12, 6, 2, 9, 4, 5
CPU = torch.device("cpu")


def features():
    generator = torch.Generator().manual_seed(3)
    centres = 3 * torch.randn(12, WIDTH, generator=generator)
    noise = torch.randn(N, WIDTH, generator=generator)
    return centres[torch.randint(12, (N,), generator=generator)] + noise


class Stop:
    """Asks to stop at the n-th question; all processes count alike."""

    def __init__(self, after=10**9):
        self.left = after

    @property
    def requested(self):
        self.left -= 1
        return self.left < 0

    def agreed(self):
        asked = torch.tensor(int(self.left < 0))
        return bool(dist.all_reduce_max(asked))


def cluster(folder, rank=0, world_size=1, stop=None, num_super=SUPER, previous=None, asked=None):
    """The clusters by TwoLevelClustering, as lists."""
    row_file.CHUNK = 16
    groups = cluster_groups(num_super)
    member = rank * num_super // world_size
    clustering = TwoLevelClustering(
        Path(folder) / "clustering",
        {"seed": SEED, "m": num_super},
        num_images=N,
        groups=groups,
        member=member,
        device=CPU,
        backend="torch",
        stop=stop or Stop(),
    )

    def extract(numbers, write):
        for first in range(0, len(numbers), 7):
            if asked is not None:
                asked.extend(numbers[first : first + 7])
            write(first, features()[numbers[first : first + 7]])

    rows = clustering.whitened(extract, WIDTH, DIM)
    found = clustering.clusters(
        rows,
        num_super=num_super,
        num_sub=SUB,
        iterations=ITERATIONS,
        seed=SEED,
        previous=previous,
    )
    return [labels.tolist() for labels in found]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(row_file, "CHUNK", 16)


def plain(num_super=SUPER):
    """Two k-means in memory, of features whitened in one piece."""
    rows = whiten(features(), fit_whitening(features(), DIM))

    def kmeans(rows, number, *seed):
        draw = int(np.random.SeedSequence(seed).generate_state(1)[0])
        return euclidean_kmeans(rows, initial_centroids(rows, number, draw), ITERATIONS, "reseed")[
            1
        ]

    first = kmeans(rows, num_super, SEED, 0) if num_super > 1 else torch.zeros(N, dtype=torch.int64)
    sub = torch.empty(N, dtype=torch.int64)
    for c in range(num_super):
        sub[first == c] = kmeans(rows[first == c], SUB, SEED, 1 + c)
    return [first.tolist(), sub.tolist()]


def _clustered(rank, world_size, folder, num_super):
    return cluster(folder, rank, world_size, num_super=num_super)


@pytest.mark.slow
@pytest.mark.parametrize("num_super", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_number_of_processes_finds_the_clusters_of_two_plain_kmeans(
    world_size, num_super, tmp_path
):
    expected = plain(num_super)
    assert run_ranks(_clustered, world_size, str(tmp_path), num_super) == [expected] * world_size


@pytest.mark.slow
def test_a_stop_at_any_moment_loses_nothing_but_time():
    expected = plain()
    stops = 0
    for after in range(0, 60, 3):
        with tempfile.TemporaryDirectory() as folder:
            asked = []
            try:
                cluster(folder, stop=Stop(after), asked=asked)
            except Stopped:
                stops += 1
            again = []
            assert cluster(folder, asked=again) == expected
            assert len(asked) + len(again) < N + 2 * row_file.CHUNK  # a chunk is not made twice
    assert stops > 5


def test_kmeans_goes_on_from_its_last_iteration(tmp_path, monkeypatch):
    from src.labels import two_level

    done = []

    def killed_in_the_third(*args, on_step, **options):
        def step(number, centroids):
            on_step(number, centroids)
            done.append(number)
            if len(done) == 3:
                raise KeyboardInterrupt

        return euclidean_kmeans(*args, on_step=step, **options)

    monkeypatch.setattr(two_level, "euclidean_kmeans", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        cluster(tmp_path)
    assert cluster(tmp_path) == plain()
    assert done[:4] == [0, 1, 2, 3]


def _stopped_then_whole(rank, world_size, folder, after):
    try:
        cluster(folder, rank, world_size, stop=Stop(after if rank == 0 else 10**9))
    except Stopped:
        return "stopped"
    return "whole"


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_another_number_of_them_goes_on(tmp_path):
    assert run_ranks(_stopped_then_whole, 2, str(tmp_path), 3) == ["stopped"] * 2
    assert (tmp_path / "clustering" / "features.npy").exists()
    assert run_ranks(_clustered, 4, str(tmp_path), SUPER) == [plain()] * 4


def test_files_of_another_clustering_are_not_used(tmp_path, caplog):
    with pytest.raises(Stopped):
        cluster(tmp_path, stop=Stop(3), num_super=4)
    assert cluster(tmp_path) == plain()


def test_a_warm_restart_begins_with_the_means_of_the_clusters_before(tmp_path):
    before = [torch.tensor(labels) for labels in plain()]
    found = cluster(tmp_path, previous=before)
    same = np.mean(np.array(found[1]) == np.array(plain()[1]))
    assert same > 0.8 and found != plain()  # the same numbers for the same clusters, moved on


def test_a_cluster_with_fewer_images_than_sub_classes_gives_each_its_own(tmp_path, monkeypatch):
    first = torch.zeros(N, dtype=torch.int64)
    first[[3, 50, 90]] = 1
    monkeypatch.setattr(TwoLevelClustering, "_first_level", lambda *args, **options: first)
    found = cluster(tmp_path)
    assert sorted(np.array(found[1])[[3, 50, 90]].tolist()) == [0, 1, 2]


def test_a_disk_that_is_too_small_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    asked = []
    with pytest.raises(ValueError, match="--dump_path has .* GB free, .* needs 1.46e-05 GB"):
        cluster(tmp_path, asked=asked)
    assert not asked


def test_features_that_are_all_alike_are_a_collapse(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.labels.test_two_level.features", lambda: torch.ones(N, WIDTH))
    with pytest.raises(RunError, match="collapse: 1 of 2 first-level clusters"):
        cluster(tmp_path)


# ============ files of rows ============
def test_a_torn_line_of_the_list_of_chunks_counts_for_nothing(tmp_path):
    file = RowFile(tmp_path, "x", 50, 3)
    file.write(16, torch.ones(16, 3))
    file.mark(1)
    with open(tmp_path / "x.0.done", "a") as marks:
        marks.write("\n3")
    assert file.missing() == [0, 2, 3]
    file.mark(2)  # what is torn spoils no line after it
    assert file.missing() == [0, 3] and list(file.rows(3)) == [48, 49]
    assert file.read().sum() == 48


def test_the_matrix_on_disk_is_read_by_numpy_and_takes_no_memory_before(tmp_path):
    file = RowFile(tmp_path, "x", 10**6, 256)  # 1 GB
    assert (tmp_path / "x.npy").stat().st_blocks * 512 < 10**6
    file.write(10**6 - 1, torch.arange(256.0)[None])
    assert np.load(tmp_path / "x.npy", mmap_mode="r")[-1].tolist() == list(range(256))


def test_a_matrix_larger_than_the_memory_can_be_mapped(tmp_path):
    rows = 10**7  # of 16 kB: 160 GB, of which nothing is on the disk
    file = RowFile(tmp_path, "x", rows, 4096)
    file.write(rows - 1, torch.ones(1, 4096))
    assert file.read()[-1].sum() == 4096


def test_an_empty_matrix_can_be_read(tmp_path):
    assert RowFile(tmp_path, "x", 0, 4).read().shape == (0, 4)


def test_nobody_waits_for_a_process_that_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(row_file, "time", SimpleNamespace(sleep=lambda seconds: None))
    nobody_asked = SimpleNamespace(requested=False)
    locks = [tmp_path / "process1.lock"]
    with pytest.raises(RunError, match="another process of the run has ended in the clustering"):
        row_file.wait_for(lambda: False, nobody_asked, tmp_path, locks=locks)
    row_file.wait_for(lambda: True, nobody_asked, tmp_path, locks=locks)
