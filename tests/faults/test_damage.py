"""Checkpoints that are cut or have other bits: refused in a sentence, or with all values right."""

import shutil
import sys

import pytest
import torch

from src.errors import CheckpointError
from src.nets.weights import load_weights
from src.run.checkpoint import load_checkpoint
from tests.faults import methods

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
NAMES = ("checkpoint.pth", "checkpoint.prev.pth")


def cut(data, draws):
    return data[: draws.randrange(len(data))]


def flip_bits(data, draws):
    for _ in range(draws.choice([1, 1, 1, 4, 64])):
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    return data


def blank_a_page(data, draws):
    start = draws.randrange(len(data)) & -4096
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    return data


def exchange_pages(data, draws):
    first, second = (draws.randrange(len(data) // 4096) * 4096 for _ in range(2))
    page = data[first : first + 4096]
    data[first : first + 4096] = data[second : second + 4096]
    data[second : second + 4096] = page
    return data


DAMAGES = [cut, flip_bits, blank_a_page, exchange_pages]
every_damage = pytest.mark.parametrize("damage", DAMAGES)


@every_damage
@pytest.mark.parametrize("method", ["swav", "dino", "deepclusterv2"])
def test_a_damaged_checkpoint_is_the_one_before_or_has_all_values_right(
    method, damage, uninterrupted, draws, rounds, figures, tmp_path
):
    source, _ = uninterrupted(method)
    originals = {name: (source / name).read_bytes() for name in NAMES}
    states = [torch.load(source / name, weights_only=True) for name in NAMES]
    for trial in range(15 + rounds):
        folder = tmp_path / str(trial)
        folder.mkdir()
        damaged = draws.choice([NAMES[:1], NAMES[:1], NAMES])
        for name in NAMES:
            data = bytearray(originals[name])
            (folder / name).write_bytes(damage(data, draws) if name in damaged else data)
        with figures.fault(f"checkpoint damaged: {damage.__name__.replace('_', ' ')}"):
            try:
                found = load_checkpoint(folder)
            except CheckpointError as error:
                assert damaged == NAMES, f"trial {trial}: {error}"
                assert str(folder / NAMES[0]) in str(error) and "\n" not in str(error)
            else:
                differences = [methods.first_difference(found, state) for state in states]
                assert None in differences, f"trial {trial}: {differences}"
        shutil.rmtree(folder)


@every_damage
def test_a_damaged_file_of_weights_is_refused_or_has_all_values_right(
    damage, uninterrupted, draws, rounds, figures, tmp_path
):
    source, _ = uninterrupted("rotnet")
    original = (source / "checkpoint.pth").read_bytes()
    expected = torch.load(source / "checkpoint.pth", weights_only=True)["model"]
    path = tmp_path / "released.pth"
    for trial in range(15 + rounds):
        path.write_bytes(damage(bytearray(original), draws))
        network = _Holder(expected)
        with figures.fault(f"weights damaged: {damage.__name__.replace('_', ' ')}"):
            try:
                load_weights(network, path)
            except (CheckpointError, ValueError) as error:
                assert str(path) in str(error) and "\n" not in str(error), f"trial {trial}: {error}"
            else:
                difference = methods.first_difference(dict(network.state_dict()), dict(expected))
                assert difference is None, f"trial {trial}: {difference}"


class _Holder(torch.nn.Module):
    """A module with zeros under the names of a state dict."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            holder = self
            *parts, last = name.split(".")
            for part in parts:
                if part not in holder._modules:
                    holder.add_module(part, torch.nn.Module())
                holder = holder._modules[part]
            holder.register_buffer(last, torch.zeros_like(value))


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    digits, uninterrupted, draws, figures, tmp_path
):
    expected, _ = uninterrupted("swav")
    words = methods.arguments("swav", digits)
    for damage in DAMAGES[:2]:
        folder = tmp_path / damage.__name__
        shutil.copytree(expected, folder)
        (folder / "run.lock").unlink(missing_ok=True)
        path = folder / "checkpoint.pth"
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        path.write_bytes(
            data[:middle] if damage is cut else data[:middle] + b"damage" + data[middle + 6 :]
        )
        with figures.fault("run started on a damaged checkpoint"):
            [run] = methods.begin("swav", folder, words)
            ending = run.ending(within=methods.RUN_SECONDS)
            assert ending.status == 0 and str(folder / NAMES[1]) in ending.screen, ending.screen
            methods.check_equal(folder, expected, damage.__name__)
            assert (folder / "checkpoint.pth.unreadable").exists()
