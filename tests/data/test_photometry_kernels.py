"""The kernels of a GPU, interpreted on a CPU, do what src.data.photometry does, and can be compiled."""

import os
import subprocess
import sys

import pytest
import torch

from src.data import augment
from tests.runs import ROOT

pytest.importorskip("triton")

EQUAL = """
import numpy as np
import torch
from src.data import photometry, photometry_kernels
from src.data.augment import apply_draws, draw_parameters

mean = torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1)
std = torch.tensor([0.228, 0.224, 0.225]).view(-1, 1, 1)
for size, seed, strengths in (
    ((19, 17), 0, (0.8, 0.8, 0.8, 0.2)),
    ((4, 5), 1, (0.4, 0.0, 0.9, 0.5)),
    ((70, 66), 2, (0.0, 1.0, 0.0, 0.1)),
):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (6, 3, *size), dtype=torch.uint8, generator=generator)
    images[0], images[1] = 0, 255
    images[2] = images[2, :1]  # gray
    draws = draw_parameters(
        generator, num_crops=2, batch_size=3, flip_prob=0.5, color_jitter=strengths,
        jitter_prob=0.8, grayscale_prob=0.3, blur_prob=[0.9, 0.5], blur_sigma=(0.1, 2.0),
        solarize_prob=[0.0, 0.5],
    )
    expected = apply_draws(images, draws, mean, std)
    values = photometry_kernels.table(draws, photometry.blur_kernels(draws.sigma))
    found = photometry_kernels.apply(images, torch.from_numpy(values), mean, 1 / std)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from src.data import photometry_kernels

numbers = dict.fromkeys(("columns", "size", "width"), "i32")
images = dict.fromkeys(("out", "values"), "*fp32")
kernels = {
    "_colours": {"images": "*u8", **images, **numbers},
    "_blur_rows": {"x": "*fp32", **images, **numbers},
    "_blur_columns": {
        "x": "*fp32", **images, "mean": "*fp32", "scale": "*fp32", **numbers, "height": "i32"
    },
}
for name, signature in kernels.items():
    source = ASTSource(
        fn=getattr(photometry_kernels, name),
        signature={**signature, "BLOCK": "constexpr"},
        constexprs={"BLOCK": 1024},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000
"""


def run(program, **environment):
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_kernels_interpreted_equal_the_operations_one_by_one():
    run(EQUAL, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))


def test_where_triton_does_not_run_photometry_is_done_by_pytorch_and_that_is_said(caplog):
    augment.triton_kernels.cache_clear()
    with caplog.at_level("INFO"):
        assert augment.triton_kernels(torch.device("cpu")) is None  # for which it does not compile
    assert caplog.text.count("photometry by PyTorch, since Triton does not run here: ") == 1
