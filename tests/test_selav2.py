"""main_selav2: the loss is that of DeepCluster-v2; the assignment phase against the published numbers."""

import pytest
import torch
import torch.nn.functional as F

import main_selav2
from main_selav2 import MemoryBank, PseudoLabels, assign_labels, normalize_prototypes, sela_loss
from tests.gloo import run_ranks
from tests.test_deepclusterv2 import IGNORED, TEMPERATURE, check_loss, problem


def test_loss_and_gradient_equal_the_equations_in_float64():
    check_loss(sela_loss)
    scores, labels = problem()
    assert sela_loss(scores, torch.full_like(labels, IGNORED), TEMPERATURE).item() == 0


def test_the_assignment_phase_equals_selas(golden, monkeypatch):
    """Each head is assigned by its own embeddings and prototypes; here these give the golden logits."""
    data = golden("self_label")
    logits = torch.from_numpy(data["lamb25_logits"])  # (heads, N, K)
    heads, num_images, num_prototypes = logits.shape
    bank = MemoryBank(heads, num_images, 30, num_prototypes, torch.device("cpu"))
    bank._embeddings = bank._embeddings.double()
    bank.push(torch.arange(num_images), logits)
    eye = torch.eye(num_prototypes, dtype=torch.float64)
    found = assign_labels(
        bank,
        [eye] * heads,
        temperature=1.0,
        epsilon=1 / float(data["lamb25_lambda"]),
        tolerance=0.1,
    )
    assert (found.numpy() == data["lamb25_labels"]).all()


def _assigned(rank, world_size):
    generator = torch.Generator().manual_seed(5)
    rows = F.normalize(torch.randn(2, 48, 6, generator=generator), dim=2)
    prototypes = [torch.randn(k, 6, generator=generator) for k in (5, 4)]
    normalize_prototypes(prototypes)
    bank = MemoryBank(2, 60, 24 // world_size, 6, torch.device("cpu"))
    for batch in range(2):
        first = batch * 24 + rank * bank.batch_size
        mine = slice(first, first + bank.batch_size)
        bank.push(torch.arange(48)[mine], rows[:, mine])
    labels = PseudoLabels(2, 48)
    found = assign_labels(bank, prototypes, temperature=0.1, epsilon=0.05, tolerance=0.1)
    labels.replace(bank.indices, found, 0)
    return labels.labels.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_labels_are_the_same_on_any_number_of_processes(world_size):
    expected = _assigned(0, 1)
    assert all(len(set(head)) > 2 for head in expected.tolist())
    assert all((found == expected).all() for found in run_ranks(_assigned, world_size))


def test_prototypes_are_projected_to_the_sphere():
    prototypes = [torch.randn(5, 3) * 7, torch.randn(4, 3) / 9]
    normalize_prototypes(prototypes)
    for weight in prototypes:
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))
    assert main_selav2.IGNORED == IGNORED
