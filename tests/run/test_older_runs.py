"""Runs that an older version began, and was stopped in by SIGTERM inside an epoch, go on as it would have."""

import importlib
import json
import shutil

import pytest
import torch

from src.errors import CheckpointError
from src.run.checkpoint import check_same_run
from src.run.run import Run
from tests.runs import ROOT, losses
from tests.runs import signal_handlers as signal_handlers

GOLDEN = ROOT / "tests" / "golden"
RUNS = json.loads((GOLDEN / "runs.json").read_text())

pytestmark = pytest.mark.usefixtures("signal_handlers")


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(RUNS))
def test_a_run_of_an_older_version_goes_on_with_the_losses_of_that_version(
    method, tmp_path, monkeypatch
):
    monkeypatch.setattr(Run, "plot", lambda self: None)
    shutil.copy(GOLDEN / f"run_{method}.pth", tmp_path / "checkpoint.pth")
    main = importlib.import_module(f"main_{method}").main
    # oneDNN takes other kernels on other processors.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert main([*RUNS[method]["flags"].split(), "--dump_path", str(tmp_path)]) == 0
    expected = {int(iteration): loss for iteration, loss in RUNS[method]["losses"].items()}
    assert losses(tmp_path) == pytest.approx(expected, abs=1e-5)
    assert sorted(losses(tmp_path)) == [12, 13, 14]  # the epoch's third to fifth


def check(before, now):
    state = {"model": {}, "method": "deepercluster", "args": before, "num_images": 9}
    check_same_run(
        {**state, "method_state": {}},
        method="deepercluster",
        networks=["model"],
        arguments=now,
        num_images=9,
        images_digest="9-a",
        folder="runs/mine",
    )


def test_a_vgg16_that_padded_no_images_is_refused_where_it_would_now():
    older = {"arch": "vgg16", "sobel": False}
    with pytest.raises(CheckpointError, match="--image_padding 0, not 1"):
        check(older, {**older, "image_padding": 1})
    check(older, {**older, "image_padding": 0})
    for padless in ({"arch": "vgg16", "sobel": True}, {"arch": "resnet18", "sobel": False}):
        check(padless, {**padless, "image_padding": 1})
