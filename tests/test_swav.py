"""main_swav's mathematics: the loss, the codes and the queue, golden and across processes."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import main_swav
from main_swav import Queue, assign_codes, normalize_prototypes, swav_loss
from src import dist
from src.losses import swapped_cross_entropy
from tests import reference
from tests.gloo import run_ranks

CROPS, ASSIGN, TEMPERATURE = [2, 6], [0, 1], 0.1


def step(embedding, prototypes, queue, crops_for_assign=ASSIGN, hard=False):
    """One training step's loss, gradient and codes for embeddings (V, B, D), queue pushed after."""
    scores = (embedding @ prototypes.t()).requires_grad_()  # (V, B, K)
    codes = assign_codes(
        scores.detach(), prototypes, crops_for_assign, queue, hard, epsilon=0.05, iterations=3
    )
    loss = swav_loss(scores.flatten(0, 1), codes, CROPS, crops_for_assign, TEMPERATURE)
    loss.backward()
    if queue is not None:
        queue.push(embedding[crops_for_assign])
    return loss.item(), scores.grad.flatten(0, 1), torch.stack(codes)


def tensors(golden, *names):
    arrays = golden("swav_loss")
    return [torch.from_numpy(arrays[name]) for name in names]


@pytest.mark.parametrize("case, crops_for_assign", [("nq", [0, 1]), ("nq1", [1])])
def test_loss_gradient_and_codes_without_queue_equal_the_golden_step(
    golden, case, crops_for_assign
):
    embedding, prototypes = tensors(golden, "nq_embedding", "prototypes_normalized")
    loss, gradient, codes = step(
        embedding.unflatten(0, (8, -1)), prototypes, None, crops_for_assign
    )
    arrays = golden("swav_loss")
    np.testing.assert_allclose(loss, arrays[f"{case}_loss"][0], atol=2e-5)
    np.testing.assert_allclose(gradient, arrays[f"{case}_grad_scores"], atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(codes, arrays[f"{case}_assign"], atol=1e-5)


def test_the_published_signature_takes_the_golden_scores(golden):
    scores, assignments = tensors(golden, "nq_scores", "nq_assign")
    loss = swav_loss(scores, list(assignments), CROPS, ASSIGN, TEMPERATURE)
    np.testing.assert_allclose(loss, golden("swav_loss")["nq_loss"][0], atol=2e-5)
    plain = reference.swav_loss(scores.numpy(), assignments.numpy(), CROPS, ASSIGN, TEMPERATURE)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)


def test_a_filling_queue_equals_the_golden_steps(golden):
    arrays = golden("swav_loss")
    embeddings, prototypes = tensors(golden, "q_embedding", "prototypes_normalized")
    queue = Queue(2, 24, 16, batch_size=8, device="cpu")
    for t, embedding in enumerate(embeddings):
        np.testing.assert_array_equal(queue.embeddings, arrays["q_states"][t])
        assert queue.full == (arrays["q_rows_into_sinkhorn"][t, 0] == 32)
        loss, gradient, codes = step(embedding.unflatten(0, (8, -1)), prototypes, queue)
        np.testing.assert_allclose(loss, arrays["q_loss"][t], atol=2e-5)
        np.testing.assert_allclose(gradient, arrays["q_grad_scores"][t], atol=1e-6, rtol=1e-4)
        np.testing.assert_allclose(codes, arrays["q_assign"][t], atol=1e-5)
    np.testing.assert_array_equal(queue.embeddings, arrays["q_states"][-1])


def test_a_full_queue_equals_the_golden_steps(golden):
    arrays = golden("swav_loss")
    start, embeddings, prototypes = tensors(
        golden, "qf_queue", "qf_embedding", "prototypes_normalized"
    )
    queue = Queue(2, 24, 16, batch_size=8, device="cpu")
    queue.load_state_dict({"embeddings": start, "num_rows": 24})
    for t, embedding in enumerate(embeddings):
        loss, gradient, codes = step(embedding.unflatten(0, (8, -1)), prototypes, queue)
        np.testing.assert_allclose(loss, arrays["qf_loss"][t], atol=2e-5)
        np.testing.assert_allclose(gradient, arrays["qf_grad_scores"][t], atol=1e-6, rtol=1e-4)
        np.testing.assert_allclose(codes, arrays["qf_assign"][t], atol=1e-5)
        np.testing.assert_array_equal(queue.embeddings, arrays["qf_states"][t + 1])


