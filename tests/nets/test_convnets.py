"""src.nets.convnets: published names and shapes, what is clustered, and a top layer that is set anew."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.nets.convnets import ResNetClassifier, TopLayer, build_convnet
from src.nets.resnet import resnet10
from src.nets.sobel import Sobel
from src.run.run import average_gradients
from tests.gloo import run_ranks

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {"alexnet": 67, "vgg16": 37, "resnet10": 37}  # small, and neither even nor published
ARCHS = pytest.mark.parametrize("arch", list(SIZES))
PLAIN = pytest.mark.parametrize("arch", ["alexnet", "vgg16"])


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(arch, num_classes=0, seed=0, sobel=True, width=1 / 16, **options):
    """A network of a sixteenth of the width, in evaluation mode, whose batch norms do something."""
    torch.manual_seed(seed)
    model = build_convnet(arch, num_classes, sobel=sobel, width=width, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


# ============ names, shapes and sizes ============


@pytest.mark.parametrize(
    ("name", "arch", "num_classes"),
    [
        ("deepcluster_alexnet", "alexnet", 10),
        ("deepcluster_vgg16", "vgg16", 10),
        ("deepercluster_vgg16", "vgg16", 0),
    ],
)
def test_names_and_shapes_are_those_of_the_published_networks(name, arch, num_classes):
    golden = json.loads((GOLDEN / f"{name}_keys.json").read_text())
    expected = {key.removeprefix("body."): tuple(shape) for key, shape in golden}
    assert len(expected) == len(golden)
    with torch.device("meta"):
        model = build_convnet(arch, num_classes, sobel=True)
    assert {key: tuple(x.shape) for key, x in model.state_dict().items()} == expected
    assert model.num_features == 4096


MAPS = {  # channels and side of each convolution's map at 224 px
    "alexnet": [(96, 55), (256, 27), (384, 13), (384, 13), (256, 13)],
    "vgg16": [
        *[(64, 224)] * 2,
        *[(128, 112)] * 2,
        *[(256, 56)] * 3,
        *[(512, 28)] * 3,
        *[(512, 14)] * 3,
    ],
}


@PLAIN
def test_the_maps_are_those_of_the_papers(arch):
    model, x = small(arch), images(1, 3, 224, 224)
    with torch.no_grad():
        found = [model.forward_conv(x, conv).shape for conv in range(1, model.num_convs + 1)]
    assert found == [(1, channels // 16, side, side) for channels, side in MAPS[arch]]
    for conv in (0, model.num_convs + 1):
        with pytest.raises(ValueError, match=f"--conv {conv} must be from 1 to {model.num_convs}"):
            model.forward_conv(x, conv)


@pytest.mark.parametrize("padding", [1, 2])
def test_images_of_224_px_need_no_pooling_with_either_sobel_padding(padding):
    for arch, side in (("alexnet", 6), ("vgg16", 7)):
        model = small(arch, sobel_padding=padding)
        with torch.no_grad():
            last = model.features(model.sobel(images(1, 3, 224, 224)))
        assert last.shape[2:] == (side, side)


@PLAIN
def test_a_map_is_that_after_batch_norm_and_relu(arch):
    model, x = small(arch), images(2, 3, SIZES[arch], SIZES[arch])
    seen = []
    for module in model.features:
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    with torch.no_grad():
        model.forward_backbone(x)
        maps = [bn.clamp(min=0) for bn in seen]
        for conv, expected in enumerate(maps, 1):
            assert torch.equal(model.forward_conv(x, conv), expected)
    assert len(maps) == model.num_convs


# ============ features and scores ============


def by_hand(model, arch, x):
    """Features of AlexNet or VGG-16 from the layers' tensors, in float64."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    x = Sobel(1).double()(x.double())
    names = sorted({int(name.split(".")[1]) for name in state if name.startswith("features.")})
    strides, paddings = ([4, 1, 1, 1, 1], [2, 2, 1, 1, 1]) if arch == "alexnet" else ([1] * 13,) * 2
    pools = {1, 2, 5} if arch == "alexnet" else {2, 4, 7, 10, 13}
    window = (3, 2) if arch == "alexnet" else (2, 2)
    for i, (stride, padding) in enumerate(zip(strides, paddings, strict=True)):
        conv, bn = (f"features.{names[2 * i + j]}." for j in range(2))
        x = F.conv2d(x, state[f"{conv}weight"], state[f"{conv}bias"], stride, padding)
        mean, var = (state[f"{bn}running_{kind}"][:, None, None] for kind in ("mean", "var"))
        x = (x - mean) / (var + 1e-5).sqrt() * state[f"{bn}weight"][:, None, None]
        x = (x + state[f"{bn}bias"][:, None, None]).clamp(min=0)
        if i + 1 in pools:
            x = F.max_pool2d(x, *window)
    x = F.adaptive_avg_pool2d(x, 6 if arch == "alexnet" else 7).flatten(1)
    first, last = ("classifier.1.", "classifier.4.") if arch == "alexnet" else (
        "classifier.0.", "classifier.3.")  # fmt: skip
    x = (x @ state[f"{first}weight"].T + state[f"{first}bias"]).clamp(min=0)
    return x @ state[f"{last}weight"].T + state[f"{last}bias"]


