"""src.nets.export_programs: programs give the features of the network, at other sizes than the traced."""

import io

import pytest
import torch

from src.errors import RunError
from src.nets import export_programs
from src.nets.backbones import build_backbone
from src.nets.export_programs import check, onnx_features, program_bytes, to_onnx, trace
from tests.exports import assert_same, lively

SIZES = [(1, 64, 64), (3, 96, 64), (2, 64, 80), (2, 70, 131)]


def network(arch, **options):
    torch.manual_seed(0)
    return lively(build_backbone(arch, **options))


def resnet():
    return network("resnet10", width=0.125, stem="imagenet")


def vit(**options):
    return network("vit_tiny", width=0.25, depth=1, img_size=64, **options)


@torch.no_grad()
def assert_same_at(run, model, sizes, in_chans=3):
    for batch, height, width in sizes:
        images = torch.randn(batch, in_chans, height, width)
        assert_same(run(images), model(images))


# ============ torch.export ============
@pytest.mark.slow
@pytest.mark.parametrize("make", [resnet, vit, lambda: vit(num_registers=2, patch_size=8)])
def test_a_program_takes_any_number_of_images_of_any_size(make):
    model = make()
    program, any_size = trace(model, in_chans=3, image_size=64)
    assert any_size
    loaded = torch.export.load(io.BytesIO(program_bytes(program)))
    assert_same_at(loaded.module(), model, SIZES)


@pytest.mark.slow
def test_tracing_leaves_the_network_as_it_is():
    model = vit()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trace(model, in_chans=3, image_size=64)
    assert all(x.requires_grad for x in model.parameters())
    assert "position_table" not in vars(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.slow
def test_a_table_of_positions_that_is_not_square_is_its_own_at_its_size():
    model = network("vit_tiny", width=0.25, depth=1, img_size=(32, 64))
    program, any_size = trace(model, in_chans=3, image_size=64)
    assert any_size
    assert_same_at(program.module(), model, [(2, 32, 64), (1, 64, 32), (2, 40, 70)])


class OneSize(torch.nn.Module):
    """A network of one size of images, as torchvision's vision transformers are."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 16 * 16, 4)

    def forward(self, images):
        if images.shape[2:] != (16, 16):
            raise ValueError(f"--arch takes images of 16 px only, not {images.shape[2]}")
        return self.layer(images.flatten(1))

    forward_backbone = forward


@pytest.mark.slow
def test_a_network_of_one_size_becomes_a_program_of_that_size_and_any_number_of_images():
    model = OneSize().eval()
    program, any_size = trace(model, in_chans=3, image_size=16)
    assert not any_size
    assert_same_at(program.module(), model, [(1, 16, 16), (5, 16, 16)])
    with pytest.raises(ValueError, match="takes images of 16 px only, not 32"):
        trace(model, in_chans=3, image_size=32)


# ============ ONNX ============
@pytest.mark.slow
@pytest.mark.parametrize("make", [resnet, vit])
def test_onnxruntime_gives_the_features_for_any_number_of_images_of_any_size(make):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = make()
    program, any_size = trace(model, in_chans=3, image_size=64)
    contents = to_onnx(program, any_size)
    assert_same_at(onnx_features(contents), model, SIZES)
    graph = onnx.load_from_string(contents).graph
    dims = graph.input[0].type.tensor_type.shape.dim
    assert [x.dim_param or x.dim_value for x in dims] == ["batch", 3, "height", "width"]


def test_weights_beyond_two_gigabytes_are_refused_as_onnx(monkeypatch):
    program, any_size = trace(OneSize().eval(), in_chans=3, image_size=16)
    monkeypatch.setattr(export_programs, "LARGEST_ONNX", 100)
    with pytest.raises(ValueError, match="--format onnx: .* use --format torch_export"):
        to_onnx(program, any_size)


# ============ checks ============
def test_a_program_that_differs_is_refused():
    model = resnet()
    with pytest.raises(RunError, match="differ by .* for 1 images of 64 x 64 px"):
        check(lambda images: 1.001 * model(images), model, 3, [(64, 64)])
    with pytest.raises(RunError, match="differ by nan"):
        check(lambda images: model(images) * float("nan"), model, 3, [(64, 64)])
    assert check(model, model, 3, [(64, 64)]) == 0
