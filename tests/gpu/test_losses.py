"""Losses and Sinkhorn-Knopp on the device: golden steps, gradients, codes, queue and center."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from main_deepercluster import hierarchical_loss
from main_dino import DINOLoss
from main_simclr import nt_xent
from main_swav import Queue
from src import dist
from src.cluster.sinkhorn import sinkhorn
from tests import reference, test_deepercluster, test_dino, test_simclr, test_swav
from tests.gpu.host import to_device, to_host

pytestmark = pytest.mark.gpu

# Absolute. float32: those of tests/golden/README.md. bfloat16, where the loss is about 6 and 7.5 and the
# gradient at most 0.14 and 0.34: scores of 1 are rounded by 0.002, then divided by a temperature of
# 0.1 or an epsilon of 0.05. A CPU is off by a third of these.
SINKHORN = 1e-5
SWAV = {
    "fp32": {"loss": 2e-5, "gradient": 1e-6, "codes": 1e-5},
    "bf16": {"loss": 5e-3, "gradient": 4e-3, "codes": 1e-2},
}
DINO = {
    "fp32": {"loss": 1e-5, "gradient": 1e-6, "center": 1e-6},
    "bf16": {"loss": 1e-2, "gradient": 8e-3, "center": 3e-4},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ============ sinkhorn ============
@pytest.mark.parametrize("case", ["wide", "tall", "overflow", "underflow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_assignments_equal_the_golden_ones_whatever_autocast_is_around(
    golden, device, precision, case, dtype
):
    arrays = golden("swav_sinkhorn")
    (scores,) = to_device(arrays, [f"{case}_scores"], device)
    for iterations in (1, 3, 10):
        with dist.autocast(device, precision):
            q = sinkhorn(scores, epsilon=0.05, iterations=iterations, dtype=dtype)
        assert q.dtype == dtype and q.device.type == device.type
        expected = arrays[f"{case}_expected_it{iterations}"]
        np.testing.assert_allclose(to_host(q), expected, atol=SINKHORN, rtol=0)
        np.testing.assert_allclose(to_host(q.sum(1)), 1, atol=SINKHORN)


def test_scores_in_half_precision_are_assigned_in_float32(device):
    generator = torch.Generator().manual_seed(1)
    scores = (2 * torch.rand(32, 20, generator=generator) - 1).bfloat16()
    expected = reference.sinkhorn(scores.float().numpy(), epsilon=0.01, iterations=3)
    q = sinkhorn(scores.to(device), epsilon=0.01, iterations=3)
    np.testing.assert_allclose(to_host(q), expected, atol=2e-5)


# ============ swav ============
def check_swav(found, expected, tolerances):
    """found: loss, gradient and codes of a step; expected: the same of the golden file."""
    loss, gradient, codes = found
    np.testing.assert_allclose(loss, expected[0], atol=tolerances["loss"], rtol=0)
    np.testing.assert_allclose(
        to_host(gradient), expected[1], atol=tolerances["gradient"], rtol=1e-4
    )
    np.testing.assert_allclose(to_host(codes), expected[2], atol=tolerances["codes"], rtol=0)


@pytest.mark.parametrize("case, crops_for_assign", [("nq", [0, 1]), ("nq1", [1])])
def test_a_step_of_swav_without_queue_equals_the_golden_one(
    golden, device, precision, case, crops_for_assign
):
    arrays = golden("swav_loss")
    names = ["nq_embedding", "prototypes_normalized"]
    embedding, prototypes = (x.to(DTYPES[precision]) for x in to_device(arrays, names, device))
    found = test_swav.step(embedding.unflatten(0, (8, -1)), prototypes, None, crops_for_assign)
    assert found[1].dtype == DTYPES[precision] and found[2].dtype == torch.float32
    expected = [arrays[f"{case}_{name}"] for name in ("loss", "grad_scores", "assign")]
    check_swav(found, [expected[0][0], *expected[1:]], SWAV[precision])


@pytest.mark.parametrize("case", ["q", "qf"])  # a queue that fills, and a full one
def test_steps_of_swav_with_a_queue_equal_the_golden_ones(golden, device, case):
    arrays = golden("swav_loss")
    names = [f"{case}_embedding", "prototypes_normalized"]
    embeddings, prototypes = to_device(arrays, names, device)
    queue = Queue(2, 24, 16, batch_size=8, device=device)
    if case == "qf":
        start = torch.from_numpy(arrays["qf_queue"])
        queue.load_state_dict({"embeddings": start, "num_rows": 24})
    for t, embedding in enumerate(embeddings):
        found = test_swav.step(embedding.unflatten(0, (8, -1)), prototypes, queue)
        expected = [arrays[f"{case}_{name}"][t] for name in ("loss", "grad_scores", "assign")]
        check_swav(found, expected, SWAV["fp32"])
        assert queue.embeddings.device.type == device.type
        if case == "qf":
            np.testing.assert_array_equal(to_host(queue.embeddings), arrays["qf_states"][t + 1])
    np.testing.assert_array_equal(to_host(queue.embeddings), arrays[f"{case}_states"][-1])


# ============ dino ============
def test_three_steps_of_dino_equal_the_golden_ones(golden, device, precision):
    arrays, dtype, tolerances = golden("dino_loss"), DTYPES[precision], DINO[precision]
    criterion = DINOLoss(test_dino.K, test_dino.CROPS, 0.04, 0.07, 30, 100)
    criterion.load_state_dict({"center": torch.from_numpy(arrays["center_init"])})
    criterion.to(device)
    for t, epoch in enumerate(arrays["epochs"].tolist()):
        student = torch.from_numpy(arrays["student"][t]).to(device, dtype).requires_grad_()
        teacher = torch.from_numpy(arrays["teacher"][t]).to(device, dtype)
        loss = criterion(student, teacher, epoch)
        loss.backward()
        assert loss.dtype == criterion.center.dtype == torch.float32
        np.testing.assert_allclose(loss.item(), arrays["loss"][t], atol=tolerances["loss"])
        gradient, center = to_host(student.grad), to_host(criterion.center)
        np.testing.assert_allclose(
            gradient, arrays["grad_student"][t], atol=tolerances["gradient"], rtol=0
        )
        np.testing.assert_allclose(
            center, arrays["center_after"][t], atol=tolerances["center"], rtol=0
        )


# ============ the other losses ============
@pytest.mark.parametrize("num_crops, batch_size", [(2, 7), (6, 5)])
def test_simclrs_loss_and_gradient_equal_equation_7_whatever_autocast_is_around(
    device, precision, num_crops, batch_size
):
    z = test_simclr.embeddings(num_crops, batch_size)
    expected, exact = test_simclr.value_and_gradient(test_simclr.equation_7, z, num_crops, 0.1)
    with dist.autocast(device, precision):
        leaf = z.float().to(device).requires_grad_()
        loss = nt_xent(leaf, num_crops, 0.1)
    loss.backward()
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)
    tolerance = 2e-5 * exact.abs().max().item()
    np.testing.assert_allclose(to_host(leaf.grad), exact, rtol=1e-4, atol=tolerance)


def test_deeperclusters_hierarchical_loss_equals_the_golden_one(device):
    golden = test_deepercluster.golden
    names = ("super_weight", "super_bias", "sub_weight", "sub_bias", "super_target", "sub_target")
    super_weight, super_bias, sub_weight, sub_bias, supers, subs = (
        golden(name).to(device) for name in names
    )
    x = F.relu(golden("features_before_relu").to(device))
    present = supers.unique().tolist()
    scores = [x[supers == s] @ sub_weight[s].T + sub_bias[s] for s in present]
    labels = [subs[supers == s] for s in present]
    loss = hierarchical_loss(x @ super_weight.T + super_bias, supers, scores, labels)
    expected = test_deepercluster.GOLDEN["hl_loss_total"].item()
    assert loss.item() == pytest.approx(expected, abs=1e-5)