def test_an_overflow_of_half_precision_does_not_stay_in_the_queue():
    queue = Queue(2, 4, 3, batch_size=2, device="cpu")
    for worst in (float("nan"), float("inf")):
        embeddings = torch.ones(2, 2, 3, dtype=torch.float16)
        embeddings[0, 1] = worst
        queue.push(embeddings)
    assert queue.full and torch.equal(queue.embeddings[0, :, 0], torch.tensor([1.0, 0, 1, 0]))
    assert (queue.embeddings[1] == 1).all()


def test_prototypes_are_normalised_in_place(golden):
    raw, expected = tensors(golden, "prototypes_raw", "prototypes_normalized")
    raw.requires_grad_()
    normalize_prototypes([raw])
    torch.testing.assert_close(raw.detach(), expected)


def test_hard_codes_have_a_single_one_where_the_soft_code_is_largest(golden):
    embedding, prototypes = tensors(golden, "nq_embedding", "prototypes_normalized")
    views = embedding.unflatten(0, (8, -1))
    soft = step(views, prototypes, None)[2]
    hard = step(views, prototypes, None, hard=True)[2]
    assert torch.equal(hard.sum(-1), torch.ones(2, 8)) and torch.equal(
        hard.max(-1)[0], hard.sum(-1)
    )
    assert torch.equal(hard.argmax(-1), soft.argmax(-1))


def test_the_code_of_a_crop_is_not_predicted_from_that_crop():
    scores = torch.randn(2 * 4, 5, requires_grad=True)
    swav_loss(scores, [torch.full((4, 5), 0.2)], [2], [0], 0.1).backward()
    assert scores.grad[:4].abs().max() < 1e-7 < scores.grad[4:].abs().max()


# ============ several processes ============
def _train_steps(rank, world_size, embeddings, prototypes, sizes, length):
    """Loss, gradients of the prototypes and the queue of this rank's rows, over steps."""
    start = sum(sizes[:rank])
    prototypes = torch.from_numpy(prototypes).requires_grad_()
    queue = Queue(2, length, embeddings.shape[-1], sizes[rank], "cpu") if length else None
    total = sum(sizes)
    losses, gradients, codes_of_steps = [], [], []
    for embedding in torch.from_numpy(embeddings):
        mine = embedding[:, start : start + sizes[rank]]  # (V, b, D)
        scores = mine @ prototypes.t()
        codes = assign_codes(
            scores.detach(), prototypes.detach(), ASSIGN, queue, False, epsilon=0.05, iterations=3
        )
        loss = swav_loss(scores.flatten(0, 1), codes, CROPS, ASSIGN, TEMPERATURE)
        prototypes.grad = None
        loss.backward()
        if queue is not None:
            queue.push(mine[ASSIGN])
        weight = sizes[rank] / total  # a mean over processes weighted by their samples
        losses.append(dist.all_reduce_sum(loss.detach() * weight).item())
        gradients.append(dist.all_reduce_sum(prototypes.grad * weight).numpy())
        codes_of_steps.append(torch.stack(codes).numpy())
    state = queue.state_dict() if queue else None
    stored = state["embeddings"].numpy() if queue else None
    return losses, gradients, codes_of_steps, stored, state and state["num_rows"]


