"""Saving never loses a run: crashes, torn files, full disks; resuming tells what does not fit."""

import errno
import os
import random
import resource
import shutil
import time

import numpy as np
import pytest
import torch
import torch.nn as nn

from src.run import checkpoint
from src.run.checkpoint import CheckpointError, load_checkpoint, load_state, save_checkpoint
from tests.gloo import CONTEXT, run_ranks


def state_of(epoch, size=100):
    return {
        "model": {"weight": torch.full((size,), float(epoch)), "count": torch.tensor(epoch)},
        "optimizer": {
            "state": {0: {"step": 3}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        },
        "epoch": epoch,
        "best": None,
        "args": {"arch": "resnet18", "nmb_crops": [2, 6], "fp16": False},
    }


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ============ saving and loading ============


def test_what_is_saved_is_loaded_and_the_one_before_is_kept(tmp_path):
    assert load_checkpoint(tmp_path / "run") is None
    save_checkpoint(tmp_path / "run", state_of(1), keep_as="ckp-1")
    save_checkpoint(tmp_path / "run", state_of(2))
    save_checkpoint(tmp_path / "run", state_of(3))
    expected = ["checkpoint.pth", "checkpoint.prev.pth", "checkpoints/ckp-1.pth"]
    assert files(tmp_path / "run") == sorted(expected)
    for name, epoch in zip(expected, (3, 2, 1), strict=True):
        state = torch.load(tmp_path / "run" / name, weights_only=True)
        assert state["epoch"] == epoch
        assert torch.equal(state["model"]["weight"], torch.full((100,), float(epoch)))
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded["optimizer"] == state_of(3)["optimizer"]
    assert loaded["args"] == state_of(3)["args"]


def test_a_kept_checkpoint_is_replaced_under_the_same_name(tmp_path):
    for epoch in (1, 2, 3):
        save_checkpoint(tmp_path, state_of(epoch), keep_as="ckp-last")
    assert torch.load(tmp_path / "checkpoints" / "ckp-last.pth", weights_only=True)["epoch"] == 3
    assert files(tmp_path) == ["checkpoint.prev.pth", "checkpoint.pth", "checkpoints/ckp-last.pth"]


def test_file_systems_without_hard_links_get_copies(tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    for epoch in (1, 2):
        save_checkpoint(tmp_path, state_of(epoch), keep_as=f"ckp-{epoch}")
    assert torch.load(tmp_path / "checkpoint.prev.pth", weights_only=True)["epoch"] == 1
    assert torch.load(tmp_path / "checkpoints" / "ckp-2.pth", weights_only=True)["epoch"] == 2
    assert len(files(tmp_path)) == 4


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.float64(0.1), "checkpoint['optimizer']['param_groups'][1]['lr'] is a numpy.float64"),
        (np.zeros(3), "is a numpy.ndarray"),
        (object(), "is a builtins.object"),
        ({1.5: "x"}, "has the key 1.5"),
        (torch.device("cpu"), "is a torch.device"),
    ],
)
def test_what_would_not_load_safely_is_not_saved(value, words, tmp_path):
    state = {"optimizer": {"param_groups": [{"lr": 0.1}, {"lr": value}]}}
    with pytest.raises(ValueError, match=".") as error:
        save_checkpoint(tmp_path, state)
    assert words in str(error.value)
    assert files(tmp_path) == []


# ============ crashes ============


class Crash(BaseException):
    """Like a power cut: nothing handles it."""


def crash_at(monkeypatch, call, folder, log):
    """Raise Crash at the call-th time that a file's name or contents are about to be fixed."""
    count = [0]
    for name in ("fsync", "link", "replace", "unlink", "open"):
        real = getattr(os, name)

        def step(*args, _name=name, _real=real, **kwargs):
            count[0] += 1
            log.append((_name, *[str(arg).rpartition("/")[2] for arg in args[:2]]))
            if count[0] == call:
                raise Crash
            return _real(*args, **kwargs)

        monkeypatch.setattr(os, name, step)


def test_a_crash_at_any_moment_leaves_a_readable_checkpoint(tmp_path, monkeypatch):
    crashes = 0
    for call in range(1, 40):
        folder = tmp_path / str(call)
        save_checkpoint(folder, state_of(1))
        save_checkpoint(folder, state_of(2))
        log = []
        with monkeypatch.context() as patch:
            crash_at(patch, call, folder, log)
            try:
                save_checkpoint(folder, state_of(3), keep_as="ckp-3")
            except Crash:
                crashes += 1
        # checkpoint.pth itself, not only one of the two: other programs read it meanwhile
        newest = torch.load(folder / "checkpoint.pth", weights_only=True)["epoch"]
        assert newest in (2, 3)
        assert torch.load(folder / "checkpoint.prev.pth", weights_only=True)["epoch"] in (1, 2)
        for path in folder.rglob("*.tmp-*"):  # younger ones may be another run's that still writes
            os.utime(path, (0, 0))
        assert load_checkpoint(folder)["epoch"] == newest
        assert not [name for name in files(folder) if ".tmp-" in name]  # what a crash left is gone
        save_checkpoint(folder, state_of(4))
        assert not [name for name in files(folder) if ".tmp-" in name]
        assert load_checkpoint(folder)["epoch"] == 4
        if len(log) < call:
            break
    assert crashes >= 8 and len(log) < call  # every step was tried
    replaced = [i for i, (name, *_, target) in enumerate(log) if target == "checkpoint.pth"]
    assert log[replaced[0]][0] == "replace"
    assert "fsync" in [name for name, *_ in log[: replaced[0]]]  # the contents are on disk first
    assert "fsync" in [name for name, *_ in log[replaced[0] :]]  # and then the name