@PLAIN
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_features_are_the_last_linear_layer_before_its_relu(arch, memory_format):
    model = small(arch, num_classes=7).to(memory_format=memory_format)
    for parameter in model.classifier.parameters():  # as far from 0 as trained ones
        parameter.data.mul_(10)
    x = images(2, 3, SIZES[arch], SIZES[arch])
    expected = by_hand(model, arch, x)
    assert expected.min() < 0 < expected.max()
    x = x.contiguous(memory_format=memory_format)
    with torch.no_grad():
        found, scores = model(x)
        assert torch.equal(found, model.forward_backbone(x))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    top = model.top_layer
    torch.testing.assert_close(scores, found.clamp(min=0) @ top.weight.T + top.bias)
    assert found.shape == (2, model.num_features) == (2, 256)


def test_features_of_a_resnet_are_its_pooled_map_and_go_to_the_top_layer_as_they_are():
    model = small("resnet10", num_classes=7, stem="small")
    x = images(2, 3, 16, 16)
    with torch.no_grad():
        found = model.forward_backbone(x)
        expected = model.trunk.forward_backbone(Sobel(1)(x))
        torch.testing.assert_close(found, expected)
        features, scores = model(x)
        torch.testing.assert_close(scores, model.top_layer(found))
        assert torch.equal(features, found)
    assert model.trunk.conv1.weight.shape == (4, 2, 3, 3)
    assert {name.split(".")[0] for name in model.state_dict()} == {"sobel", "trunk", "top_layer"}


@ARCHS
def test_crops_of_several_sizes_give_rows_crop_by_crop(arch):
    model = small(arch, num_classes=5)
    crops = [images(2, 3, SIZES[arch] + more, SIZES[arch] + more, seed=more) for more in (8, 8, 0)]
    with torch.no_grad():
        expected = [torch.cat(rows) for rows in zip(*map(model, crops), strict=True)]
        torch.testing.assert_close(list(model(crops)), expected)
        model.top_layer = None
        torch.testing.assert_close(model(crops), expected[0])


@PLAIN
def test_dropout_comes_where_it_was_published_and_in_training_only(arch):
    kinds = {nn.Dropout: "dropout", nn.Linear: "linear", nn.ReLU: "relu"}
    found = [kinds[type(layer)] for layer in build_convnet(arch, width=1 / 32).classifier]
    first = ["dropout"] if arch == "alexnet" else []
    assert found == [*first, "linear", "relu", "dropout", "linear"]
    model, x = small(arch, dropout=0.5), images(2, 3, SIZES[arch], SIZES[arch])
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.classifier.train()
        assert not torch.equal(model(x), model(x))
        model = small(arch, dropout=0.0)
        model.classifier.train()
        assert torch.equal(model(x), model(x))


def test_images_that_are_too_small_are_refused_by_name_and_one_pixel_more_is_enough():
    for arch, padding, least in (("alexnet", 1, 63), ("vgg16", 1, 32), ("vgg16", 2, 30)):
        model = small(arch, sobel_padding=padding)
        with torch.no_grad():
            assert model(images(1, 3, least, least)).isfinite().all()
            sentence = f"images of {least - 1} px are too small .* at least {least} px"
            with pytest.raises(ValueError, match=sentence):
                model(images(1, 3, least, least - 1))
    with torch.no_grad(), pytest.raises(ValueError, match="at least 32 px"):
        small("vgg16", sobel=False)(images(1, 3, 31, 31))


