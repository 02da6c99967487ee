"""main_simclr's mathematics: the loss from Eq. 7, its gradient across processes, and its health."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import main_simclr
from main_simclr import nt_xent
from src import dist
from tests.gloo import run_ranks


def embeddings(num_crops, batch_size, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_crops * batch_size, dim, dtype=torch.float64, generator=generator)
    return F.normalize(z, dim=1)


def equation_7(embedding, num_crops, temperature):
    """Eq. 7 of the SwAV paper, term by term: (M * B, D) float64, crop-major."""
    s = embedding @ embedding.t() / temperature
    batch_size, terms = len(embedding) // num_crops, []
    for i in range(len(embedding)):
        image = i % batch_size
        negatives = [n for n in range(len(embedding)) if n % batch_size != image]
        for p in range(image, len(embedding), batch_size):
            if p != i:
                candidates = torch.stack([s[i, p], *(s[i, n] for n in negatives)])
                terms.append(candidates.logsumexp(0) - s[i, p])
    return sum(terms) / (len(embedding) * (num_crops - 1))


def value_and_gradient(loss, embedding, *arguments):
    leaf = embedding.clone().requires_grad_()
    value = loss(leaf, *arguments)
    value.backward()
    return value.detach(), leaf.grad


# ============ the equation ============
@pytest.mark.parametrize("num_crops, batch_size", [(2, 2), (2, 7), (3, 4), (6, 5), (4, 2)])
@pytest.mark.parametrize("temperature", [0.005, 0.1, 100])
def test_value_and_gradient_equal_equation_7_in_float64(num_crops, batch_size, temperature):
    z = embeddings(num_crops, batch_size)
    expected, exact = value_and_gradient(equation_7, z, num_crops, temperature)
    loss, gradient = value_and_gradient(nt_xent, z.float(), num_crops, temperature)
    assert loss.dtype == torch.float32
    # a cosine is rounded to 6e-8, and divided by the temperature
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    tolerance = 2e-5 * exact.abs().max().item()
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=tolerance)


def test_two_crops_give_the_nt_xent_loss_of_simclr():
    """Cross-entropy among the 2B - 1 other crops: these are one positive and all the negatives, so
    that both denominators hold the same terms."""
    z = embeddings(2, 8)
    s = (z @ z.t() / 0.3).fill_diagonal_(-math.inf)
    classic = F.cross_entropy(s, torch.arange(16).roll(8))
    torch.testing.assert_close(nt_xent(z, 2, 0.3).double(), classic, rtol=1e-6, atol=0)


def test_another_positive_is_not_in_the_denominator():
    """Three equal crops of each of two opposite images: only the two images' distance is left."""
    axis = torch.eye(3)[0]
    z = torch.stack([axis, -axis] * 3)
    expected = math.log1p(3 * math.exp(-2 / 0.5))  # the other two positives would add 1
    assert nt_xent(z, 3, 0.5).item() == pytest.approx(expected, rel=1e-5)


def test_the_order_of_the_images_and_of_the_crops_changes_nothing():
    z = embeddings(3, 8).view(3, 8, -1)
    loss = nt_xent(z.flatten(0, 1), 3, 0.1)
    images = z[:, torch.randperm(8, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(nt_xent(images.flatten(0, 1), 3, 0.1), loss)
    torch.testing.assert_close(nt_xent(z.flip(0).flatten(0, 1), 3, 0.1), loss)


@pytest.mark.parametrize("num_crops, batch_size, temperature", [(2, 2, 0.1), (4, 16, 0.005)])
def test_identical_embeddings_give_the_logarithm_of_one_and_all_negatives(
    num_crops, batch_size, temperature
):
    z = embeddings(1, 1).expand(num_crops * batch_size, -1)
    ceiling = math.log(1 + num_crops * (batch_size - 1))
    assert nt_xent(z, num_crops, temperature).item() == pytest.approx(ceiling, rel=1e-5)


# ============ the extremes ============
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_also_under_autocast(dtype):
    z = embeddings(3, 4).to(dtype)
    expected, exact = value_and_gradient(equation_7, z.double(), 3, 0.1)
    z.requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = nt_xent(z, 3, 0.1)
    loss.backward()
    gradient = z.grad
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    once = torch.finfo(dtype).eps  # rounded to the embedding's type at the end, and once only
    torch.testing.assert_close(gradient.double(), exact, rtol=once, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.005, 100])
def test_opposite_and_equal_embeddings_give_finite_gradients(temperature):
    axis = torch.eye(4)[0]
    for z in (torch.stack([axis, axis, -axis, -axis]), torch.stack([axis, -axis, axis, -axis])):
        loss, gradient = value_and_gradient(nt_xent, z, 2, temperature)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()
        expected = equation_7(z.double(), 2, temperature)  # 400 and 1e-174 at 0.005
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-30)