@pytest.mark.parametrize(
    "sizes, length",
    [((8, 8), 0), ((4, 4, 4, 4), 0), ((11, 5), 0), ((7, 1, 6, 2), 0), ((8, 8), 32), ((4,) * 4, 32)],
)
def test_processes_equal_one_process_on_the_whole_batch(sizes, length):
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((4, 8, 16, 6)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    prototypes = rng.standard_normal((9, 6)).astype(np.float32)
    prototypes /= np.linalg.norm(prototypes, axis=-1, keepdims=True)
    arguments = (embeddings, prototypes)
    one = run_ranks(_train_steps, 1, *arguments, (16,), length)[0]
    ranks = run_ranks(_train_steps, len(sizes), *arguments, sizes, length)
    for rank in ranks:
        np.testing.assert_allclose(rank[0], one[0], rtol=1e-5)
        np.testing.assert_allclose(rank[1], one[1], atol=1e-6, rtol=1e-4)
        if length:  # the same embeddings, in the order of their age
            np.testing.assert_array_equal(rank[3], one[3])
            assert rank[4] == one[4] == 64
    for t in range(4):
        together = np.concatenate([rank[2][t] for rank in ranks], axis=1)
        np.testing.assert_allclose(together, one[2][t], atol=1e-5)


def _load_and_save(rank, world_size, state, batch_size):
    queue = Queue(2, 24, 3, batch_size, "cpu")
    queue.load_state_dict({"embeddings": torch.from_numpy(state), "num_rows": 40})
    assert queue.embeddings.shape == (2, 24 // world_size, 3) and queue.full
    again = queue.state_dict()
    return again["embeddings"].numpy(), again["num_rows"]


@pytest.mark.parametrize("world_size, batch_size", [(1, 8), (2, 4), (4, 2)])
def test_a_saved_queue_goes_on_in_another_number_of_processes(world_size, batch_size):
    state = np.arange(2 * 24 * 3, dtype=np.float32).reshape(2, 24, 3)
    for embeddings, num_rows in run_ranks(_load_and_save, world_size, state, batch_size):
        np.testing.assert_array_equal(embeddings, state)
        assert num_rows == 40


def test_a_shorter_queue_keeps_the_newest_rows():
    state = {"embeddings": torch.arange(48.0).view(2, 24, 1), "num_rows": 24}
    shorter = Queue(2, 8, 1, 8, "cpu")
    shorter.load_state_dict(state)
    assert torch.equal(shorter.embeddings, state["embeddings"][:, :8]) and shorter.full


def test_normalised_scores_stay_within_the_bound_given_to_sinkhorn():
    embedding = F.normalize(torch.randn(1000, 128), dim=1)
    prototypes = F.normalize(torch.randn(300, 128), dim=1)
    assert (embedding @ prototypes.t()).abs().max() <= 1 + 1e-5


HEALTHY = {
    "loss": 3.0,
    "code_entropy": 1.0,
    "prototypes_used": 40,
    "embedding_std": 0.9,
    "batch": 256,
}


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"embedding_std": 0.01}, "same embedding"),
        ({"loss": math.log(60) + 1e-4}, "stays at ln\\(K\\)"),
        ({"code_entropy": math.log(60)}, "codes are uniform"),
        ({"prototypes_used": 1.5}, "only 1.5 of 60"),
    ],
)
def test_each_collapse_is_named_with_the_flags_that_help(change, words):
    found = main_swav.diagnose([{**HEALTHY, **change}] * 10, 60)
    if words is None:
        assert found is None
    else:
        assert re.search(words, found.sentence) and "--" in found.sentence


def test_a_run_that_recovers_or_has_just_begun_is_not_diagnosed():
    bad = {**HEALTHY, "embedding_std": 0.01}
    assert main_swav.diagnose([bad] * 9, 60) is None
    assert main_swav.diagnose([bad] * 9 + [HEALTHY], 60) is None


@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_the_plain_loss_equals_the_fused_one_in_value_and_gradient(temperature):
    torch.manual_seed(0)
    crops, batch_size, num_prototypes = [2, 2], 8, 30
    values = torch.rand(sum(crops) * batch_size, num_prototypes) * 2 - 1
    codes = [torch.softmax(torch.randn(batch_size, num_prototypes), 1) for _ in range(2)]
    plain, fused = (values.clone().requires_grad_() for _ in range(2))
    loss = swav_loss(plain, codes, crops, [0, 1], temperature)
    views = fused.view(sum(crops), batch_size, num_prototypes)
    num_pairs = 2 * (sum(crops) - 1)
    other = swapped_cross_entropy(views, codes, [0, 1], temperature, weight=1 / num_pairs)
    loss.backward()
    other.backward()
    assert loss.item() == pytest.approx(other.item(), rel=1e-6)
    torch.testing.assert_close(plain.grad, fused.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("batch_size, kept", [(4, 12), (8, 8), (5, 10)])
def test_a_queue_that_comes_out_longer_keeps_its_newest_embeddings(batch_size, kept):
    before = Queue(2, 12, 16, batch_size=4, device="cpu")
    for _ in range(4):
        before.push(torch.randn(2, 4, 16))
    state = before.state_dict()
    length = 40 // batch_size * batch_size
    longer = Queue(2, length, 16, batch_size=batch_size, device="cpu")
    longer.load_state_dict(state)
    assert torch.equal(longer.embeddings[:, :kept], state["embeddings"][:, :kept])
    assert not longer.embeddings[:, kept:].any() and longer.num_rows == kept
    assert not longer.full
    while longer.num_rows < length:
        longer.push(torch.randn(2, batch_size, 16))
    assert longer.full and longer.embeddings.shape == (2, length, 16)
