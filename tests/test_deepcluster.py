"""main_deepcluster.py: the loss, the clusters it is trained on, what an epoch draws."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main_deepcluster as deepcluster
from src import dist
from src.labels.agreement import Overlaps
from src.labels.pseudo_labels import PseudoLabels
from tests.gloo import run_ranks


def test_the_loss_is_the_mean_over_crops_and_images_of_the_negative_log_softmax():
    torch.manual_seed(0)
    scores, labels = torch.randn(2 * 5, 7), torch.randint(7, (5,))
    p = torch.softmax(scores.double(), 1)
    expected = [-p[v * 5 + b, labels[b]].log() for v in range(2) for b in range(5)]
    loss = deepcluster.deepcluster_loss(scores, labels)
    assert loss.item() == pytest.approx(sum(expected).item() / 10, abs=1e-6)
    nothing = deepcluster.deepcluster_loss(torch.zeros(5, 7), labels)
    assert nothing.item() == pytest.approx(math.log(7))
    huge = torch.full((5, 7), 3e4, dtype=torch.float16)
    assert deepcluster.deepcluster_loss(huge - 2 * huge * torch.eye(5, 7).half(), labels).isfinite()


def groups_of_features(number=6, members=20, width=24):
    generator = torch.Generator().manual_seed(1)
    centres = 10 * torch.randn(number, width, generator=generator)
    truth = torch.arange(number).repeat(members)
    noise = torch.randn(len(truth), width, generator=generator)
    return centres[truth] + 0.3 * noise, truth


def _clusters(rank, world_size, method):
    features, _ = groups_of_features()
    cut = [len(features) * i // world_size for i in range(world_size + 1)]
    mine = features[cut[rank] : cut[rank + 1]]
    labels, number = deepcluster.cluster_features(
        mine,
        method=method,
        num_clusters=6,
        dim_pca=8,
        iterations=10,
        backend="torch",
        seed=3,
        device="cpu",
    )
    return dist.all_gather_rows(labels.cpu()).tolist(), number


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Kmeans", "PIC"])
def test_clusters_are_those_of_one_process_and_find_what_is_there(method):
    (labels, number), *others = run_ranks(_clusters, 1, method)
    truth = groups_of_features()[1]
    assert Overlaps(torch.tensor(labels), truth).nmi() > 0.8
    assert number == 6 if method == "Kmeans" else 6 <= number < 60
    for world_size in (2, 4):
        assert run_ranks(_clusters, world_size, method) == [(labels, number)] * world_size


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_processes_together_draw_the_same_epoch_uniform_over_clusters(world_size):
    labels = PseudoLabels(1, 120)
    labels.labels[0] = torch.tensor([0] * 90 + [1] * 20 + [3] * 10)
    order = []
    for rank in range(world_size):
        process = SimpleNamespace(rank=rank, world_size=world_size)
        run = SimpleNamespace(iters_per_epoch=10, global_batch=12, process=process)
        drawn = deepcluster.draw_epoch(run, labels, epoch=2, seed=31)
        assert drawn.shape == (10, 12 // world_size)
        order.append(drawn)
    order = np.concatenate(order, 1)
    alone = SimpleNamespace(rank=0, world_size=1)
    run = SimpleNamespace(iters_per_epoch=10, global_batch=12, process=alone)
    assert np.array_equal(order, deepcluster.draw_epoch(run, labels, epoch=2, seed=31))
    shares = np.bincount(labels.labels[0].numpy()[order.reshape(-1)], minlength=4)
    assert shares[2] == 0 and shares[[0, 1, 3]].min() >= 38  # of 40, less one that was cut off
    other = deepcluster.draw_epoch(run, labels, epoch=3, seed=31)
    assert not np.array_equal(order, other)