@torch.no_grad()
def test_deeperclusters_vgg16_without_sobel_filters_pads_images_by_one_zero():
    x = images(2, 3, 64, 64)
    plain, padded = small("vgg16", sobel=False), small("vgg16", sobel=False, image_padding=1)
    assert torch.equal(padded.forward_backbone(x), plain.forward_backbone(F.pad(x, (1, 1, 1, 1))))
    assert not torch.allclose(padded.forward_backbone(x), plain.forward_backbone(x), rtol=0.01)
    assert padded.forward_conv(x, 1).shape[2:] == (66, 66)
    with pytest.raises(ValueError, match="at least 30 px"):
        padded(images(1, 3, 29, 29))
    x = x[..., :63, :63]  # under Sobel filters, and in other networks, it does nothing
    for arch, sobel in (("vgg16", True), ("alexnet", False), ("resnet10", False)):
        first, second = (small(arch, sobel=sobel, image_padding=i) for i in (0, 1))
        assert torch.equal(first.forward_backbone(x), second.forward_backbone(x))


def test_low_precision_gives_finite_features_and_gradients_to_all_but_the_filters():
    for arch in SIZES:
        model = small(arch, num_classes=5).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images(4, 3, 67, 67))[1], torch.arange(4))
        loss.backward()
        for name, parameter in model.named_parameters():
            filters = name.startswith("sobel.")
            assert (parameter.grad is None) == filters == (not parameter.requires_grad), name
            assert filters or parameter.grad.isfinite().all()


# ============ starts ============


@PLAIN
def test_layers_start_as_published(arch):
    torch.manual_seed(0)
    model = build_convnet(arch, 50, width=0.25)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
        elif isinstance(module, nn.Linear):
            expected = 0.01
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
            continue
        else:
            continue
        assert (module.bias == 0).all()
        count = module.weight.numel()
        assert abs(module.weight.std() / expected - 1) < 4 / math.sqrt(2 * count)
        assert abs(module.weight.mean()) < 4 * expected / math.sqrt(count)


@ARCHS
def test_the_trunk_of_a_seed_does_not_depend_on_the_number_of_classes(arch):
    states = []
    for num_classes in (0, 3, 11):
        torch.manual_seed(0)
        states.append(build_convnet(arch, num_classes, width=1 / 16).state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]) and torch.equal(value, states[2][name])


# ============ the top layer ============


def test_a_reset_draws_from_the_generator_on_the_cpu_and_keeps_the_parameters():
    layer = TopLayer(64, 5)
    weight, bias = layer.weight, layer.bias
    layer(images(2, 64)).sum().backward()
    layer.bias.data.fill_(1)
    for num_classes in (5, 900, 2):
        layer.reset(num_classes, torch.Generator().manual_seed(3))
        assert layer.weight is weight and layer.bias is bias
        assert weight.grad is None and bias.grad is None
        expected = torch.empty(num_classes, 64).normal_(
            0, 0.01, generator=torch.Generator().manual_seed(3)
        )
        assert torch.equal(weight, expected) and bias.tolist() == [0] * num_classes
        assert layer.out_features == num_classes and str(num_classes) in repr(layer)
        scores = layer(images(2, 64))
        assert scores.shape == (2, num_classes)
        scores.sum().backward()  # of the new shape, though the one before has been used
        assert weight.grad.shape == (num_classes, 64) and bias.grad.shape == (num_classes,)
    torch.manual_seed(3)
    layer.reset(4)  # without a generator: the process's own
    assert torch.equal(weight[0], expected[0])


