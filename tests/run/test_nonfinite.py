"""Iterations whose loss or gradient is not finite: skipped by all processes without a trace, or named."""

import copy
import importlib
import json
import math
import os

import pytest
import torch

from src import dist
from src.data.augment import Augment
from src.data.multicrop import generator
from src.errors import RunError
from src.run import checkpoint, flags
from src.run.nonfinite import FiniteSteps, Iteration
from src.run.run import Run
from tests.gloo import start_mains
from tests.runs import images, signal_handlers

pytestmark = pytest.mark.usefixtures(signal_handlers.__name__)

SEED, BATCH = 7, 24
FEW = (
    f"--seed {SEED} --preset tiny --batch_size {BATCH} --workers 0 --log_freq 1 --checkpoint_iters 1 "
    "--no-tensorboard --epochs 1 --knn_freq 0"
).split()  # four iterations an epoch
RESNET = "--width 0.125 --nmb_crops 2 --nmb_prototypes 12 --warmup_epochs 0".split()
CONVNET = "--arch resnet10 --width 0.125 --stem small --size_crops 12".split()
DINO = (
    "--arch resnet10 --width 0.125 --stem small --use_bn_in_head true --out_dim 64 --hidden_dim 32 "
    "--bottleneck_dim 16 --local_crops_number 1 --clip_grad 1"
).split()
CLUSTERS = [*CONVNET, "--k", "12", "--dim_pca", "16"]
# The arguments of a tiny run of each method.
METHODS = {
    "swav": [*RESNET, "--queue_length", "48", "--epoch_queue_starts", "0"],
    "dino": DINO,
    "deepclusterv2": RESNET,
    "selav2": RESNET,
    "simclr": ["--width", "0.125", "--nmb_crops", "2", "--warmup_epochs", "0"],
    "rotnet": CONVNET,
    "deepcluster": [*CLUSTERS, "--reassign", "1"],
    "deepercluster": [*CLUSTERS, "--super_classes", "8"],
    "clusterfit": [*CONVNET, "--k", "12"],
}


def poison(patch, *places):
    """Make the crops of these places NaN: (epoch, iteration of the epoch, rank) of a run."""
    seeds = {generator(SEED, *place).initial_seed() for place in places}
    augment = Augment.__call__

    def poisoned(self, crops, draws):
        factor = math.nan if draws.initial_seed() in seeds else 1.0
        return [crop * factor for crop in augment(self, crops, draws)]

    patch.setattr(Augment, "__call__", poisoned)


def train(folder, *argv, method="swav"):
    script = importlib.import_module(f"main_{method}")
    data = folder.parent / "images"
    if not data.exists():
        images(data, 4 * BATCH)
    argv = [*FEW, *METHODS[method], "--data_path", data, "--dump_path", folder, *argv]
    return script.main([str(word) for word in argv])


