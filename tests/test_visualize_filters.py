"""visualize.py filters and activations: layers, responses, ascent, top images, pictures."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import visualize
from src.data import photometry
from src.data.datasets import open_dataset
from src.data.small_sets import STATISTICS
from src.labels.features import centre_crop
from src.nets.backbones import build_backbone
from src.nets.convnets import VGG16, AlexNet
from src.nets.resnet import build_model
from src.nets.sobel import sobel_to_rgb
from src.pictures import activations, responses
from src.pictures import filters as filter_pictures
from src.run import checkpoint
from src.run import flags as cli

ROOT = Path(__file__).parent.parent
QUICK = ["--device", "cpu", "--workers", "0"]
SMALL = ["--arch", "resnet10", "--stem", "small", "--width", "0.125", "--size", "16"]
NORMAL = STATISTICS["digits"]


def draw(picture, folder, *argv):
    command = [picture, *QUICK, "--dump_path", str(folder), *map(str, argv)]
    assert visualize.main(command) == 0
    return folder


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def table(folder):
    with open(folder / "activations.csv", newline="") as file:
        return list(csv.DictReader(file))


def lively(model):
    """Batch norms as after some training: of every sign, with means that are not zero."""
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for x in (module.weight.data, module.bias.data, module.running_mean):
                x.normal_()
    return model.eval().requires_grad_(False)


def small_resnet(**options):
    torch.manual_seed(1)
    return lively(build_model("resnet10", stem="small", width=0.125, **options))


def layer_of(model, conv=None, name=None, size=16):
    return responses.find_layer(model, responses.trace(model, size), conv, name)


@pytest.fixture(scope="module")
def digits():
    """All training digits as the network sees them, (N, 3, 16, 16)."""
    dataset = open_dataset("digits")
    images = torch.stack([centre_crop(dataset.load(i), 16, 16) for i in range(len(dataset))])
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in NORMAL)
    return (images / 255 - mean) / std


# ============ layers and responses ============
@pytest.mark.parametrize(
    ("network", "sobel"), [(AlexNet, True), (AlexNet, False), (VGG16, True), (VGG16, False)]
)
def test_a_convolution_has_its_batch_norm_and_relu_with_it(network, sobel):
    torch.manual_seed(0)
    model = lively(network(width=0.03, sobel=sobel))
    images = torch.randn(2, 3, 96, 96)
    calls = responses.trace(model, 96)
    for number in range(1, model.num_convs + 1):
        layer = responses.find_layer(model, calls, number)
        maps = model.forward_conv(images, number)
        assert (layer.name, layer.num_filters) == (f"conv{number}", maps.shape[1])
        assert layer.cells == tuple(maps.shape[2:])
        found = responses.filter_responses(model, layer, images)
        torch.testing.assert_close(found, maps.mean((2, 3)), rtol=1e-4, atol=1e-6)
    assert responses.find_layer(model, calls).name == f"conv{model.num_convs}"  # the last


def test_the_convolutions_of_a_resnet_are_those_of_its_path():
    model = small_resnet()
    calls = responses.trace(model, 16)
    names = [call.name for call in responses.convolutions(model, calls)]
    blocks = [f"layer{i}.0.conv{j}" for i in range(1, 5) for j in (1, 2)]
    assert names == ["conv1", *blocks]
    assert responses.find_layer(model, calls, 2).rectified
    last = responses.find_layer(model, calls)  # what the shortcut adds comes before its ReLU
    assert last.name == "conv9" and last.module is model.layer4[0].bn2 and not last.rectified


def test_what_is_beside_the_path_is_not_counted_and_what_reads_the_image_is_first():
    for arch, count, first in (("regnet_y_400mf", 81, "stem.0"), ("resnet18", 17, "conv1")):
        model = build_backbone(arch).eval()
        found = responses.convolutions(model, responses.trace(model, 32))
        assert (len(found), found[0].name.removeprefix("trunk.")) == (count, first)


def test_an_addition_in_place_between_batch_norm_and_relu_is_seen():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

        def forward_backbone(self, x):
            x = self.bn(self.conv(x))
            x += 1
            return self.relu(x)

    layer = layer_of(Block())
    assert isinstance(layer.module, nn.BatchNorm2d) and not layer.rectified


@pytest.mark.parametrize("name", ["layer4.0.conv2", "layer2.0.bn1", "layer3", "layer1.0.relu"])
def test_the_response_is_the_mean_of_the_map_of_a_module(name):
    model, images = small_resnet(), torch.randn(3, 3, 16, 16)
    maps = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, i, output: maps.append(output.clone()))
    model.forward_backbone(images)
    handle.remove()
    layer = layer_of(model, name=name)
    found = responses.filter_responses(model, layer, images)
    torch.testing.assert_close(found, maps[-1].mean((2, 3)))  # of several uses the last
    assert layer.uses == len(maps) and not module._forward_hooks


def test_nothing_is_computed_beyond_the_layer():
    model = small_resnet()
    layer = layer_of(model, name="layer2")
    model.layer3 = None  # would raise
    assert responses.filter_responses(model, layer, torch.randn(1, 3, 16, 16)).shape == (1, 16)


def test_layers_of_other_networks_have_their_own_names():
    model = build_model("squeezenet1_1").eval()
    layer = layer_of(model, name="features.3.squeeze", size=32)
    assert layer.module is model.trunk.features[3].squeeze and layer.name == "features.3.squeeze"
    last = layer_of(model, size=32)
    assert last.module is model.trunk.features[12].expand3x3 and last.rectified


def test_what_is_no_layer_is_one_sentence_that_names_others():
    model = small_resnet(output_dim=4)
    for name, sentence in (
        ("layer4.0.conv3", r"--layer layer4.0.conv3 is not a module .* layer4.0.conv2"),
        ("zzz", "--layer zzz is not a module of this network: there is layer4.0.conv2, say"),
        ("projection_head", "--layer projection_head comes after the features"),
    ):
        with pytest.raises(ValueError, match=sentence):
            layer_of(model, name=name)
    with pytest.raises(ValueError, match="--conv 10 is not one of the 9 convolutions"):
        layer_of(model, 10)
    with pytest.raises(ValueError, match=r"--layer classifier.1 gives \(1, 123\), which is no map"):
        layer_of(AlexNet(width=0.03).eval(), name="classifier.1", size=96)


# ============ top images ============
def test_the_top_images_are_those_that_sorting_all_responses_gives():
    values = torch.randn(57, 5).mul(2).round()  # with many equal ones
    top = activations.TopImages(5, 9)
    for rows in torch.arange(57).split(8):
        top.update(values[rows], rows)
    for number in range(5):
        order = sorted(range(57), key=lambda i: (-values[i, number], i))[:9]
        expected = [(i, float(values[i, number])) for i in order]
        assert top.of_filter(number) == expected
    means = values.double().mean(0)
    assert top.most_active(3) == means.sort(descending=True, stable=True).indices[:3].tolist()
    few = activations.TopImages(5, 9)
    few.update(values[:4], torch.arange(4))
    assert len(few.of_filter(0)) == 4


def make_run(folder, **changes):
    arguments = {"arch": "resnet10", "stem": "small", "width": 0.125, "hidden_mlp": 8}
    arguments |= {"feat_dim": 4, "head_dims": None, "head_bn": True, "zero_init_residual": False}
    arguments |= {"in_chans": 3, "size_crops": [16], "data_path": "digits", "seed": 3, **changes}
    model = small_resnet(output_dim=4, hidden_mlp=8, normalize=True)
    checkpoint.save_checkpoint(folder, {"model": model.state_dict(), "epoch": 1})
    (folder / "args.json").write_text(json.dumps(arguments))
    return model


@pytest.mark.slow
def test_the_table_of_a_run_has_the_best_images_of_every_filter(tmp_path, digits, drawn):
    model = make_run(tmp_path)
    command = ["activations", *QUICK, "--pretrained", str(tmp_path), "--batch_size", "100"]
    assert visualize.main([*command, "--layer", "layer3.0.conv1", "--top", "5"]) == 0
    folder = tmp_path / "plots" / "activations"
    rows = table(folder)
    maps = []
    model.layer3[0].conv1.register_forward_hook(lambda m, i, output: maps.append(output))
    model(digits)
    values = maps[0].mean((2, 3))  # (N, 32)
    assert list(rows[0]) == ["filter", "rank", "index", "file", "activation"]
    assert len(rows) == 32 * 5
    for number in range(32):
        mine = rows[5 * number : 5 * number + 5]
        best = values[:, number].sort(descending=True, stable=True)
        assert [int(row["filter"]) for row in mine] == [number] * 5
        assert [int(row["rank"]) for row in mine] == [1, 2, 3, 4, 5]
        found = [int(row["index"]) for row in mine]
        assert [row["file"] for row in mine] == [f"image {i}" for i in found]
        np.testing.assert_allclose(values[found, number], best.values[:5], rtol=1e-3, atol=1e-5)
        shown = [float(row["activation"]) for row in mine]
        np.testing.assert_allclose(shown, best.values[:5], rtol=1e-3, atol=1e-5)
    # A row for each of the 8 most active, with 5 pictures each.
    rows = drawn["activations.png"].boxes
    assert [list(map(len, row)) for row in rows] == [[5]] * 8
    assert {(right - left, bottom - top) for left, top, right, bottom in rows[0][0]} == {(96, 96)}


@pytest.mark.slow
def test_only_the_filters_that_were_asked_for_are_listed_in_their_order(tmp_path, capsys, drawn):
    folder = draw("activations", tmp_path, *SMALL, "--filters", "7", "2", "7", "--top", "3")
    assert [int(row["filter"]) for row in table(folder)] == [7, 7, 7, 2, 2, 2]
    assert [list(map(len, row)) for row in drawn["activations.png"].boxes] == [[3]] * 2
    said = capsys.readouterr().out
    assert "UNTRAINED" in said and re.search(r"1297 of 1297 images, \d+ images/s.*ETA", said)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_in_no_row(tmp_path, workers, drawn):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(7):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    data = [*SMALL, "--data_path", tmp_path / "images", "--batch_size", "2", "--workers", workers]
    folder = draw("activations", tmp_path / "out", *data, "--top", "7", "--num_filters", "2")
    rows = table(folder)
    assert len(rows) == 64 * 6
    files = {row["file"] for row in rows[:6]}
    assert files == {str(tmp_path / "images" / f"{i}.png") for i in (0, 1, 3, 4, 5, 6)}
    assert [list(map(len, row)) for row in drawn["activations.png"].boxes] == [[6]] * 2


# ============ gradient ascent ============
@pytest.mark.slow
def test_ascent_finds_more_than_noise_and_than_any_digit(digits):
    model = small_resnet()
    for layer in (layer_of(model), layer_of(model, 4)):
        best = responses.filter_responses(model, layer, digits).amax(0)  # (F,)
        chosen = (best > 0.01).nonzero().flatten()[[4, 0, 2]].tolist()
        images, before, after = filter_pictures.ascend(model, layer, chosen, 16, NORMAL, 50, seed=4)
        assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
        assert (after > before).all() and (after > best[chosen]).all()
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in NORMAL)
        again = responses.filter_responses(model, layer, (images / 255 - mean) / std)
        torch.testing.assert_close(again[range(3), chosen], after)  # of the picture as it is


def plain_ascent(model, layer, number, steps, step_size, decay, clip, blur_every, sigma, seed):
    """The same in float64, one filter, written from the docstring."""
    mean, std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in NORMAL)
    noise = np.random.Generator(np.random.PCG64([seed, number]))
    noise = noise.standard_normal((3, 16, 16), dtype=np.float32)
    low, high = -mean / std, (1 - mean) / std
    x = torch.minimum(torch.maximum(torch.from_numpy(noise) * 20 / 255 / std, low), high)[None]
    kernel = torch.from_numpy(photometry.blur_kernels(np.array([sigma]))).view(1, -1, 1, 1)
    for step in range(1, steps + 1):
        x = x.detach().requires_grad_(True)
        responses.filter_responses(model, layer, x, 0.01)[0, number].backward()
        with torch.no_grad():
            x = x + step_size * x.grad / x.grad.square().mean().sqrt()
            x = x * (1 - decay)
            if clip:
                norms = x.square().sum(1).sqrt()
                x = torch.where(norms >= norms.quantile(clip), x, 0.0)
            if blur_every and step % blur_every == 0 and step != steps:
                photometry.blur(x, kernel.double())
            x = torch.minimum(torch.maximum(x, low), high)
    return ((x[0] * std + mean) * 255).round().detach()


@pytest.mark.parametrize(
    ("decay", "clip", "blur_every", "sigma"),
    [(0.0, 0.0, 0, 1.0), (0.2, 0.0, 0, 1.0), (0.0, 0.37, 0, 1.0), (0.0, 0.0, 2, 0.7)],
    ids=["plain", "decay", "clip", "blur"],
)
def test_a_step_follows_the_gradient_then_regularises(decay, clip, blur_every, sigma):
    model = small_resnet()
    layer = layer_of(model, 3)
    options = {"steps": 4, "step_size": 0.3, "decay": decay, "clip": clip, "seed": 8}
    options["blur_every"] = blur_every
    images, _, _ = filter_pictures.ascend(
        model, layer, [3, 1], 16, NORMAL, blur_sigma=sigma, **options
    )
    model = model.double()
    for image, number in zip(images, (3, 1), strict=True):
        expected = plain_ascent(model, layer, number, sigma=sigma, **options)
        assert ((image - expected).abs() <= 1).float().mean() > 0.98


def test_a_filter_that_is_off_everywhere_is_found_all_the_same():
    torch.manual_seed(0)
    model = AlexNet(width=0.05).eval().requires_grad_(False)
    model.features[1].bias[2] = -1.5  # far below what noise can reach
    layer = layer_of(model, 1, size=64)
    _, before, after = filter_pictures.ascend(model, layer, [2], 64, NORMAL, steps=60)
    assert before[0] == 0 < after[0]


def test_ascent_is_the_same_for_a_seed_whatever_else_is_asked_for(monkeypatch):
    model = small_resnet()
    layer = layer_of(model, 2)

    def found(filters, seed):
        images, *_ = filter_pictures.ascend(model, layer, filters, 16, NORMAL, 5, seed=seed)
        return images

    both = found([1, 6], 0)
    assert torch.equal(both, found([1, 6], 0)) and not torch.equal(both, found([1, 6], 1))
    monkeypatch.setattr(filter_pictures, "AT_ONCE", 1)
    alone = found([6, 1], 0).flip(0)
    assert (both.int() - alone.int()).abs().max() <= 1


def test_grey_data_has_grey_images_and_progress_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(filter_pictures, "LOG_SECONDS", 0.0)
    options = [*SMALL, "--conv", "3", "--filters", "6", "--steps", "7", "--top", "2"]
    folder = draw("filters", tmp_path, *options)
    picture = read(folder / "filters_conv3" / "filter_0006.png")
    assert picture.shape == (16, 16, 3) and (picture == picture[:, :, :1]).all()
    said = capsys.readouterr().out
    assert re.search(r"step 3 of 7 of filters \[6\], ETA 0:00:0\d", said)
    assert re.search(r"filter 6: noise [-\d.e]+, after ascent [-\d.e]+, best image [-\d.e]+", said)


# ============ pictures ============
@pytest.mark.slow
def test_the_sheet_has_each_filter_and_its_images_to_the_right(tmp_path, drawn):
    options = [*SMALL, "--conv", "5", "--steps", "3", "--num_filters", "3"]
    folder = draw("filters", tmp_path / "a", *options)
    sheet = read(folder / "filters_conv5.png")
    rows = drawn["filters_conv5.png"].boxes
    assert [list(map(len, row)) for row in rows] == [[1, 9]] * 3
    table_of = draw("activations", tmp_path / "b", *options[:-4], "--num_filters", "3")
    right = read(table_of / "activations.png")
    for row, other in zip(rows, drawn["activations.png"].boxes, strict=True):
        for box, same in zip(row[1], other[0], strict=True):
            assert np.array_equal(pixels(sheet, box), pixels(right, same))
    again = draw("filters", tmp_path / "c", *options)
    assert (again / "filters_conv5.png").read_bytes() == (folder / "filters_conv5.png").read_bytes()


def pixels(sheet, box):
    left, top, right, bottom = box
    return sheet[top:bottom, left:right]


def test_the_first_layer_is_drawn_in_colour(tmp_path, drawn):
    conv = nn.Conv2d(3, 12, 5)
    conv.weight.data[7] = 0
    conv.weight.data[7, 0, 2, 3], conv.weight.data[7, 2, 2, 3] = 0.5, -0.25
    conv.weight.data[8] = 0
    filter_pictures.draw_first_layer(conv, None, tmp_path / "a.png")
    grid = pixels(read(tmp_path / "a.png"), drawn["a.png"].boxes[0][0][0])
    cell = 5 * (96 // 5) + 2  # 12 filters are 3 rows of 4
    assert grid.shape == (3 * cell - 2, 4 * cell - 2, 3)
    seven = grid[cell:, 3 * cell :][: cell - 2, : cell - 2]
    weights = seven[9::19, 9::19].astype(int)  # (5, 5, 3)
    assert weights[2, 3].tolist() == [255, 128, 64] or weights[2, 3].tolist() == [255, 128, 65]
    weights[2, 3] = 128
    assert (weights == 128).all()
    eight = grid[2 * cell :][: cell - 2, : cell - 2]
    assert (eight == 128).all()  # of zeros


@pytest.mark.parametrize(("count", "columns"), [(96, 12), (64, 8), (97, 10), (1, 1), (32, 8)])
def test_a_grid_has_whole_rows_where_it_can(count, columns):
    images = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, 11, 11).to(torch.uint8)
    grid = filter_pictures.to_grid(images)
    side = min(96, 560 // columns) // 11 * 11  # by a whole factor
    cell = side + 2
    assert grid.shape == (-(-count // columns) * cell - 2, columns * cell - 2, 3)
    for i in range(count):
        assert (grid[i // columns * cell :, i % columns * cell :][:side, :side] == i).all()


def test_sobel_networks_show_both_channels_and_the_filters_of_rgb_images(tmp_path, drawn):
    torch.manual_seed(0)
    model = AlexNet(sobel=True, width=0.125)  # 12 filters: 3 rows of 4
    conv = model.features[0]
    filter_pictures.draw_first_layer(conv, model.sobel, tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    first, second, last = (pixels(picture, boxes[0]) for boxes in drawn["a.png"].boxes[0])
    assert first.shape == second.shape == (3 * (11 * 6 + 2) - 2, 4 * (11 * 6 + 2) - 2, 3)
    assert last.shape == (3 * (13 * 5 + 2) - 2, 4 * (13 * 5 + 2) - 2, 3)
    scale = conv.weight.abs().amax((1, 2, 3))
    for channel, panel in enumerate((first, second)):
        filter_1 = panel[:66, 68:134][3::6, 3::6].astype(int)
        expected = 128 + 127 * conv.weight[1, channel] / scale[1]
        assert np.abs(filter_1 - expected.detach().numpy()[:, :, None]).max() <= 1
    rgb = sobel_to_rgb(conv, 1).weight[0]
    filter_0 = last[:65, :65][2::5, 2::5].astype(int)
    expected = 128 + 127 * rgb / rgb.abs().max()
    assert np.abs(filter_0 - expected.detach().permute(1, 2, 0).numpy()).max() <= 1


def test_other_numbers_of_channels_have_a_grid_each(tmp_path, drawn):
    folder = draw("filters", tmp_path, "--arch", "resnet18", "--size", "32", "--in_chans", "4")
    assert (folder / "filters.png").is_file()
    assert [len(boxes) for boxes in drawn["filters.png"].boxes[0]] == [1] * 4
    # No pictures but that of the first layer, and no data, were asked for.
    assert [path.name for path in tmp_path.iterdir()] == ["filters.png"]


# ============ the command line ============
@pytest.mark.slow
def test_a_released_file_of_deepcluster_says_what_it_is(tmp_path, drawn):
    torch.manual_seed(0)
    model = AlexNet(10, sobel=True, width=0.05)
    weights = {
        name.replace("features.", "features.module."): x for name, x in model.state_dict().items()
    }
    torch.save({"state_dict": weights, "arch": "alexnet"}, tmp_path / "released.pth.tar")
    options = ["--pretrained", tmp_path / "released.pth.tar", "--size", "64", "--top", "2"]
    folder = draw("filters", tmp_path / "out", *options)
    filter_pictures.draw_first_layer(model.features[0], model.sobel, tmp_path / "own.png")
    own, same = (drawn[name].boxes[0] for name in ("own.png", "filters.png"))
    for box, other in zip(own, same, strict=True):
        there = pixels(read(folder / "filters.png"), other[0])
        assert np.array_equal(pixels(read(tmp_path / "own.png"), box[0]), there)
    options += ["--conv", "2", "--filters", "3", "--steps", "2"]
    draw("filters", tmp_path / "out", *options)  # through Sobel, from an RGB image
    assert read(folder / "filters_conv2" / "filter_0003.png").shape == (64, 64, 3)


@pytest.mark.slow
@pytest.mark.parametrize("picture", ["filters", "activations"])
def test_the_bare_command_draws_digits_and_says_that_the_network_is_untrained(
    tmp_path, monkeypatch, capsys, picture
):
    monkeypatch.chdir(tmp_path)
    assert visualize.main([picture, *QUICK]) == 0
    assert (tmp_path / "plots" / picture / f"{picture}.png").is_file()
    assert "UNTRAINED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--filters", "3", "64"], "--filters 64 is not there: conv9 has 0 to 63"),
        (["--num_filters", "65"], "--num_filters 65 is more than the 64 filters of conv9"),
        (["--conv", "10"], "--conv 10 is not one of the 9 convolutions: use 1 to 9"),
        (["--conv", "1", "--layer", "conv1"], "--conv 1 and --layer conv1: give one of them"),
        (["--layer", "layer4.0.conf2"], "near to it are layer4.0.conv2"),
        (["--layer", "projection_head"], "--layer projection_head comes after the features"),
        (["--top", "1298", "--conv", "1"], "--top 1298 is more than the 1297 images"),
        (["--clip", "1.5"], "must be a probability"),
        (["--mean", "0.5"], "--mean has 1 values and --in_chans is 3"),
        (["--arch", "vit_tiny", "--depth", "1"], "this network is not convolutional"),
        (["--arch", "squeezenet1_1", "--size", "4"], "--size 4: this network takes no such images"),
        (["--pretrained", "nowhere"], "nowhere"),
        (["--data_path", "nowhere", "--conv", "1"], "--data_path nowhere does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, capsys, flags, sentence):
    network = SMALL if not {"--arch", "--pretrained"} & {*flags} else []
    command = ["filters", "--dump_path", str(tmp_path), *QUICK, *network, *flags]
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: visualize.main(command))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error and error.count("\n") == 1


def test_weights_that_are_not_finite_stop_the_script(tmp_path):
    model = make_run(tmp_path)
    model.layer1[0].conv1.weight[0] = torch.nan
    checkpoint.save_checkpoint(tmp_path, {"model": model.state_dict(), "epoch": 1})
    with pytest.raises(ValueError, match="conv9 of these weights gives values that are not finite"):
        visualize.main(["activations", *QUICK, "--pretrained", str(tmp_path)])


def test_every_flag_is_read_and_explained():
    text = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    commands = next(x for x in visualize.get_parser()._actions if x.dest == "picture")
    ignored = {"help", "dist_url", "world_size", "rank", "local_rank", "debug_slurm"}
    for picture in ("filters", "activations"):
        for action in commands.choices[picture]._actions:
            if action.dest not in ignored:
                assert action.help, action.dest
                pattern = rf'args\.{action.dest}\b|"{action.dest}"[,\])]'
                assert re.search(pattern, text), action.dest