def _save_for_ever(folder, reached):
    torch.set_num_threads(1)
    for epoch in range(1, 100_000):
        save_checkpoint(folder, state_of(epoch, size=100_000))
        reached.value = epoch


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    random.seed(0)
    for trial in range(6):
        folder = tmp_path / str(trial)
        reached = CONTEXT.Value("i", 0, lock=False)  # a killed process would keep the lock
        process = CONTEXT.Process(target=_save_for_ever, args=(folder, reached))
        process.start()
        while reached.value < 2:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        process.kill()
        process.join()
        state = load_checkpoint(folder)
        assert state["epoch"] in (reached.value, reached.value + 1)
        assert bool((state["model"]["weight"] == state["epoch"]).all())


def tear(path, how):
    contents = path.read_bytes()
    path.write_bytes(
        {
            "half": contents[: len(contents) // 2],
            "empty": b"",
            "zeros": bytes(len(contents)),
            "text": b"not a checkpoint",
        }[how]
    )


@pytest.mark.parametrize("how", ["half", "empty", "zeros", "text"])
def test_a_torn_checkpoint_falls_back_to_the_one_before_with_a_word(how, tmp_path, caplog):
    save_checkpoint(tmp_path, state_of(1))
    save_checkpoint(tmp_path, state_of(2))
    tear(tmp_path / "checkpoint.pth", how)
    torn = (tmp_path / "checkpoint.pth").read_bytes()
    assert load_checkpoint(tmp_path)["epoch"] == 1
    assert "checkpoint.pth cannot be read" in caplog.text
    assert "going on from" in caplog.text and "checkpoint.prev.pth" in caplog.text
    assert (tmp_path / "checkpoint.pth.unreadable").read_bytes() == torn
    save_checkpoint(tmp_path, state_of(3))  # and the good one is not replaced by the torn one
    assert torch.load(tmp_path / "checkpoint.prev.pth", weights_only=True)["epoch"] == 1
    assert load_checkpoint(tmp_path)["epoch"] == 3


def test_a_checkpoint_that_the_storage_does_not_give_now_is_not_set_aside(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state_of(1))
    save_checkpoint(tmp_path, state_of(2))
    load = torch.load

    def away(path, **options):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(torch, "load", away)
    with pytest.raises(CheckpointError, match=r"checkpoint.pth cannot be read now \(Stale.*again"):
        load_checkpoint(tmp_path)
    monkeypatch.setattr(torch, "load", load)
    assert load_checkpoint(tmp_path)["epoch"] == 2


def test_a_run_on_one_named_set_does_not_go_on_with_another_of_as_many_images():
    state = {**state_of(1), "method": "m", "num_images": 50_000, "method_state": {}}
    state["args"] = {**state["args"], "data_path": "cifar10"}

    def check(data_path):
        checkpoint.check_same_run(
            state,
            method="m",
            networks=["model"],
            arguments={**state["args"], "data_path": data_path},
            num_images=50_000,
            images_digest="50000-a",
            folder="runs/a",
        )

    check("cifar10")
    check("/data/cifar10")  # as folders: their images have other names, which is said
    with pytest.raises(CheckpointError, match="--data_path cifar10, not cifar100: use another"):
        check("cifar100")


def test_two_torn_checkpoints_are_an_error_that_destroys_nothing(tmp_path):
    save_checkpoint(tmp_path, state_of(1))
    save_checkpoint(tmp_path, state_of(2))
    tear(tmp_path / "checkpoint.pth", "half")
    tear(tmp_path / "checkpoint.prev.pth", "text")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(
        CheckpointError, match="checkpoint.pth and .*checkpoint.prev.pth cannot be read"
    ):
        load_checkpoint(tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}


def _load_torn(rank, world_size, folder):
    return load_checkpoint(folder)["epoch"]


@pytest.mark.slow
def test_all_processes_fall_back_together(tmp_path):
    save_checkpoint(tmp_path, state_of(1))
    save_checkpoint(tmp_path, state_of(2))
    tear(tmp_path / "checkpoint.pth", "half")
    assert run_ranks(_load_torn, 4, str(tmp_path)) == [1] * 4


# ============ disks ============


def _save_with_little_room(folder, results):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        save_checkpoint(folder, state_of(2, size=100_000))
        results.put("saved")
    except OSError as error:
        results.put(f"{type(error).__name__}: {error}")


def test_a_full_disk_is_one_sentence_and_the_last_file_is_untouched(tmp_path):
    save_checkpoint(tmp_path, state_of(1))
    before = (tmp_path / "checkpoint.pth").read_bytes()
    results = CONTEXT.SimpleQueue()
    process = CONTEXT.Process(target=_save_with_little_room, args=(tmp_path, results))
    process.start()
    process.join(60)
    message = results.get()
    assert message.startswith("CheckpointError: ") and "\n" not in message
    assert "checkpoint.pth cannot be written (File too large): it needs 0.4 MB" in message
    assert files(tmp_path) == ["checkpoint.pth"]
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("where", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_one_sentence(where, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / where
    with pytest.raises(CheckpointError, match="--dump_path .* cannot be written to") as error:
        checkpoint.check_writable(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(folder, state_of(1))
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_sentence(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        checkpoint.check_writable(tmp_path / "run")


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    checkpoint.check_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert files(tmp_path) == []


# ============ another network ============


def network(width=4, num_prototypes=5):
    torch.manual_seed(width)
    return nn.ModuleDict(
        {
            "conv1": nn.Conv2d(3, width, 3),
            "bn1": nn.BatchNorm2d(width),
            "projection_head": nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 4)),
            "prototypes": nn.Linear(4, num_prototypes, bias=False),
        }
    )


@pytest.mark.slow
def test_a_state_is_loaded_with_and_without_wrappers():
    source, target = network(), network()
    nn.init.constant_(source["conv1"].weight, 3.0)
    wrapped = {f"module._orig_mod.{name}": value for name, value in source.state_dict().items()}
    load_state(torch.compile(target), wrapped)
    assert torch.equal(target["conv1"].weight, source["conv1"].weight)
    other = nn.DataParallel(network())
    load_state(other, source.state_dict())
    assert torch.equal(other.module["conv1"].weight, source["conv1"].weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_prototypes": 7}, ["--nmb_prototypes", "weight is (5, 4) in the file, (7, 4) here"]),
        ({"width": 6}, ["--arch", "conv1.weight is (4, 3, 3, 3) in the file, (6, 3, 3, 3) here"]),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_network_names_the_flag_and_changes_nothing(change, words):
    target = network(**change)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=".") as error:
        load_state(target, network().state_dict(), "runs/a")
    assert all(word in str(error.value) for word in ["runs/a", "--dump_path", *words])
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_tensors_on_one_side_only_are_named():
    headless = network()
    del headless["projection_head"]
    with pytest.raises(CheckpointError, match="projection_head.0.weight is only in this network"):
        load_state(network(), headless.state_dict())
    with pytest.raises(CheckpointError, match="--hidden_mlp.*") as error:
        load_state(headless, network().state_dict())
    assert "projection_head.0.weight is only in the file" in str(error.value)


def test_tmpfs_that_is_really_full(tmp_path):
    mount = shutil.which("mount")
    command = f"{mount} -t tmpfs -o size=1m t {tmp_path} 2>/dev/null"
    if os.geteuid() != 0 or mount is None or os.system(command):
        pytest.skip("needs root and mount")
    try:
        save_checkpoint(tmp_path, state_of(1, size=100_000), keep_as="ckp-1")
        save_checkpoint(tmp_path, state_of(2, size=100_000))
        for _ in range(2):
            with pytest.raises(CheckpointError, match="No space left on device.*needs 0.4 MB"):
                save_checkpoint(tmp_path, state_of(3, size=100_000))
        assert load_checkpoint(tmp_path)["epoch"] == 2
        with pytest.raises(CheckpointError, match="No space left"):
            (tmp_path / "filler").write_bytes(bytes(os.statvfs(tmp_path).f_bavail * 4096))
            checkpoint.check_writable(tmp_path)
    finally:
        os.system(f"umount {tmp_path}")


# ============ other images ============


@pytest.mark.parametrize("known", [[], ["queue"], ["pseudo_labels"], ["memory_bank", "queue"]])
def test_images_of_other_names_are_refused_where_something_goes_by_their_order(known, caplog):
    state = {**state_of(1), "method": "m", "num_images": 4, "images_digest": "4-a"}
    state["method_state"] = {name: {} for name in known}

    def check(digest):
        checkpoint.check_same_run(
            state,
            method="m",
            networks=["model"],
            arguments=state["args"],
            num_images=4,
            images_digest=digest,
            folder="runs/a",
        )

    with caplog.at_level("INFO"):
        check("4-a")
        assert not caplog.records
        if {"pseudo_labels", "memory_bank"} & set(known):
            with pytest.raises(CheckpointError, match="runs/a .* images of other names"):
                check("4-b")
        else:
            check("4-b")
            assert "have other names than before" in caplog.text
    del state["images_digest"]  # of the version before
    check("4-b")
