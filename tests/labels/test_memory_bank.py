"""src.labels.memory_bank: rows by their number in the epoch, for any number of processes."""

import logging

import numpy as np
import pytest
import torch

from src import dist
from src.labels import memory_bank, pseudo_labels
from src.labels.memory_bank import MemoryBank
from src.labels.pseudo_labels import IGNORED, PseudoLabels
from src.run.log import RunLog, read_log
from tests.gloo import run_ranks

GLOBAL, BATCHES, CROPS, DIM = 8, 5, 2, 3  # images in a batch of all processes, batches an epoch
ORDER = np.random.default_rng(0).permutation(47)[: GLOBAL * BATCHES]  # samples, as an epoch visits


def embedding_of(samples):
    """(crops, n, D), different for every sample and crop."""
    samples = torch.as_tensor(samples).double()
    crop, dim = torch.arange(CROPS).view(-1, 1, 1), torch.arange(DIM)
    return torch.sin(samples.view(1, -1, 1) * (1 + dim) + crop).float()


def filled(rank, world_size, batches=BATCHES):
    size = GLOBAL // world_size
    bank = MemoryBank(CROPS, (BATCHES + 1) * size, size, DIM, torch.device("cpu"))
    for batch in range(batches):
        first = batch * GLOBAL + rank * size
        samples = torch.from_numpy(ORDER[first : first + size])
        bank.push(samples, embedding_of(samples))
    return bank


def check_rows(bank):
    """Each row is the embedding of the sample that has its number in the epoch."""
    assert torch.equal(bank.indices, torch.from_numpy(ORDER)[bank.positions])
    assert torch.equal(bank.embeddings, embedding_of(bank.indices))


def _saved(rank, world_size, batches=(BATCHES, 2, 0)):
    memory_bank.GATHERED = CROPS * DIM * GLOBAL  # one batch at a time
    saved = []
    for number in batches:
        bank = filled(rank, world_size, number)
        check_rows(bank)
        saved.append({name: x.numpy() for name, x in bank.state_dict().items()})
    return saved


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_saved_rows_are_in_the_order_of_the_epoch(world_size, monkeypatch):
    monkeypatch.setattr(memory_bank, "GATHERED", memory_bank.GATHERED)
    main, *others = run_ranks(_saved, world_size)
    for batches, saved in zip((BATCHES, 2, 0), main, strict=True):
        assert (saved["indices"] == ORDER[: batches * GLOBAL]).all()
        expected = embedding_of(saved["indices"]).transpose(0, 1)
        assert (saved["embeddings"] == expected.numpy()).all()
    # one process writes, the others need not hold it
    assert all(len(saved["indices"]) == 0 for other in others for saved in other)


GLOBAL_BATCHES = (8, 12, 44)


def _taken_over(rank, world_size, state):
    found = []
    for global_batch in GLOBAL_BATCHES:
        size = global_batch // world_size
        bank = MemoryBank(CROPS, (47 // global_batch + 1) * size, size, DIM, torch.device("cpu"))
        bank.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})
        check_rows(bank)
        positions = bank.positions.tolist()
        found.append((positions, {name: x.numpy() for name, x in bank.state_dict().items()}))
        bank.keep(3)
        assert bank.positions.tolist() == positions[:3]
        check_rows(bank)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_processes_and_any_batch_takes_all_rows_over(world_size):
    state = _saved(0, 1, [BATCHES])[0]
    ranks = run_ranks(_taken_over, world_size, state)
    for found in zip(*ranks, strict=True):
        positions = sum((numbers for numbers, _ in found), [])
        assert sorted(positions) == list(range(GLOBAL * BATCHES))
        again = found[0][1]
        assert all((again[name] == state[name]).all() for name in state)


def test_a_process_goes_on_with_exactly_its_own_rows():
    bank, again = filled(0, 1, 3), filled(0, 1, 0)
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.embeddings, bank.embeddings)
    assert torch.equal(again.indices, bank.indices)


def _labels(rank, world_size):
    labels = PseudoLabels(2, 47)
    first = filled(rank, world_size)
    assert labels.replace(first.indices, torch.stack([first.indices, -first.indices]), 0) is None
    second = filled(rank, world_size, 2)
    before = labels.replace(second.indices, torch.stack([second.indices + 1] * 2), 3)
    assert labels.epoch == 3
    again = PseudoLabels(2, 47)
    again.load_state_dict(labels.state_dict())
    assert torch.equal(again.labels, labels.labels) and again.epoch == 3
    found = labels.of(torch.tensor([int(ORDER[0]), int(ORDER[-1])]), torch.device("cpu"))
    assert found.tolist() == [[ORDER[0] + 1, IGNORED]] * 2
    return before.numpy(), labels.labels.numpy()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_pseudo_labels_reach_all_processes_and_the_others_are_ignored(world_size):
    for before, now in run_ranks(_labels, world_size):
        expected = np.full((2, 47), IGNORED)
        expected[0, ORDER], expected[1, ORDER] = ORDER, -ORDER
        assert (before == expected).all()
        expected = np.full((2, 47), IGNORED)
        expected[:, ORDER[: 2 * GLOBAL]] = ORDER[: 2 * GLOBAL] + 1
        assert (now == expected).all()


class FakeRun:
    iters_per_epoch, arguments = 10, {"epochs": 5}

    def __init__(self, folder):
        self.log = RunLog(folder, tensorboard=False)


def test_the_health_of_an_assignment_is_logged_after_the_epoch_it_follows(tmp_path, caplog):
    run = FakeRun(tmp_path)
    labels = torch.tensor([[0, 0, 1, IGNORED]])
    with caplog.at_level(logging.INFO):
        pseudo_labels.report_assignment(
            run, labels, None, None, num_clusters=[3], epoch=0, seconds=0.5
        )
        for line in ({"epoch_float": 1.0, "loss": 2.0}, {"epoch_float": 1.0, "knn": 50.0}):
            run.log.write(0, {"epoch": 0, "iteration": 9, **line})
        truth = torch.tensor([1, 1, 0, 0])
        for _ in range(2):  # the second time after a resume
            pseudo_labels.report_assignment(
                run, labels, labels, truth, num_clusters=[3], epoch=1, seconds=0.5
            )
    lines = read_log(tmp_path)
    assert [sorted({"loss", "knn", "nmi_labels"} & line.keys()) for line in lines] == [
        *([], ["loss"], ["knn"], ["nmi_labels"])
    ]
    assert lines[-1]["nmi_previous"] == lines[-1]["nmi_labels"] == 1
    assert lines[-1]["iteration"] == 10 and lines[-1]["cluster_max"] == 2
    text = caplog.records[-1].getMessage()
    assert "epoch 2/5 clusters 3 of 3 images" in text and "NMI 1.00 with the labels" in text
    assert dist.world_size() == 1
