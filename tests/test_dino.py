"""main_dino's mathematics: the loss, the center and the teacher, golden and across processes."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import main_dino
from main_dino import TEACHER_OUTPUTS, DINOLoss, get_parser, main, update_teacher
from src.optim import cosine_schedule
from src.run import flags
from src.run.log import read_log
from tests import reference
from tests.gloo import run_ranks

K, CROPS, BATCH = 50, 8, 4


def published_loss(**options):
    return DINOLoss(K, CROPS, 0.04, 0.07, 30, 100, **options)


def steps(golden):
    """(step, epoch, student (V B, K) with gradient, teacher (2 B, K)) of the golden file."""
    arrays = golden("dino_loss")
    for t, epoch in enumerate(arrays["epochs"].tolist()):
        student = torch.from_numpy(arrays["student"][t]).requires_grad_()
        yield t, epoch, student, torch.from_numpy(arrays["teacher"][t])


# ============ golden values ============
@pytest.mark.parametrize("nmb_crops", [CROPS, [2, 6]])
def test_three_steps_equal_the_golden_ones(golden, nmb_crops):
    arrays = golden("dino_loss")
    criterion = DINOLoss(K, nmb_crops, 0.04, 0.07, 30, 100, 0.1, 0.9)
    criterion.load_state_dict({"center": torch.from_numpy(arrays["center_init"])})
    np.testing.assert_allclose(criterion.teacher_temps, arrays["teacher_temp_schedule"], atol=1e-12)
    for t, epoch, student, teacher in steps(golden):
        center = criterion.center.numpy().copy()
        loss = criterion(student, teacher, epoch)
        loss.backward()
        np.testing.assert_allclose(loss.item(), arrays["loss"][t], atol=1e-5)
        np.testing.assert_allclose(student.grad, arrays["grad_student"][t], atol=1e-6)
        np.testing.assert_allclose(criterion.center, arrays["center_after"][t], atol=1e-6)
        temp = arrays["step_teacher_temp"][t]
        plain = reference.dino_loss(student.detach(), teacher, center, CROPS, 0.1, temp)
        np.testing.assert_allclose(loss.item(), plain, rtol=1e-6)


def test_the_schedules_equal_the_golden_ones(golden):
    arrays = golden("dino_schedules")
    args = flags.parse_args(get_parser(), dict.fromkeys(["imagenet"], {}), ["--data_path", "x"])
    times = (args.epochs, int(arrays["iters_per_epoch"]))
    lr = args.lr * flags.lr_factor(args, int(arrays["total_batch_size"]))
    found = {
        "lr": cosine_schedule(lr, args.min_lr, *times, args.warmup_epochs),
        "wd": cosine_schedule(args.weight_decay, args.weight_decay_end, *times),
        "momentum": cosine_schedule(args.momentum_teacher, args.momentum_teacher_end, *times),
    }
    for name, values in found.items():
        np.testing.assert_allclose(values, arrays[name], atol=1e-12)
    assert found["lr"][0] == 0


# ============ across processes ============
def rank_steps(rank, world_size, kind, student, teacher):
    """Losses, gradients and centers of three steps on this rank's share of the batch."""
    criterion = published_loss(teacher_output=kind)
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    results = []
    for t, epoch in enumerate((0, 15, 40)):
        s = torch.from_numpy(student[t]).view(CROPS, BATCH, K)[:, share].reshape(-1, K)
        g = torch.from_numpy(teacher[t]).view(2, BATCH, K)[:, share].reshape(-1, K)
        s.requires_grad_()
        loss = criterion(s, g, epoch)
        loss.backward()
        health = main_dino.kl_to_uniform(criterion.probabilities(g, epoch)).item()
        results.append(
            (
                loss.item(),
                s.grad.view(CROPS, -1, K).numpy(),
                criterion.center.numpy().copy(),
                health,
            )
        )
    return results


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", TEACHER_OUTPUTS)
def test_many_processes_equal_one(golden, world_size, kind):
    arrays = golden("dino_loss")
    case = (kind, arrays["student"], arrays["teacher"])
    single = rank_steps(0, 1, *case)
    ranks = run_ranks(rank_steps, world_size, *case)
    for t, (loss, gradient, center, health) in enumerate(single):
        np.testing.assert_allclose(np.mean([r[t][0] for r in ranks]), loss, rtol=1e-6)
        gathered = np.concatenate([r[t][1] for r in ranks], 1) / world_size
        np.testing.assert_allclose(gathered, gradient, atol=1e-7)
        for r in ranks:
            np.testing.assert_allclose(r[t][2], center, atol=1e-6)
            np.testing.assert_allclose(r[t][3], health, rtol=1e-5, atol=1e-7)


