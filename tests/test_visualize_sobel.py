"""visualize.py sobel: the channels that a first layer gets, the filters that are shown, and misuse."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import visualize
from src.data.datasets import open_dataset
from src.labels.features import centre_crop
from src.nets.convnets import AlexNet, build_convnet
from src.nets.sobel import Sobel
from src.pictures.sobel import draw_sobel, strongest_filters
from src.run import checkpoint
from src.run import flags as cli

QUICK = ["--device", "cpu"]


def draw(folder, *argv):
    assert visualize.main(["sobel", *QUICK, "--dump_path", str(folder), *map(str, argv)]) == 0
    return folder / "sobel.png"


def tile(sheet, row, group, column=0):
    """Grey levels of a tile, a value for each of its pixels before they became squares."""
    left, top, right, bottom = sheet.boxes[row][group][column]
    return np.asarray(sheet.image)[top:bottom, left:right, 0].astype(int)


def ramp(horizontal):
    """An image that becomes brighter to the right, or downwards; (3, 128, 128)."""
    row = torch.arange(128, dtype=torch.uint8)
    image = row.expand(128, 128) if horizontal else row[:, None].expand(128, 128)
    return image.expand(3, -1, -1).contiguous()


def test_a_ramp_has_one_derivative_which_is_black_as_it_becomes_brighter(tmp_path, drawn):
    images = [("across", ramp(True)), ("down", ramp(False))]
    normalised = torch.stack([image for _, image in images]).float() / 255
    draw_sobel(images, normalised, Sobel(padding=0), None, tmp_path / "sobel.png", "")
    sheet = drawn["sobel.png"]
    assert [len(row) for row in sheet.boxes] == [5, 5]  # image, grey, two derivatives, length
    for row, (sloped, flat) in enumerate([(2, 3), (3, 2)]):
        assert set(np.unique(tile(sheet, row, sloped))) == {1}
        assert set(np.unique(tile(sheet, row, flat))) == {128}
        assert set(np.unique(tile(sheet, row, 4))) == {255}
        grey = tile(sheet, row, 1)
        assert grey[0, 0] == 0 and grey[-1, -1] == 255


def test_the_channels_are_those_that_the_first_layer_of_a_run_gets(tmp_path, drawn):
    torch.manual_seed(0)
    options = {"stem": "small", "width": 0.125}
    model = build_convnet("resnet10", num_classes=4, sobel=True, sobel_padding=2, **options).eval()
    checkpoint.save_checkpoint(tmp_path, {"model": model.state_dict(), "epoch": 1})
    arguments = {"arch": "resnet10", "sobel": True, "sobel_padding": 2, "size_crops": [16]}
    arguments |= {"data_path": "digits", "mean": [0.3] * 3, "std": [0.4] * 3, **options}
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    words = ["sobel", *QUICK, "--pretrained", str(tmp_path), "--num_images", "2"]
    assert visualize.main([*words, "--num_filters", "3"]) == 0
    assert (tmp_path / "plots" / "sobel" / "sobel.png").is_file()  # beside the run
    sheet, seen = drawn["sobel.png"], []
    model.trunk.conv1.register_forward_hook(lambda module, inputs, output: seen.extend(inputs))
    dataset = open_dataset("digits")
    image = centre_crop(dataset.load(0), 16, 16)
    model.forward_backbone(((image.float() / 255 - 0.3) / 0.4)[None])
    derivative = seen[0][0, 0].detach()  # (18, 18)
    expected = (128 + 127 * derivative / seen[0].abs().max()).round().numpy()
    shown = tile(sheet, 1, 2)  # below the row of the filters
    factor = len(shown) // 18
    assert shown.shape == (18 * factor, 18 * factor) and factor >= 8
    assert np.array_equal(shown[factor // 2 :: factor, factor // 2 :: factor], expected)
    assert [len(group) for group in sheet.boxes[0]] == [0, 0, 0, 0, 0, 3]
    assert [len(group) for group in sheet.boxes[1]] == [1, 1, 1, 1, 1, 3]
    assert len(sheet.boxes) == 3


def test_the_filters_shown_are_those_whose_maps_vary_most():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3)
    with torch.no_grad():
        for i, scale in enumerate((0.1, 3.0, 1.0, 0.0)):
            conv.weight[i] = conv.weight[0].sign() * scale
            conv.bias[i] = 100.0 * (i == 3)  # large everywhere, and alike everywhere
    derivatives = torch.randn(2, 2, 9, 9)
    chosen, maps = strongest_filters(conv, derivatives, 3)
    assert chosen == [1, 2, 0]
    torch.testing.assert_close(maps, conv(derivatives)[:, [1, 2, 0]])


def test_files_are_seen_in_the_size_of_photographs_and_need_no_network(tmp_path, drawn):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        pixels = rng.integers(0, 256, (250, 300, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    assert draw(tmp_path, "--queries", tmp_path / "a.png", tmp_path / "b.png").is_file()
    assert [len(row) for row in drawn["sobel.png"].boxes] == [5, 5]
    assert tile(drawn["sobel.png"], 0, 2).shape == (224, 224)


def test_an_untrained_network_says_so(tmp_path, capsys):
    words = [
        "--arch",
        "alexnet",
        "--sobel",
        "--width",
        "0.125",
        "--size",
        "64",
        "--num_images",
        "1",
    ]
    draw(tmp_path, *words)
    assert "the network is UNTRAINED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--in_chans", "1"], "--in_chans 1: Sobel filters are of images of 3 channels"),
        (["--pretrained", "plain.pth"], "plain.pth has no Sobel filters before its first layer"),
        (["--queries", "none.jpg"], "--queries none.jpg does not exist"),
    ],
)
def test_misuse_is_one_sentence_and_status_2(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    torch.save(AlexNet(sobel=False, width=0.125).state_dict(), "plain.pth")
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: visualize.main(["sobel", *QUICK, *words]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "plots").exists()