def steps(model, optimizer, num_classes, first, last):
    for step in range(first, last):
        labels = torch.arange(4) * 7 % num_classes
        loss = F.cross_entropy(model(images(4, 3, 16, 16, seed=step))[1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_stopped_run_goes_on_to_the_last_bit_without_knowing_its_number_of_classes():
    def start(num_classes):
        model = small("resnet10", num_classes, stem="small").train()
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

    model, optimizer = start(6)
    steps(model, optimizer, 6, 0, 2)
    model.top_layer.reset(9, torch.Generator().manual_seed(1))
    for parameter in model.top_layer.parameters():
        del optimizer.state[parameter]
    steps(model, optimizer, 9, 2, 4)
    saved = {name: x.clone() for name, x in model.state_dict().items()}
    momenta = json.loads(json.dumps(optimizer.state_dict(), default=torch.Tensor.tolist))
    for group in momenta["state"].values():
        group["momentum_buffer"] = torch.tensor(group["momentum_buffer"])
    momenta["state"] = {int(i): group for i, group in momenta["state"].items()}
    steps(model, optimizer, 9, 4, 6)

    other, optimizer = start(2)
    parameters = list(other.top_layer.parameters())
    other.load_state_dict(saved)
    optimizer.load_state_dict(momenta)
    assert [id(p) for p in other.top_layer.parameters()] == [id(p) for p in parameters]
    for parameter in parameters:
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    steps(other, optimizer, 9, 4, 6)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_what_is_not_a_top_layer_of_these_features_is_refused():
    layer = TopLayer(8, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(TopLayer(9, 5).state_dict())
    assert layer.weight.shape == (3, 8)


def train(rank, world_size):
    """Parameters after steps with 5, then 8 classes, on the shares of one batch."""
    torch.manual_seed(0)
    model = small("resnet10", 5, stem="small")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, labels = images(4, 3, 16, 16)[rank::world_size], (torch.arange(4) % 8)[rank::world_size]
    device = torch.device("cpu")
    process = type("Process", (), {"world_size": world_size, "device": device})
    for num_classes in (5, 8):
        model.top_layer.reset(num_classes, torch.Generator().manual_seed(num_classes))
        network = average_gradients(model, process)
        for _ in range(2):
            loss = F.cross_entropy(network(x)[1], labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def test_two_processes_train_a_resized_top_layer_as_one():
    one = run_ranks(train, 1)[0]
    assert one["top_layer.weight"].shape == (8, 32)
    for found in run_ranks(train, 2):
        for name, value in one.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


# ============ options ============


def test_other_networks_of_torchvision_are_classifiers_too():
    model = build_convnet("squeezenet1_1", 4, stem="small").eval()
    assert isinstance(model, ResNetClassifier) and model.sobel is None
    with torch.no_grad():
        assert model(images(1, 3, 40, 40))[1].shape == (1, 4)


def test_images_of_other_channels_are_taken_without_the_filters():
    for arch, first in (("alexnet", "features.0.weight"), ("resnet10", "trunk.conv1.weight")):
        model = small(arch, sobel=False, in_chans=1)
        assert model.state_dict()[first].shape[1] == 1
        with torch.no_grad():
            assert model(images(1, 1, 67, 67)).shape == (1, model.num_features)
    assert small("resnet10", zero_init_residual=True).trunk.layer1[0].bn2.weight.sum() == 0
    assert resnet10(width=1 / 16).num_features == small("resnet10").num_features


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"arch": "alexnets"}, "--arch alexnets is not known"),
        ({"arch": "regnet_y_400mf", "sobel": True}, "--sobel true needs one of alexnet, vgg16, .*"),
        (
            {"arch": "alexnet", "sobel": True, "in_chans": 1},
            "--sobel true needs --in_chans 3, not 1",
        ),
        ({"arch": "resnet10", "sobel": True, "in_chans": 4}, "needs --in_chans 3, not 4"),
        ({"arch": "vgg16", "sobel": True, "sobel_padding": 3}, "--sobel_padding 3 must be 1"),
        ({"arch": "vgg16", "width": 0.001}, "--width 0.001 leaves no channel"),
        ({"arch": "vgg16", "in_chans": 0}, "--in_chans 0 with"),
        ({"arch": "alexnet", "dropout": 1.0}, "--dropout 1.0 must be at least 0 and below 1"),
        ({"arch": "alexnet", "zero_init_residual": True}, "--zero_init_residual needs a ResNet"),
        ({"arch": "resnet10", "stem": "tiny"}, "--stem tiny is not known"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_convnet(**{"width": 1 / 16, **options})
