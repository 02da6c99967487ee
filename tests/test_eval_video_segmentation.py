"""eval_video_segmentation.py: the files of DAVIS, whole runs, resumed, on two processes, misused."""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_video_segmentation
from src.evaluate import davis
from src.evaluate.segmentation_measures import measure_frame
from src.nets.backbones import build_backbone
from tests.davis_videos import write_davis
from tests.gloo import start_mains
from tests.runs import signal_handlers  # noqa: F401, used by name

NETWORK = shlex.split("--arch vit_tiny --depth 1 --width 0.34 --patch_size 4 --short_side 48")
QUICK = shlex.split("--workers 0 --device cpu --seed 3")


@pytest.fixture(autouse=True)
def handlers(signal_handlers):  # noqa: F811
    """Those of before, after every test."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_davis(tmp_path_factory.mktemp("davis") / "DAVIS")


def run(folder, data, *argv, network=NETWORK):
    words = [*QUICK, *network, "--data_path", str(data), "--dump_path", str(folder)]
    assert eval_video_segmentation.main([*words, *map(str, argv)]) == 0
    text = (Path(folder) / "eval_video_segmentation.json").read_text()
    assert text.count("\n") == 1  # one line
    return json.loads(text)


def files_of(folder):
    masks = sorted((Path(folder) / "davis").rglob("*.[pj][ns]*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in masks}


# ============ the files of DAVIS ============
def test_the_colours_are_those_of_pascal():
    colours = np.array(davis.palette()).reshape(-1, 3)
    first = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
    assert colours[:6].tolist() == [list(x) for x in first]
    assert colours[8].tolist() == [64, 0, 0] and colours[20].tolist() == [0, 64, 128]  # tvmonitor
    assert colours[255].tolist() == [224, 224, 192]  # void
    assert len({tuple(x) for x in colours.tolist()}) == 256


def test_a_mask_is_an_indexed_file_with_the_labels_in_it(tmp_path):
    labels = np.random.default_rng(0).integers(0, 256, (7, 9), dtype=np.uint8)
    davis.write_mask(tmp_path / "a.png", labels)
    assert np.array_equal(davis.read_mask(tmp_path / "a.png"), labels)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P" and image.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    Image.new("RGB", (3, 3)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="b.png has colours instead of labels"):
        davis.read_mask(tmp_path / "b.png")


def test_videos_are_those_of_the_split_with_their_masks(data):
    for path in (data, data.parent):
        videos = davis.open_davis(str(path), "val")
        assert [video.name for video in videos] == ["bear", "dogs"]
        assert [x.name for x in videos[0].frames] == [f"{i:05}.jpg" for i in range(5)]
        assert [x.name for x in videos[0].masks] == [f"{i:05}.png" for i in range(5)]


def test_frames_have_the_published_size_at_480_pixels_and_whole_strides_below():
    def size(*argv):
        return davis.size_of_frame(*argv)

    assert (
        size(480, 854, 480, 8) == size(480, 854, 480, 16) == size(480, 854, 480, 32) == (480, 832)
    )
    assert size(1080, 1920, 480, 8) == (480, 832) and size(854, 480, 480, 8) == (832, 480)
    assert size(480, 910, 480, 16) == (480, 896)
    assert size(480, 854, 480, 14) == (476, 854) and size(480, 854, 96, 8) == (96, 168)
    assert size(480, 480, 100, 8) == (96, 96)
    with pytest.raises(ValueError, match="--short_side 4 .* 8 x 8 px"):
        size(480, 854, 4, 8)


def test_frames_are_resized_as_published(data):
    path = davis.open_davis(str(data), "val")[0].frames[0]
    whole = davis.Frames([path], 3, (48, 64))[0]
    with Image.open(path) as image:
        assert np.array_equal(whole.permute(1, 2, 0).numpy(), np.asarray(image))
    narrow = davis.Frames([path], 3, (48, 56))[0]  # half a pixel is between two, without smoothing
    x = (np.arange(56) + 0.5) * 64 / 56 - 0.5
    left, share = np.floor(x).astype(int).clip(0), (x - np.floor(x)).clip(0)
    rows = whole.numpy().astype(np.float64)
    expected = rows[..., left] * (1 - share) + rows[..., (left + 1).clip(max=63)] * share
    assert np.abs(narrow.numpy() - expected).max() <= 1


# ============ whole runs ============
def test_squares_are_followed_measured_and_written_in_the_layout_of_the_benchmark(tmp_path, data):
    result = run(tmp_path, data)
    assert result["j_mean"] > 50 and result["jf_mean"] == (result["j_mean"] + result["f_mean"]) / 2
    assert set(result["videos"]) == {"bear", "dogs"}
    video = davis.open_davis(str(data), "val")[0]
    folder = tmp_path / "davis" / "bear"
    assert sorted(x.name for x in folder.iterdir()) == [f"{i:05}.png" for i in range(5)]
    assert (folder / "00000.png").read_bytes() == video.masks[
        0
    ].read_bytes()  # the one that is given
    measures = np.array(
        [
            measure_frame(davis.read_mask(folder / path.name), davis.read_mask(path), 2)
            for path in video.masks[1:-1]  # neither the first frame nor the last one
        ]
    )
    stored = json.loads((folder.parent / "bear.json").read_text())["objects"]
    for number, one in enumerate(stored):
        assert np.array_equal(one["j"], measures[:, number, 0])
        assert np.array_equal(one["f"], measures[:, number, 1])
    assert Image.open(folder.parent / "sheet.png").width > 500


@pytest.mark.slow
def test_the_flags_of_the_method_change_the_masks(tmp_path, data):
    before = files_of_masks(tmp_path / "all", data)
    for i, words in enumerate(("--topk 1", "--n_last_frames 0", "--size_mask_neighborhood 1")):
        assert files_of_masks(tmp_path / str(i), data, *words.split()) != before, words
    assert files_of_masks(tmp_path / "cold", data, "--temperature", 0.001) != before
    assert files_of_masks(tmp_path / "bs", data, "--bs", 1) == before


def files_of_masks(folder, data, *argv):
    run(folder, data, *argv)
    return {
        name: x for name, x in files_of(folder).items() if name.endswith("png") and "/0" in name
    }


@pytest.mark.slow
def test_a_resnet_and_a_vit_with_registers_and_other_strides_work(tmp_path, data):
    resnet = shlex.split("--arch resnet10 --width 0.125 --stem small --short_side 48")
    assert run(tmp_path / "resnet", data, network=resnet)["jf_mean"] > 0  # 8 px
    vit = shlex.split("--arch vit_tiny --depth 1 --width 0.34 --patch_size 7 --num_registers 2")
    assert run(tmp_path / "vit", data, network=[*vit, "--short_side", "49"])["jf_mean"] > 0
    with pytest.raises(ValueError, match="--arch alexnet makes 36 positions of an image of 224"):
        run(tmp_path / "alexnet", data, network=["--arch", "alexnet"])


def test_weights_in_a_file_say_the_network(tmp_path, data):
    model = build_backbone("vit_tiny", depth=1, patch_size=4, img_size=32)
    torch.save({"teacher": model.state_dict()}, tmp_path / "dino.pth")
    network = ["--pretrained_weights", str(tmp_path / "dino.pth"), "--short_side", "48"]
    settings = run(tmp_path / "out", data, network=network)["settings"]
    assert (settings["arch"], settings["patch_size"]) == ("vit_tiny", 4)
    assert settings["std"][0] == 0.228  # as published


def test_a_run_that_was_stopped_goes_on_and_ends_as_one_that_was_not(tmp_path, data, monkeypatch):
    expected = run(tmp_path / "whole", data)
    write, written = davis.write_mask, []

    def write_and_signal(path, labels):
        written.append(path)
        if len(written) == 8:  # in the middle of the second video
            os.kill(os.getpid(), signal.SIGTERM)
        write(path, labels)

    monkeypatch.setattr(davis, "write_mask", write_and_signal)
    words = [*QUICK, *NETWORK, "--data_path", str(data), "--dump_path", str(tmp_path / "stopped")]
    assert eval_video_segmentation.main(words) == 128 + signal.SIGTERM
    assert not (tmp_path / "stopped" / "eval_video_segmentation.json").exists()
    assert len(written) < 11
    written.clear()
    assert run(tmp_path / "stopped", data) == expected
    assert {path.parent.name for path in written} == {"dogs"}  # the first one was done
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_masks_made_with_other_settings_are_not_gone_on_with(tmp_path, data):
    run(tmp_path, data)
    with pytest.raises(ValueError, match="holds masks with topk 5, not 4: use another --dump_path"):
        run(tmp_path, data, "--topk", 4)


def test_masks_of_other_videos_with_the_same_names_are_not_gone_on_with(tmp_path, data):
    run(tmp_path, data)
    shutil.copytree(data, tmp_path / "other")
    mask = next((tmp_path / "other" / "Annotations").rglob("*.png"))
    mask.write_bytes(mask.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="holds masks of another video named .*: use another"):
        run(tmp_path, tmp_path / "other")


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path, data):
    expected = run(tmp_path / "one", data)
    words = [*QUICK, *NETWORK, "--data_path", str(data)]
    ranks = start_mains("eval_video_segmentation", tmp_path / "two", words, 2)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].read()
    found = json.loads((tmp_path / "two" / "eval_video_segmentation.json").read_text())
    assert found == expected and files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_videos_with_the_first_mask_only_are_segmented_and_not_measured(tmp_path, capsys):
    data = write_davis(tmp_path / "DAVIS", names=("bear",), frames=4)
    for number in (1, 2, 3):
        (data / "Annotations" / "480p" / "bear" / f"{number:05}.png").unlink()
    result = run(tmp_path / "out", data)
    assert "jf_mean" not in result and "are not measured" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "davis" / "bear").iterdir())) == 4


def test_a_video_without_objects_is_segmented_and_not_measured(tmp_path, data, capsys):
    empty = write_davis(tmp_path / "DAVIS", names=("bear",), frames=4, objects=0)
    result = run(tmp_path / "alone", empty)
    assert "jf_mean" not in result and "are not measured" in capsys.readouterr().out
    masks = sorted((tmp_path / "alone" / "davis" / "bear").iterdir())
    assert len(masks) == 4 and not any(davis.read_mask(mask).any() for mask in masks)
    mixed = tmp_path / "mixed" / "DAVIS"
    shutil.copytree(data, mixed)
    for mask in (mixed / "Annotations" / "480p" / "bear").iterdir():
        davis.write_mask(mask, np.zeros_like(davis.read_mask(mask)))
    assert set(run(tmp_path / "mixed_out", mixed)["videos"]) == {"dogs"}


# ============ misuse ============
@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda d: d / "JPEGImages", "has no JPEGImages: give the folder DAVIS"),
        (lambda d: d / "JPEGImages" / "480p", "JPEGImages has no 480p or Full-Resolution"),
        (lambda d: d / "ImageSets" / "2017" / "val.txt", "there is no .*val.txt, which names"),
        (lambda d: d / "JPEGImages" / "480p" / "bear", "the video bear has 0 frames"),
        (lambda d: d / "Annotations" / "480p" / "bear" / "00000.png", "00000.png, the first mask"),
    ],
)
def test_what_is_missing_is_named(tmp_path, spoil, sentence):
    data = write_davis(tmp_path / "DAVIS", names=("bear",), frames=3)
    path = spoil(data)
    path.rename(path.with_name("away"))
    with pytest.raises((ValueError, FileNotFoundError), match=f"--data_path .*{sentence}"):
        run(tmp_path / "out", data)


def test_a_frame_that_cannot_be_read_and_no_data_at_all_are_one_sentence(tmp_path):
    data = write_davis(tmp_path / "DAVIS", names=("bear",), frames=3)
    (data / "JPEGImages" / "480p" / "bear" / "00001.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="00001.jpg cannot be read as an image"):
        run(tmp_path / "out", data)
    with pytest.raises(ValueError, match="--data_path must be given: the folder DAVIS"):
        eval_video_segmentation.main([*QUICK, "--dump_path", str(tmp_path)])