def saved(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def lines_of(folder, name="nonfinite.jsonl"):
    return [json.loads(text) for text in (folder / name).read_text().splitlines()]


def differences(one, other, name="state"):
    """Where two nested states are not the same, bit for bit; learning rates and the like aside."""
    if name.endswith("param_groups"):  # which every iteration sets anew
        return []
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [name]
    if isinstance(one, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [x for key in keys for x in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list | tuple):
        pairs = enumerate(zip(one, other, strict=True))
        return [x for i, pair in pairs for x in differences(*pair, f"{name}.{i}")]
    return [] if one == other else [name]


@pytest.fixture
def states(monkeypatch):
    """What is saved, in order, by number of samples done."""
    kept = {}

    def save(folder, state, keep_as=None):
        kept[state["epoch"], state["samples_done"] // BATCH] = copy.deepcopy(state)

    monkeypatch.setattr(checkpoint, "save_together", save)
    return kept


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(Run, "plot", lambda *_: None)
    monkeypatch.setattr(Run, "picture_crops", lambda *_: None)


# ============ no trace ============
@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_batch_whose_step_is_skipped_stays(method, tmp_path, monkeypatch, states):
    poison(monkeypatch, (0, 1, 0))
    assert train(tmp_path / "run", "--max_nonfinite", 1, method=method) == 0
    before, after, later = states[0, 1], states[0, 2], states[0, 3]
    assert differences(before, after) == ["state.samples_done", "state.skipped_steps"]
    assert (before["skipped_steps"], after["skipped_steps"], later["skipped_steps"]) == (0, 1, 1)
    changed = differences(after, later)
    assert any("running_mean" in name for name in changed)  # that step was taken
    assert any(name.endswith("weight") for name in changed)
    log = [line for line in lines_of(tmp_path / "run", "log.jsonl") if "loss" in line]
    expected = [(0, 0), (2, 1), (3, 1)]
    assert [(line["iteration"], line["skipped_steps"]) for line in log] == expected


@pytest.mark.parametrize("method", ["swav", "deepercluster"])
def test_the_scale_of_fp16_stays_too(method, tmp_path, monkeypatch, states):
    monkeypatch.setattr(dist, "grad_scaler", lambda *_: torch.amp.GradScaler("cpu"))
    poison(monkeypatch, (0, 1, 0))
    assert train(tmp_path / "run", "--max_nonfinite", 1, method=method) == 0
    expected = ["state.samples_done", "state.skipped_steps"]
    assert differences(states[0, 1], states[0, 2]) == expected
    assert states[0, 1]["scaler"]["_growth_tracker"] == 1
    assert states[0, 3]["scaler"]["_growth_tracker"] == 2


@pytest.mark.slow
def test_skipping_costs_a_run_without_such_batches_no_bit(tmp_path):
    for limit in (0, 3):
        assert train(tmp_path / str(limit), "--max_nonfinite", limit) == 0
    without, with_limit = (saved(tmp_path / name) for name in ("0", "3"))
    changed = differences(without, with_limit)
    assert sorted(changed) == ["state.args.dump_path", "state.args.max_nonfinite"]


# ============ the limit ============
@pytest.mark.slow
def test_one_step_more_than_the_limit_stops_the_run_over_resumes_too(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, (0, 1, 0), (1, 2, 0))
    argv = ("--epochs", 2, "--checkpoint_iters", 0)
    assert train(tmp_path / "whole", *argv, "--max_nonfinite", 2) == 0
    for _ in range(2):  # a resume does not begin to count again
        with pytest.raises(SystemExit) as stop:
            flags.run(lambda: train(tmp_path / "run", *argv, "--max_nonfinite", 1))
        sentence = capsys.readouterr().err
        assert stop.value.code == 1 and sentence.count("\n") == 1
        assert "iteration 7 of the run" in sentence and "--max_nonfinite 1" in sentence
    assert saved(tmp_path / "run")["epoch"] == 1 and saved(tmp_path / "run")["skipped_steps"] == 1
    found = [(line["iteration"], line["skipped"]) for line in lines_of(tmp_path / "run")]
    assert found == [(1, True), (6, False), (6, False)]

    assert train(tmp_path / "run", *argv, "--max_nonfinite", 2) == 0
    resumed, whole = saved(tmp_path / "run"), saved(tmp_path / "whole")
    assert differences(resumed, whole) == ["state.args.dump_path"]
    assert resumed["skipped_steps"] == 2


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_has_skipped_nothing(tmp_path, monkeypatch):
    train(tmp_path / "run")
    state = saved(tmp_path / "run")
    del state["skipped_steps"], state["args"]["max_nonfinite"]
    torch.save(state, tmp_path / "run" / "checkpoint.pth")
    poison(monkeypatch, (1, 0, 0))
    assert train(tmp_path / "run", "--epochs", 2, "--max_nonfinite", 1) == 0
    assert saved(tmp_path / "run")["skipped_steps"] == 1


def test_a_warning_names_the_file_with_the_samples(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, (0, 1, 0))
    train(tmp_path / "run", "--max_nonfinite", 1)
    warnings = [x for x in capsys.readouterr().out.splitlines() if x.startswith("WARNING")]
    assert len(warnings) == 1 and str(tmp_path / "run" / "nonfinite.jsonl") in warnings[0]
    assert "number 1 of at most 1" in warnings[0]
    assert "1 steps skipped" in (tmp_path / "run" / "train.log").read_text()


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "run" / "nonfinite.jsonl").mkdir(parents=True)
    poison(monkeypatch, (0, 1, 0))
    assert train(tmp_path / "run", "--max_nonfinite", 1) == 0
    assert "nonfinite.jsonl cannot be written" in capsys.readouterr().out


# ============ the first one ============
def test_without_a_limit_the_stop_names_the_first_such_iteration_and_its_samples(
    tmp_path, monkeypatch
):
    seen, iterate = [], Run.iterate

    def watched(self, *args, **options):
        for iteration, crops, indices in iterate(self, *args, **options):
            seen.append(indices.tolist())
            yield iteration, crops, indices

    monkeypatch.setattr(Run, "iterate", watched)
    poison(monkeypatch, (0, 1, 0))
    words = "iteration 2 of the run; .*nonfinite.jsonl.*--max_nonfinite"
    with pytest.raises(RunError, match=words):
        train(tmp_path / "run", "--log_freq", 50, "--checkpoint_iters", 0)
    assert len(seen) == 4  # it was noticed at the end of the epoch
    line = {"epoch": 0, "iteration": 1, "skipped": False, "loss": [None], "gradient_norm": [None]}
    assert lines_of(tmp_path / "run") == [{**line, "samples": [seen[1]]}]


def judge(tmp_path, losses, scaled=False, limit=0, norms=None):
    """The line of the first bad iteration of these, None without one."""
    steps = FiniteSteps(limit, tmp_path, modules=[], scaled=scaled)
    for i, loss in enumerate(losses):
        norm = torch.tensor(1.0 if norms is None else norms[i])
        iteration = Iteration(0, i, torch.tensor([i]), torch.tensor(loss), gradient_norm=norm)
        assert steps.admits(iteration)
    try:
        steps.check()
    except RunError:
        return lines_of(tmp_path)[-1]
    steps.check()  # nothing new
    return None


def test_the_first_is_that_after_which_all_were_bad(tmp_path):
    nan, inf = math.nan, math.inf
    assert judge(tmp_path, [1.0, nan, 1.0, inf, nan])["samples"] == [[3]]
    assert judge(tmp_path, [nan])["samples"] == [[0]]
    assert judge(tmp_path, [nan, inf, 1.0]) is None and judge(tmp_path, []) is None
    line = judge(tmp_path, [1.0, 2.0], norms=[1.0, inf])
    assert (line["loss"], line["gradient_norm"], line["samples"]) == ([2.0], [None], [[1]])
    assert judge(tmp_path, [1.0, 2.0], norms=[1.0, inf], scaled=True) is None


# ============ several processes ============
def main(argv):
    """A method, the last word, whose rank 1 alone sees a batch of NaN; leaves what each rank saves.

    RotNet has the scaler of fp16, and nothing but the gradients is exchanged.
    """
    *argv, method = argv
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, (0, 1, 1))
        patch.setattr(Run, "plot", lambda *_: None)
        patch.setattr(Run, "picture_crops", lambda *_: None)
        if method == "rotnet":
            patch.setattr(dist, "grad_scaler", lambda *_: torch.amp.GradScaler("cpu"))
        save, rank = checkpoint.save_together, os.environ["RANK"]

        def watched(folder, state, keep_as=None):
            save(folder, state, keep_as=keep_as)
            kept = {"model": state["model"], "skipped_steps": state["skipped_steps"]}
            torch.save(kept, folder / f"{state['samples_done']}-{rank}.pt")

        patch.setattr(checkpoint, "save_together", watched)
        return importlib.import_module(f"main_{method}").main(argv)


def run_two(folder, method, *argv):
    data = images(folder.parent / "images", 4 * BATCH)
    argv = [*FEW, *METHODS[method], "--data_path", data, "--batch_size", BATCH // 2, *argv, method]
    processes = start_mains(__name__, folder, argv, world_size=2)
    return [process.wait() for process in processes], [process.read() for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["swav", "rotnet"])
def test_two_processes_skip_together_what_is_bad_on_one(tmp_path, method):
    argv = ["--sync_bn", "none"] if method == "rotnet" else []
    status, output = run_two(tmp_path / "run", method, "--max_nonfinite", 1, *argv)
    assert status == [0, 0], output
    (line,) = lines_of(tmp_path / "run")
    assert line["iteration"] == 1 and [len(rank) for rank in line["samples"]] == [BATCH // 2] * 2
    assert len({*line["samples"][0], *line["samples"][1]}) == BATCH
    good, bad = line["loss"]
    assert bad is None and (good is None) == (method == "swav")  # whose codes are of all images
    states = {
        (done, rank): torch.load(tmp_path / "run" / f"{done}-{rank}.pt", weights_only=True)
        for done in (BATCH, 2 * BATCH, 3 * BATCH, 0)
        for rank in (0, 1)
    }
    for rank in (0, 1):
        assert states[0, rank]["skipped_steps"] == 1
        before, after = states[BATCH, rank]["model"], states[2 * BATCH, rank]["model"]
        assert not differences(before, after)
    for done in (BATCH, 2 * BATCH, 3 * BATCH, 0):
        changed = differences(states[done, 0], states[done, 1])
        assert all("running" in name for name in changed)  # of batch norms that share nothing
        assert method == "rotnet" or not changed
    assert all(x.isfinite().all() for x in states[0, 0]["model"].values())


@pytest.mark.slow
def test_two_processes_stop_together_at_what_is_bad_on_one(tmp_path):
    status, output = run_two(tmp_path / "run", "swav")
    assert status == [1, 1], output
    (line,) = lines_of(tmp_path / "run")
    assert line["iteration"] == 1 and [len(rank) for rank in line["samples"]] == [BATCH // 2] * 2