# ============ what the parts do ============
def test_the_teachers_output_by_sinkhorn_and_batch_softmax_is_that_of_the_equations():
    torch.manual_seed(0)
    output = torch.randn(8, K) * 0.3
    for kind, iterations in (("sinkhorn", 3), ("batch_softmax", 1)):
        p = published_loss(teacher_output=kind).probabilities(output, 99)
        np.testing.assert_allclose(p, reference.sinkhorn(output, 0.07, iterations), atol=1e-6)
    by_hand = torch.softmax(output / 0.07, 0)  # section 4.2.2
    np.testing.assert_allclose(p, by_hand / by_hand.sum(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_summed_in_float32(dtype):
    torch.manual_seed(0)
    student, teacher = torch.randn(CROPS * 64, K).to(dtype), torch.randn(2 * 64, K).to(dtype)
    criterion = published_loss()
    loss = criterion(student.requires_grad_(), teacher, 50)
    loss.backward()
    plain = reference.dino_loss(student.detach().double(), teacher.double(), 0.0, CROPS, 0.1, 0.07)
    assert loss.dtype == torch.float32 and student.grad.dtype == dtype
    np.testing.assert_allclose(loss.item(), plain, rtol=1e-5)
    expected = 0.1 * teacher.double().mean(0, keepdim=True)
    np.testing.assert_allclose(criterion.center, expected, atol=1e-6)


@pytest.mark.parametrize(
    "num_crops, batch, num_outputs",
    [(4, 64, 8192), pytest.param(10, 128, 65536, marks=pytest.mark.slow)],
)
def test_the_gradient_in_half_precision_is_scaled_before_it_is_rounded(
    num_crops, batch, num_outputs
):
    """At the start of a run most entries, about 1 / (K B), are below what fp16 can hold unscaled."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(num_crops * batch, num_outputs, generator=draw).mul_(0.062).half()
    teacher = torch.randn(2 * batch, num_outputs, generator=draw).mul_(0.062).half()
    criterion, loss_scale = DINOLoss(num_outputs, num_crops, 0.04, 0.04, 0, 1), 2.0**16

    student.requires_grad_()
    (loss_scale * criterion(student, teacher, 0)).backward()
    criterion.center.zero_()
    targets = criterion.probabilities(teacher, 0).chunk(2)
    error = size = zeros = zeros_of_plain = 0
    for crop in range(num_crops):  # crop by crop, since all in float32 are large
        rows = slice(crop * batch, (crop + 1) * batch)
        scores = student.detach()[rows].requires_grad_()
        exact = scores.detach().float().requires_grad_()
        for leaf in (scores, exact):
            log_p = torch.log_softmax(leaf.float() / 0.1, 1)
            others = [q for i, q in enumerate(targets) if i != crop]
            loss = sum(-(q * log_p).sum(1).mean() for q in others) / (2 * (num_crops - 1))
            (loss_scale * loss).backward()
        error += (student.grad[rows].float() - exact.grad).square().sum().item()
        size += exact.grad.square().sum().item()
        zeros += (student.grad[rows] == 0).sum().item()
        zeros_of_plain += (scores.grad == 0).sum().item()
    assert (error / size) ** 0.5 < 1e-3
    assert zeros <= 1.01 * zeros_of_plain + 1  # entries at the very edge of rounding to zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", TEACHER_OUTPUTS)
def test_the_largest_outputs_stay_finite(dtype, kind):
    largest = torch.finfo(dtype).max / 4 if dtype == torch.float16 else 1e4
    student = torch.randn(CROPS * 2, K).mul(largest / 4).to(dtype).requires_grad_()
    teacher = torch.randn(4, K).mul(largest / 4).to(dtype)
    criterion = published_loss(teacher_output=kind)
    loss = criterion(student, teacher, 0)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and criterion.center.isfinite().all()


def test_no_gradient_reaches_the_teacher_and_the_center_is_used_before_it_moves():
    student = torch.randn(CROPS * 2, K, requires_grad=True)
    teacher = torch.randn(4, K, requires_grad=True)
    criterion = published_loss(center_momentum=0.0)
    before = reference.dino_loss(student.detach(), teacher.detach(), 0.0, CROPS, 0.1, 0.04)
    loss = criterion(student, teacher, 0)
    loss.backward()
    np.testing.assert_allclose(loss.item(), before, rtol=1e-5)
    assert teacher.grad is None and student.grad.abs().sum() > 0
    np.testing.assert_allclose(criterion.center, teacher.detach().mean(0, keepdim=True), atol=1e-6)
    still = published_loss(center_momentum=1.0)
    still(student, teacher, 0)
    assert still.center.abs().max() == 0


def test_a_temperature_warm_up_longer_than_the_run_is_named():
    with pytest.raises(ValueError, match="--warmup_teacher_temp_epochs 30 exceeds --epochs 10"):
        DINOLoss(K, CROPS, 0.04, 0.07, 30, 10)


@pytest.mark.parametrize("momentum", [0.996, 0.5, 0.0, 1.0])
def test_the_teacher_is_the_moving_average_of_the_student(momentum):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    teacher = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).requires_grad_(False)
    expected = [
        momentum * t.double() + (1 - momentum) * s.detach().double()
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    before = copy.deepcopy(list(student.parameters()))
    update_teacher(list(teacher.parameters()), list(student.parameters()), momentum)
    for found, wanted in zip(teacher.parameters(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-7)
    for now, then in zip(student.parameters(), before, strict=True):
        assert torch.equal(now, then)


# ============ health ============
def test_kl_to_uniform_is_zero_for_equal_shares_and_ln_k_for_one_output():
    assert main_dino.kl_to_uniform(torch.eye(6)).item() == pytest.approx(0, abs=1e-7)
    one = torch.zeros(8, 6)
    one[:, 2] = 1
    assert main_dino.kl_to_uniform(one).item() == pytest.approx(math.log(6))


HEALTHY = {"teacher_entropy": 3.0, "student_kl": 0.5, "kl_to_uniform": 0.4}
HEALTHY |= {"embedding_std": 0.6, "prototypes_used": 30.0}


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"teacher_entropy": 6.92, "kl_to_uniform": 0.0}, "uniform .*--teacher_temp"),
        ({"teacher_entropy": 0.01, "kl_to_uniform": 6.9}, "one output .*--center_momentum"),
        ({"prototypes_used": 1.0}, "one output .*--center_momentum"),
        ({"student_kl": 0.0}, "same output .*--momentum_teacher"),
        ({"embedding_std": 0.01}, "same features .*--lr"),
    ],
)
def test_each_kind_of_collapse_is_named_with_the_flags_that_help(change, words):
    bad = [{**HEALTHY, **change}] * 10
    found = main_dino.diagnose(bad, 1024)
    assert found is None if words is None else re.search(words, found.sentence)
    assert main_dino.diagnose(bad[:9], 1024) is None
    assert main_dino.diagnose([HEALTHY, *bad[1:]], 1024) is None


@pytest.mark.slow
def test_the_students_kl_in_the_log_is_that_of_the_targets_it_learned(tmp_path):
    """Before any step student and teacher are equal but for temperatures: the KL cannot be negative."""
    argv = "--arch vit_micro --width 0.25 --out_dim 64 --epochs 1 --warmup_epochs 0 --log_freq 1 --knn_freq 0"
    main(["--dump_path", str(tmp_path), "--no-tensorboard", *argv.split(), "--batch_size", "128"])
    lines = read_log(tmp_path)
    assert len(lines) == 10 and all(line["student_kl"] > 0 for line in lines)
    arguments = json.loads((tmp_path / "args.json").read_text())
    assert len(arguments["mean"]) == len(arguments["std"]) == 3
