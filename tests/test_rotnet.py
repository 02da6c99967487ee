"""The mathematics of main_rotnet.py: rotations, their labels and loss; steps of the learning rate."""

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from main_rotnet import rotation_labels, rotation_loss, rotations
from src.nets.convnets import build_convnet
from src.optim import step_lr
from src.run import convnet_flags

GOLDEN = np.load(Path(__file__).parent / "golden" / "deepercluster.npz")


def test_rotations_are_the_published_ones():
    image = torch.from_numpy(GOLDEN["rot_image"]).permute(2, 0, 1)[None]  # (1, 3, 4, 5)
    for turned, angle in zip(rotations([image]), (0, 90, 180, 270), strict=True):
        expected = torch.from_numpy(GOLDEN[f"rot_{angle}"]).permute(2, 0, 1)[None]
        assert torch.equal(turned, expected)


def test_every_crop_is_followed_by_its_rotations_and_labels_say_which():
    crops = [torch.rand(3, 2, size, size) for size in (5, 4)]
    turned = rotations(crops)
    assert [len(x) for x in turned] == [3] * 8
    labels = rotation_labels(3)
    for v, crop in enumerate(crops):
        rows = torch.cat(turned[4 * v : 4 * v + 4])  # (4 B, C, S, S)
        for i, (row, k) in enumerate(zip(rows, labels.tolist(), strict=True)):
            assert np.array_equal(row, np.rot90(crop[i % 3], k, (1, 2)))


def test_four_turns_lead_back():
    crop = turned = torch.rand(2, 3, 6, 6)
    for _ in range(4):
        turned = rotations([turned])[1]
    assert torch.equal(turned, crop)


@pytest.mark.parametrize("scale", [1, 1e4])
def test_the_loss_is_the_cross_entropy_of_rotations(scale):
    num_crops, num_images, rng = 2, 5, np.random.default_rng(0)
    scores = rng.normal(size=(num_crops, 4, num_images, 4)) * scale
    total = 0.0
    for v in range(num_crops):
        for k in range(4):
            for i in range(num_images):
                row = scores[v, k, i]
                total += row.max() + math.log(np.exp(row - row.max()).sum()) - row[k]
    expected = total / (num_crops * 4 * num_images)
    rows = torch.from_numpy(scores.reshape(-1, 4)).requires_grad_()
    loss = rotation_loss(rows, num_images)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    one_hot = np.broadcast_to(np.eye(4)[None, :, None], scores.shape)
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    softmax = exponentials / exponentials.sum(-1, keepdims=True)
    gradient = (softmax - one_hot).reshape(-1, 4) / len(rows)
    np.testing.assert_allclose(rows.grad, gradient, atol=1e-7)


def test_predicting_nothing_costs_ln_4_and_half_precision_is_summed_in_float32():
    assert rotation_loss(torch.zeros(24, 4), 3).item() == pytest.approx(math.log(4))
    scores = torch.randn(4 * 4096, 4, dtype=torch.bfloat16)
    loss = rotation_loss(scores, 4096)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(rotation_loss(scores.double(), 4096).item(), rel=1e-5)


def test_scores_of_a_network_are_in_the_order_of_the_labels():
    """Crops of two sizes, more than one of a size: a classifier that looks at one corner only."""
    crops = [torch.zeros(2, 3, size, size) for size in (8, 8, 6)]
    for crop in crops:
        crop[..., :2, :2] = 1.0  # top left; turned counter-clockwise: bottom left, ...

    model = build_convnet("resnet10", 4, stem="small", width=0.125)

    def corners(x):  # (N, 4): top left, bottom left, bottom right, top right
        return torch.stack([x[:, 0, i, j] for i, j in ((0, 0), (-1, 0), (-1, -1), (0, -1))], 1)

    model.forward_backbone = lambda x: torch.nn.functional.pad(corners(x), (0, 60))
    model.top_layer.weight.data.zero_()
    model.top_layer.weight.data[:, :4] = 50 * torch.eye(4)
    _, scores = model(rotations(crops))
    assert scores.shape == (3 * 4 * 2, 4)
    assert rotation_loss(scores, 2).item() < 1e-6


def test_the_learning_rate_falls_after_the_epochs_given():
    rates = [step_lr(0.1, epoch, [2, 4], 0.2) for epoch in range(5)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004])
    assert step_lr(0.1, 99, [], 0.2) == 0.1


@pytest.mark.parametrize(
    "epochs, text",
    [
        (100, "times 0.2 after epochs 30 60"),
        (60, "times 0.2 after epochs 30; the run ends before its steps after 60"),
        (9, "constant; the run ends before its steps after 30 60"),
    ],
)
def test_the_plan_says_which_steps_do_not_come(epochs, text):
    args = argparse.Namespace(epochs=epochs, decay_epochs=[30, 60], gamma=0.2)
    assert convnet_flags.describe_steps(args) == f"learning rate {text}"