# ============ several processes ============
class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x):
        return F.normalize(self.layers(x), dim=1)


def _step_of_my_images(rank, world_size, crops):
    """The loss averaged over processes, and the gradients of the weights: crops (M, images, 5)."""
    mine = torch.from_numpy(crops).chunk(world_size, 1)[rank]
    network = Small()
    network = DistributedDataParallel(network) if world_size > 1 else network
    loss = nt_xent(network(mine.flatten(0, 1)), len(mine), 0.1)
    loss.backward()
    mean = dist.all_reduce_sum(loss.detach()) / world_size
    return mean.item(), [p.grad.numpy() for p in network.parameters()]


@pytest.mark.parametrize("world_size, num_images, num_crops", [(2, 8, 3), (4, 8, 2), (4, 4, 3)])
def test_processes_in_ddp_equal_one_process_on_the_whole_batch(world_size, num_images, num_crops):
    crops = np.random.default_rng(0).standard_normal((num_crops, num_images, 5)).astype(np.float32)
    loss, gradients = run_ranks(_step_of_my_images, 1, crops)[0]
    for other, theirs in run_ranks(_step_of_my_images, world_size, crops):
        assert other == pytest.approx(loss, rel=1e-5)
        for ours, gradient in zip(gradients, theirs, strict=True):
            np.testing.assert_allclose(gradient, ours, rtol=1e-4, atol=1e-6)


def _gather(rank, world_size):
    rows = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = dist.all_gather_with_gradient(rows)
    weights = torch.arange(gathered.numel()).view_as(gathered) * (rank + 1.0)
    (gathered * weights).sum().backward()
    return gathered.detach().numpy(), rows.grad.numpy()


def test_gathered_rows_give_back_the_gradients_of_all_processes():
    everything = np.arange(12.0).reshape(4, 3)
    for rank, (gathered, gradient) in enumerate(run_ranks(_gather, 2)):
        np.testing.assert_array_equal(gathered, np.repeat([[0.0] * 3, [1.0] * 3], 2, 0))
        np.testing.assert_array_equal(gradient, 3 * everything[2 * rank : 2 * rank + 2])
    alone = torch.zeros(2, 3, requires_grad=True)
    assert dist.all_gather_with_gradient(alone) is alone


# ============ health ============
def _cosines(rank, world_size, z):
    cosines = main_simclr.pair_cosines(torch.from_numpy(z).chunk(world_size, 1)[rank])
    return [cosine.item() for cosine in cosines]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_mean_cosines_are_those_of_all_pairs_of_all_processes(world_size):
    z = embeddings(3, 4).view(3, 4, -1)
    pairs = torch.einsum("mbd,ncd->mbnc", z, z)
    same = torch.eye(4, dtype=torch.bool)[None, :, None].expand(3, 4, 3, 4)
    itself = torch.eye(12, dtype=torch.bool).view(3, 4, 3, 4)
    expected = (pairs[same & ~itself].mean().item(), pairs[~same].mean().item())
    for found in run_ranks(_cosines, world_size, z.numpy()):
        assert found == pytest.approx(expected, abs=1e-12)


def lines(count=10, **values):
    return [{"loss": 3.0, "embedding_std": 0.9, **values} for _ in range(count)]


def test_a_collapse_is_named_after_ten_lines_and_not_before():
    ceiling = math.log(1 + 508)
    assert main_simclr.diagnose(lines(), 508) is None
    for values in ({"embedding_std": 0.01}, {"loss": ceiling + 0.004}, {"loss": ceiling - 0.004}):
        found = main_simclr.diagnose(lines(**values), 508)
        assert "--base_lr" in found.sentence and "--temperature" in found.sentence
        assert main_simclr.diagnose(lines(9, **values), 508) is None
        assert main_simclr.diagnose([*lines(**values), *lines(1)], 508) is None
    assert "same embedding" in main_simclr.diagnose(lines(embedding_std=0.01), 508).sentence
    assert main_simclr.diagnose(lines(loss=ceiling - 0.1), 508) is None
