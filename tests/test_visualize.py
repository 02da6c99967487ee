"""visualize.py: attention maps, their masks and pictures, from every kind of input; multi-crops."""

import ast
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from src import dist
from src.data.datasets import open_dataset, usual_std
from src.data.multicrop import MultiCropDataset, crop_and_resize
from src.nets.backbones import build_backbone
from src.nets.dino_head import DINOHead, MultiCropWrapper
from src.pictures import attention as attention_maps
from src.pictures import attention_command, frames, sheets
from src.pictures import crops as crop_pictures
from src.pictures import flags as picture_flags
from src.run import checkpoint, image_flags
from src.run import flags as cli

ROOT = Path(__file__).parent.parent
QUICK = ["--device", "cpu", "--seed", "3"]
TINY = ["--arch", "vit_tiny", "--depth", "1", "--width", "0.34", "--patch_size", "8"]
SMALL = [*QUICK, *TINY, "--image_size", "32", "48"]


def attend(folder, *argv):
    assert visualize.main(["attention", "--dump_path", str(folder), *map(str, argv)]) == 0
    return folder


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def photo(path, height=40, width=50, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three images, and a file that is none."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    for i, name in enumerate(("b.png", "a.jpg", "more/c.png")):
        photo(tmp_path / "images" / name, seed=i)
    (tmp_path / "images" / "aa.png").write_bytes(b"no image")
    return tmp_path / "images"


# ============ mathematics ============
def test_the_maps_are_the_class_tokens_row_without_itself_and_the_registers():
    attention = torch.rand(2, 3, 1 + 2 + 6, 1 + 2 + 6)
    maps = attention_maps.class_attention(attention, 2, 3, num_registers=2)
    assert maps.shape == (2, 3, 2, 3)
    for b, head, row, col in itertools.product(range(2), range(3), range(2), range(3)):
        assert maps[b, head, row, col] == attention[b, head, 0, 3 + 3 * row + col]


def test_a_mask_is_the_smallest_set_of_patches_with_the_mass():
    maps = torch.rand(4, 2, 5, generator=torch.Generator().manual_seed(0))
    for mass in (0.05, 0.3, 0.6, 0.95, 1.0):
        masks = attention_maps.keep_mass(maps, mass)
        assert masks.shape == maps.shape and masks.dtype == torch.bool
        for values, mask in zip(maps.flatten(1).double(), masks.flatten(1), strict=True):
            needed = mass * values.sum() * (1 - 1e-9)
            sizes = itertools.groupby(
                (s for n in range(11) for s in itertools.combinations(range(10), n)), len
            )
            smallest = next(
                n for n, sets in sizes if any(values[list(s)].sum() >= needed for s in sets)
            )
            assert values[mask].sum() >= needed and mask.sum() == smallest


def test_a_mask_is_that_of_the_published_rule():
    maps = torch.rand(6, 30, 30, generator=torch.Generator().manual_seed(1)).softmax(-1) ** 4
    values = maps.flatten(1).double().numpy()
    for mass in (0.3, 0.6, 0.9):  # drop the weakest while their sum is no more than 1 - mass
        order = values.argsort(1)
        shares = np.cumsum(np.take_along_axis(values, order, 1), 1) / values.sum(1, keepdims=True)
        expected = np.zeros(values.shape, bool)
        np.put_along_axis(expected, order, shares > 1 - mass, 1)
        found = attention_maps.keep_mass(maps, mass)
        assert np.array_equal(found.flatten(1).numpy(), expected)


def test_equal_patches_are_counted_exactly():
    maps = torch.full((2, 199), 1 / 7)
    for n in (1, 199, 223, 398):  # rounding must not add a patch
        assert attention_maps.keep_mass(maps, n / 398).sum() == n
    assert not attention_maps.keep_mass(torch.zeros(1, 2, 2), 0.5).any()


def test_an_image_is_resized_as_published_and_cut_to_whole_patches():
    image = torch.arange(60, dtype=torch.uint8).view(1, 6, 10).expand(3, -1, -1)
    assert torch.equal(attention_maps.fit_image(image, (6, 10), 1), image)
    assert torch.equal(attention_maps.fit_image(image, (6, 10), 4), image[:, :4, :8])
    assert attention_maps.fit_image(image, (13, 31), 8).shape == (3, 8, 24)
    assert attention_maps.fit_image(image, [12], 4).shape == (3, 12, 20)
    assert attention_maps.fit_image(image.mT, [12], 4).shape == (3, 20, 12)
    with pytest.raises(ValueError, match=r"--image_size 4 30 .* --patch_size 8"):
        attention_maps.fit_image(image, (4, 30), 8)


def test_a_batch_has_as_many_images_as_its_attention_may_take():
    model = torch.nn.Module()
    model.num_heads, model.num_registers, model.patch_size = 6, 0, 8

    def at_once(height, width):
        return attention_maps.images_at_once(model, torch.empty(3, height, width))

    assert at_once(32, 32) == attention_maps.MOST_IMAGES
    assert at_once(480, 480) == 1 and at_once(224, 224) == (256 << 20) // (24 * 785**2)
    with pytest.raises(ValueError, match=r"--image_size 800 8000 makes 100,001 tokens.* smaller"):
        at_once(800, 8000)


# ============ pictures ============
def test_pictures_show_where_the_attention_is():
    image = torch.full((3, 4, 6), 100, dtype=torch.uint8)
    maps = torch.zeros(2, 2, 3)
    maps[0, 1, 2], maps[1, 0, 0], maps[1, 0, 1] = 1.0, 0.7, 0.3
    pictures = attention_maps.draw_attention(image, maps, 0.6)
    heat = pictures["attn-head0"].astype(int)
    assert heat.shape == (4, 6, 3) and (heat[2:, 4:] == heat[3, 5]).all()
    assert (heat[2:, 4:].sum(2) > heat[0, 0].sum()).all() and (heat[:2] == heat[0, 0]).all()
    painted = {name: (x != 100).any(2) for name, x in pictures.items() if "mask" in name}
    assert painted["mask_th0.6_head0"].nonzero()[0].tolist() == [2, 2, 3, 3]
    assert painted["mask_th0.6_head1"].sum() == 4 and painted["mask_th0.6_head1"][:2, :2].all()
    both = painted["mask_th0.6_head0"] | painted["mask_th0.6_head1"]
    assert np.array_equal(painted["masks_th0.6"], both)
    assert painted["mask_th0.6_mean"].sum() == 8  # 0.5 and 0.35 of the mean's mass
    assert (pictures["overlay-head0"][3, 5] != pictures["overlay-head0"][0, 0]).any()
    assert np.array_equal(pictures["img"], image.permute(1, 2, 0).numpy())
    names = {re.sub(r"\d$", "", name) for name in attention_maps.draw_attention(image, maps)}
    assert names == {"img", "attn-head", "attn-mean", "overlay-head", "overlay-mean"}


def test_other_channels_than_three_and_flat_maps_are_drawn():
    for channels, shown in ((1, [0, 0, 0]), (5, [0, 1, 2])):
        image = torch.arange(channels, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 4, 4)
        pictures = attention_maps.draw_attention(image, torch.full((1, 2, 2), 0.25), 0.5)
        assert pictures["img"][0, 0].tolist() == shown
        assert (pictures["attn-head0"] == pictures["attn-head0"][0, 0]).all()


def test_a_mask_is_tinted_and_outlined():
    mask = np.zeros((6, 6), bool)
    mask[1:5, 1:6] = True
    painted = attention_maps.paint_mask(np.full((6, 6, 3), 100, np.uint8), mask, (200, 0, 0))
    assert (painted[~mask] == 100).all()
    inside = np.zeros((6, 6), bool)
    inside[2:4, 2:5] = True
    assert (painted[inside] == (150, 50, 50)).all()
    assert (painted[mask & ~inside] == (200, 0, 0)).all()


def test_an_animation_keeps_a_bounded_number_of_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(attention_maps, "GIF_FRAMES", 3)
    animation = attention_maps.Animation()
    for i in range(5):  # the second is of another shape
        picture = np.full((8, 9 if i == 1 else 8, 3), 50 * i, np.uint8)
        animation.add([picture, picture], side=16)
    assert animation.left_out == 2
    animation.save(tmp_path / "a.gif", 4)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (3, (32, 16), 250)


# ============ inputs ============
def test_a_folder_is_sorted_and_its_broken_files_are_named_and_left_out(folder, caplog):
    found, count = frames.open_frames(folder)
    assert count == 4
    assert [name for name, _ in found] == ["a", "b", "more/c"]
    assert "aa.png" in caplog.text and "left out" in caplog.text


def test_images_that_differ_in_suffix_alone_do_not_overwrite_each_other(folder):
    photo(folder / "a.png")
    assert [name for name, _ in frames.open_frames(folder)[0]][:2] == ["a_jpg", "a_png"]


def test_frames_are_decoded_when_they_are_due_and_batched_by_shape():
    decoded = []

    def source():
        for i, side in enumerate((2, 2, 2, 3, 2)):
            decoded.append(i)
            yield str(i), torch.zeros(3, side, side)

    batches = frames.in_batches(source(), lambda image: 2)
    assert next(batches)[0] == ["0", "1"] and decoded == [0, 1, 2]
    assert [names for names, _ in batches] == [["2"], ["3"], ["4"]]
    assert list(frames.in_batches(iter([]), lambda image: 2)) == []


def make_video(path, sides=(20, 24), count=5, noise=0):
    (height, width), rng = sides, np.random.default_rng(0)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(count):
            pixels = np.full((height, width, 3), 200 // count * i + 20, np.uint8)
            pixels += rng.integers(0, noise + 1, pixels.shape, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def make_gif(path, count=5):
    images = [Image.new("RGB", (24, 20), (40 * i + 20,) * 3) for i in range(count)]
    images[0].save(path, save_all=True, append_images=images[1:])
    return path


@pytest.mark.parametrize("name", ["walk.mp4", "walk.gif", "walk.webp"])
def test_the_frames_of_videos_and_animations_come_one_by_one(tmp_path, name):
    path = (make_video if name == "walk.mp4" else make_gif)(tmp_path / name)
    found, count = frames.open_frames(path)
    assert count in (5, None)
    found = list(found)
    assert [name for name, _ in found] == [f"frame_{i:06}" for i in range(5)]
    for i, (_, image) in enumerate(found):
        assert image.shape == (3, 20, 24) and image.dtype == torch.uint8
        assert abs(image.float().mean() - (40 * i + 20)) < 6
    grey, _ = frames.open_frames(path, in_chans=1)
    assert next(grey)[1].shape == (1, 20, 24)


def test_a_video_without_the_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="--image_path .*a.mp4 .* package av: pip install av"):
        frames.open_frames(tmp_path / "a.mp4")
    found, _ = frames.open_frames(photo(tmp_path / "a.png"))  # nothing else needs it
    assert next(found)[1].shape == (3, 40, 50)


def test_the_damaged_parts_of_a_video_are_told_and_left_out(tmp_path, caplog):
    path = make_video(tmp_path / "walk.mp4", (48, 64), count=40, noise=50)
    data = path.read_bytes()
    third = len(data) // 3
    path.write_bytes(data[:third] + bytes(third) + data[2 * third :])
    found = [name for name, _ in frames.open_frames(path)[0]]
    assert 10 < len(found) < 40 and found[-1] == f"frame_{len(found) - 1:06}"
    assert "walk.mp4 are damaged" in caplog.text


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png", "a.txt"])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"neither an image nor a video")
    with pytest.raises(ValueError, match=f"--image_path .*{name} cannot be read"):
        list(frames.open_frames(tmp_path / name)[0])


def test_paths_that_are_wrong_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="--image_path .*nowhere does not exist"):
        frames.open_frames(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no image in it"):
        frames.open_frames(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 1 images is readable"):
        list(frames.open_frames(tmp_path)[0])


# ============ attention ============
def test_the_bare_command_draws_digits_and_says_that_the_network_is_untrained(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert visualize.main(["attention", *QUICK, "--depth", "1"]) == 0
    out = tmp_path / "plots" / "attention"
    assert sorted(x.name for x in out.iterdir() if x.is_dir())[0] == "image_000000"
    assert len(list(out.glob("image_*/sheet.png"))) == 4 and (out / "sheet.png").is_file()
    said = capsys.readouterr().out
    assert "UNTRAINED" in said and "sheet.png" in said
    assert not (out / "attention.gif").exists()  # they are no sequence


def test_one_image_gives_the_published_files(tmp_path):
    image = photo(tmp_path / "cat.png")
    out = attend(tmp_path / "out", *SMALL, "--image_path", image, "--threshold", "0.6")
    heads = [f"head{i}" for i in range(3)]
    expected = {"img.png", "attn-mean.png", "overlay-mean.png", "sheet.png", "masks_th0.6.png"}
    expected |= {f"{kind}-{head}.png" for head in heads for kind in ("attn", "overlay")}
    expected |= {f"mask_th0.6_{name}.png" for name in [*heads, "mean"]}
    assert {x.name for x in out.iterdir()} == expected
    assert read(out / "attn-head2.png").shape == read(out / "img.png").shape == (32, 48, 3)
    assert len(np.unique(read(out / "attn-head0.png").reshape(-1, 3), axis=0)) <= 4 * 6


def test_what_is_no_whole_patch_is_cut_off(tmp_path):
    image = photo(tmp_path / "cat.png")
    out = attend(tmp_path / "out", *QUICK, *TINY, "--image_path", image, "--image_size", "37", "50")
    assert read(out / "img.png").shape == (32, 48, 3)
    whole = attention_maps.fit_image(
        torch.from_numpy(read(image).copy()).permute(2, 0, 1), (37, 50), 1
    )
    assert np.array_equal(read(out / "img.png"), whole[:, :32, :48].permute(1, 2, 0).numpy())


def test_a_folder_gives_a_folder_an_image_a_sheet_and_an_animation(tmp_path, folder, capsys):
    out = attend(tmp_path / "out", *SMALL, "--image_path", folder, "--fps", "5")
    assert {x.parent.relative_to(out).as_posix() for x in out.glob("**/img.png")} == {
        *("a", "b", "more/c"),
    }
    assert "aa.png" in capsys.readouterr().out
    with Image.open(out / "attention.gif") as animation:
        assert (animation.n_frames, animation.info["duration"]) == (3, 200)
    assert (out / "sheet.png").is_file()


@pytest.mark.slow
def test_every_image_has_its_own_attention_whatever_the_batch(tmp_path, folder, monkeypatch):
    out = attend(tmp_path / "together", *SMALL, "--image_path", folder)
    monkeypatch.setattr(attention_maps, "MOST_IMAGES", 1)
    alone = attend(tmp_path / "alone", *SMALL, "--image_path", folder)
    for name in ("a", "b", "more/c"):
        pair = [read(x / name / "attn-head1.png").astype(int) for x in (out, alone)]
        assert np.abs(pair[0] - pair[1]).max() <= 6  # a step of the colour map, by rounding
    assert (read(out / "a/attn-head1.png") != read(out / "b/attn-head1.png")).any()
    other = attend(tmp_path / "other", *SMALL, "--image_path", folder / "a.jpg", "--seed", "4")
    assert (read(out / "a/attn-head1.png") != read(other / "attn-head1.png")).any()


def test_frames_can_be_left_out_and_limited_and_progress_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention_command, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(attention_maps, "MOST_IMAGES", 1)
    video = make_video(tmp_path / "walk.mp4", count=9)
    options = ["--image_path", video, "--every", "2", "--num_images", "3"]
    out = attend(tmp_path / "out", *SMALL, *options, "--threshold", "0.5")
    assert sorted(x.parent.name for x in out.glob("*/img.png")) == [
        *("frame_000000", "frame_000002", "frame_000004"),
    ]
    with Image.open(out / "attention.gif") as animation:
        assert animation.n_frames == 3 and animation.width == 3 * 240  # image, mean, masks
    said = capsys.readouterr().out
    assert re.search(r"image 2 of 3, [\d.e+]+ images/s, ETA 0:00:0\d", said)


def make_run(folder, **changes):
    """A run of DINO whose student and teacher differ: args.json and checkpoint."""
    arguments = {
        **{"arch": "vit_tiny", "patch_size": 4, "num_registers": 2, "depth": 2, "width": 0.34},
        **{"stem": "imagenet", "zero_init_residual": False, "img_size": None, "in_chans": 3},
        **{"global_crops_size": 16, "local_crops_size": 8, "local_crops_number": 2, "seed": 5},
        **{"global_crops_scale": [0.5, 1.0], "local_crops_scale": [0.2, 0.4]},
        **{"mean": [0.4] * 3, "std": [0.2] * 3, "data_path": "digits", "preset": "tiny"},
        **{"blur": [1.0, 0.1, 0.5], "solarize": [0.0, 0.2, 0.0], "no_flip": True},
        **{"color_jitter": [0.4, 0.4, 0.0, 0.0], "grayscale": 0.0, "interpolation": "bicubic"},
        **changes,
    }
    networks = {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        names = ("arch", "patch_size", "num_registers", "depth", "width")
        backbone = build_backbone(**{name: arguments[name] for name in names}, img_size=16)
        networks[name] = MultiCropWrapper(backbone, DINOHead(backbone.num_features, 8))
    state = {name: module.state_dict() for name, module in networks.items()}
    checkpoint.save_checkpoint(folder, {**state, "epoch": 1})
    (folder / "args.json").write_text(json.dumps(arguments))
    return {name: module.backbone.eval() for name, module in networks.items()}


@pytest.mark.slow
@pytest.mark.parametrize("key", ["teacher", "student"])
def test_a_run_needs_no_other_flag_and_its_teacher_is_shown(tmp_path, key):
    networks = make_run(tmp_path / "run")
    options = ["--pretrained", str(tmp_path / "run"), "--num_images", "1"]
    options += ["--checkpoint_key", key] if key == "student" else []
    assert visualize.main(["attention", "--device", "cpu", *options]) == 0
    out = tmp_path / "run" / "plots" / "attention"  # beside the run
    image = open_dataset("digits").load(0)
    image = attention_maps.fit_image(image, (32, 32), 4)  # 480 / 224 of 16 px, whole patches
    assert np.array_equal(read(out / "img.png"), image.permute(1, 2, 0).numpy())
    with torch.no_grad():
        attention = networks[key].get_last_selfattention(((image / 255 - 0.4) / 0.2)[None])
    maps = attention[0, :, 0, 3:].view(-1, 8, 8)  # after the class token and two registers
    expected = attention_maps.draw_attention(image, maps)
    for name in ("attn-head0", "attn-head2", "attn-mean"):
        assert np.abs(read(out / f"{name}.png").astype(int) - expected[name]).max() <= 6


def test_a_file_of_weights_says_what_network_it_is_for(tmp_path):
    torch.manual_seed(0)
    model = build_backbone("vit_tiny", patch_size=4, img_size=32, depth=1, num_registers=1)
    torch.save(model.state_dict(), tmp_path / "released.pth")
    argv = ["attention", "--pretrained_weights", str(tmp_path / "released.pth")]
    args = visualize.parse_args(argv)
    assert (args.arch, args.patch_size, args.num_registers, args.depth) == ("vit_tiny", 4, 1, 1)
    assert args.image_size == [68, 68]  # 480 / 224 of 32 px
    args = visualize.parse_args([*argv, "--image_size", "24"])
    assert args.image_size == [24]
    image = photo(tmp_path / "a.png")
    out = attend(tmp_path / "out", *argv[1:], *QUICK, "--image_path", image, "--image_size", "24")
    assert read(out / "img.png").shape == (24, 28, 3)  # 24 x 30, whole patches


def test_images_are_normalised_as_dino_does_unless_told_otherwise(tmp_path):
    path = photo(tmp_path / "a.png")
    args = visualize.parse_args(["attention", "--image_path", str(path)])
    assert picture_flags.open_images(args)[2] == ((0.485, 0.456, 0.406), [0.229, 0.224, 0.225])
    args = visualize.parse_args(["attention", "--mean", "0", "0", "0", "--std", "1", "1", "1"])
    assert picture_flags.open_images(args)[2] == ([0.0] * 3, [1.0] * 3)
    args = visualize.parse_args(["attention", "--image_path", str(path), "--in_chans", "1"])
    (mean,), (std,) = picture_flags.open_images(args)[2]
    assert mean == pytest.approx(0.449) and std == pytest.approx(0.226)
    assert usual_std([0.3]) == [0.3]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--arch", "resnet50"], "--arch resnet50 has no class token"),
        (["--arch", "xcit_small_12_p16"], "--arch xcit_small_12_p16 has no class token"),
        (["--threshold", "60"], "--threshold 60 is a share"),
        (["--image_size", "1", "2", "3"], "--image_size has 3 values"),
        (["--image_size", "4"], "--image_size 4 4 leaves no whole patch of --patch_size 8"),
        (["--image_path", "nowhere"], "--image_path nowhere does not exist"),
        (["--data_path", "nowhere"], "--data_path nowhere does not exist"),
        (["--pretrained", "nowhere"], "no weights file nowhere"),
        (["--mean", "0.5"], "--mean has 1 values and --in_chans is 3"),
        (["--device", "abacus"], "--device must be"),
        (["--depth", "0"], "must be above 0"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, capsys, flags, sentence):
    network = [] if {"--arch", "--pretrained"} & {*flags} else TINY
    command = ["attention", "--dump_path", str(tmp_path), *network, *flags]
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: visualize.main(command))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error and error.count("\n") == 1


def test_weights_that_are_not_finite_stop_the_script(tmp_path):
    model = build_backbone("vit_tiny", patch_size=8, img_size=32, depth=1)
    torch.nn.init.constant_(model.cls_token, torch.nan)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    options = [*QUICK, "--pretrained", tmp_path / "w.pth", "--image_size", "16"]
    with pytest.raises(ValueError, match="--pretrained .*w.pth makes attention that is not finite"):
        attend(tmp_path / "out", *options)


# ============ crops ============
def draw(folder, *argv):
    assert visualize.main(["crops", "--dump_path", str(folder), *map(str, argv)]) == 0
    return read(folder / "plots" / "multicrop.png")


def test_the_windows_are_those_that_the_crops_are_cut_from(tmp_path):
    dataset = open_dataset(str(tmp_path)) if photo(tmp_path / "a.png", 37, 61) else None
    crops = MultiCropDataset(dataset, [2, 3], [16, 8], [0.4, 0.1], [1.0, 0.4], seed=4)
    image = dataset.load(0)
    for epoch in (0, 5):
        parts, _ = crops[epoch, 0]
        windows = crop_pictures.crop_windows(crops, epoch, 0, *image.shape[1:])
        views = [view for part in parts for view in part]
        assert len(windows) == len(views) == 5
        for window, view in zip(windows, views, strict=True):
            again = crop_and_resize(image, window, view.shape[-1], "bilinear")[0]
            assert torch.equal(again, view)


def tiles_of(sheet, boxes):
    """The pixels of each tile of a row, group by group."""
    return [[sheet[top:bottom, left:right] for left, top, right, bottom in x] for x in boxes]


def test_the_bare_command_draws_the_crops_of_digits(tmp_path, capsys, drawn):
    sheet = draw(tmp_path, "--num_images", "3")
    rows = drawn["multicrop.png"].boxes
    assert len(rows) == 3
    for boxes in rows:
        tiles = tiles_of(sheet, boxes)
        # The image, two crops of 16 px and two of 8 px: enlarged by one factor, none cut or covered.
        assert [[tile.shape for tile in x] for x in tiles] == [
            [(192, 192, 3)],
            [(192, 192, 3)] * 2,
            [(96, 96, 3)] * 2,
        ]
        crops = [*boxes[1], *boxes[2]]
        for (left, top, right, bottom), colour in zip(
            crops, sheets.distinct_colours(4), strict=True
        ):
            frame = sheet[top - 3 : bottom + 3, left - 3 : right + 3]
            assert (frame[:3] == colour).all() and (frame[:, -3:] == colour).all()
            window = (tiles[0][0] == colour).all(2)
            assert window.any()  # drawn on the image in the same colour
        assert boxes[2][0][0] == boxes[2][1][0] and boxes[2][0][3] < boxes[2][1][1]  # stacked
    said = capsys.readouterr().out
    assert "2 x 16 px, 0.4 to 1" in said and "2 x 8 px, 0.2 to 0.5" in said


def test_the_crops_are_those_of_the_epoch_after_photometry(tmp_path, drawn):
    plain = ["--num_images", "1", "--no_flip", "--color_jitter", "0", "--nmb_crops", "1"]
    options = [*plain, "--size_crops", "48", "--min_scale_crops", "1", "--max_scale_crops", "1"]
    photo(tmp_path / "a.png", 48, 48)
    options += ["--data_path", tmp_path, "--grayscale", "0", "--blur", "0"]
    sheet = draw(tmp_path / "a", *options, "--seed", "1")
    crops = MultiCropDataset(open_dataset(str(tmp_path)), [1], [48], [1.0], [1.0], seed=1)
    expected = crops[0, 0][0][0][0].permute(1, 2, 0).numpy()  # untouched by photometry
    boxes = drawn["multicrop.png"].boxes[0]
    tile = tiles_of(sheet, boxes)[1][0][2::4, 2::4].astype(int)
    assert np.abs(tile - expected).max() <= 1
    again = draw(tmp_path / "b", *options, "--seed", "1", "--solarize", "1")
    changed = tiles_of(again, boxes)[1][0][2::4, 2::4]
    solarised = np.where(expected >= 128, 255 - expected, expected).astype(int)
    assert np.abs(changed - solarised).max() <= 1
    other = [*options[:-2], "--blur", "0", "--min_scale_crops", "0.3", "--max_scale_crops", "0.5"]
    first, later = (draw(tmp_path / "c", *other, "--epoch", epoch) for epoch in (0, 1))
    crop, later_crop = (tiles_of(x, boxes)[1][0] for x in (first, later))
    assert (crop != later_crop).any()  # the crop, not only its window


@pytest.mark.parametrize(
    ("side", "preset", "sides"), [(200, "photos", [64, 32]), (32, "cifar", [32, 16])]
)
def test_the_crops_of_a_folder_are_those_of_its_training(
    tmp_path, monkeypatch, side, preset, sides
):
    monkeypatch.setattr(dist, "resolve_device", lambda device: torch.device("cpu"))
    photo(tmp_path / "a.png", side, side)
    args = visualize.parse_args(["crops", "--data_path", str(tmp_path)])
    assert args.preset == preset and len(args.nmb_crops) == 2
    image_flags.fill_in_crops(args)
    assert args.size_crops == sides
    one = visualize.parse_args(["crops", "--data_path", str(tmp_path), "--nmb_crops", "2"])
    image_flags.fill_in_crops(one)
    assert one.size_crops == sides[:1]


@pytest.mark.slow
def test_the_crops_of_a_run_of_dino_are_its_global_and_local_ones(tmp_path, drawn):
    make_run(tmp_path / "run")
    argv = ["crops", "--pretrained", str(tmp_path / "run")]
    args = visualize.parse_args(argv)
    assert (args.nmb_crops, args.size_crops) == ([2, 2], [16, 8])
    assert (args.min_scale_crops, args.max_scale_crops) == ([0.5, 0.2], [1.0, 0.4])
    assert (args.blur, args.interpolation, args.seed) == ([1.0, 0.1, 0.5], "bicubic", 5)
    assert visualize.main([*argv, "--num_images", "2"]) == 0
    assert (tmp_path / "run" / "plots" / "multicrop.png").is_file()
    assert [list(map(len, boxes)) for boxes in drawn["multicrop.png"].boxes] == [[1, 2, 2]] * 2
    make_run(tmp_path / "alone", local_crops_number=0, solarize=[0.0], blur=[0.5])
    args = visualize.parse_args(["crops", "--pretrained", str(tmp_path / "alone")])
    assert (args.nmb_crops, args.size_crops) == ([2], [16])


def test_the_crops_of_a_run_of_swav_are_those_of_its_args_json(tmp_path):
    arguments = {"nmb_crops": [1, 3], "size_crops": [20, 10], "min_scale_crops": [0.5, 0.1]}
    arguments |= {"max_scale_crops": [0.9, 0.2], "data_path": "digits", "preset": "tiny"}
    arguments |= {"color_jitter": [0.1, 0.0, 0.0, 0.0], "blur": [0.25], "dump_path": "elsewhere"}
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    args = visualize.parse_args(["crops", "--pretrained", str(tmp_path), "--blur", "0.75"])
    assert (args.nmb_crops, args.size_crops, args.blur) == ([1, 3], [20, 10], [0.75])
    assert args.dump_path == str(tmp_path) and args.color_jitter[0] == 0.1


def test_crops_that_do_not_fit_together_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="--size_crops has 1 values and --nmb_crops has 2"):
        draw(tmp_path, "--nmb_crops", "2", "2", "--size_crops", "16")
    with pytest.raises(ValueError, match="--solarize has 4 values and there are 2 crops"):
        draw(tmp_path, "--nmb_crops", "2", "--solarize", "0", "0", "0", "0")


# ============ the command line ============
def actions(picture):
    commands = next(x for x in visualize.get_parser()._actions if x.dest == "picture")
    return {flag: x for x in commands.choices[picture]._actions for flag in x.option_strings}


def test_every_published_flag_is_taken_with_its_default():
    flags = json.loads((ROOT / "tests" / "golden" / "official_flags.json").read_text())
    mine = actions("attention")
    for flag in flags["dino/visualize_attention.py"]:
        action = mine[flag["flags"][0]]
        if flag["flags"] not in (["--checkpoint_key"], ["--pretrained_weights"]):
            assert action.default == ast.literal_eval(flag["default"]), flag
        if "nargs" in flag:
            assert action.nargs == "+"
    # The teacher is what is found in a file with several networks; most released files have one.
    assert mine["--checkpoint_key"].default is None and mine["--pretrained"].default == ""


@pytest.mark.parametrize("picture", ["attention", "crops"])
def test_every_flag_is_read_and_explained(picture):
    sources = (
        "src/pictures/flags.py",
        f"src/pictures/{picture}_command.py",
        "src/run/flags.py",
        "src/run/image_flags.py",
        "src/evaluate/flags.py",
    )
    text = "".join((ROOT / name).read_text() for name in sources)
    for action in actions(picture).values():
        if action.dest == "help":
            continue
        assert action.help, action.dest
        assert re.search(rf'args\.{action.dest}\b|"{action.dest}"[,\])]', text), action.dest


@pytest.mark.slow
def test_help_is_there_without_doing_anything_and_a_picture_must_be_named():
    code = (
        "import sys, visualize; assert 'matplotlib' not in sys.modules and 'av' not in sys.modules"
    )
    code += "\nvisualize.main(['attention', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--threshold" in done.stdout, done.stderr
    with pytest.raises(SystemExit) as stopped:
        visualize.main([])
    assert stopped.value.code == 2


def test_the_script_can_be_read_in_one_sitting():
    text = (ROOT / "visualize.py").read_text()
    doc = ast.get_docstring(ast.parse(text))
    assert doc.count("\n") <= 30
    assert "Deviations" in doc and "arXiv:2104.14294" in doc
