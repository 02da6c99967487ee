"""Networks on the device: golden outputs in float32 and bfloat16, gradients of whole training steps."""

import copy

import numpy as np
import pytest
import torch

from main_dino import DINOLoss
from main_swav import assign_codes, swav_loss
from src import dist
from src.data.augment import Augment
from src.nets.dino_head import DINOHead, MultiCropWrapper
from src.nets.resnet import resnet10, resnet50
from src.nets.vision_transformer import VisionTransformer
from src.optim import LARC, clip_gradients
from tests.data.test_augment import MEAN, STD, SWAV, generator, random_batch
from tests.golden_weights import fill
from tests.gpu.host import relative_error, to_device, to_host
from tests.nets import test_convnets, test_dino_head, test_resnet, test_vision_transformer

pytestmark = pytest.mark.gpu

# Absolute; of features relative to the largest one. float32 on a CPU is off by 3e-7 (embedding,
# scores), 1e-6 (features, attention) and 9e-6 (class token); TensorFloat-32 would not pass.
RESNET = {
    "fp32": {"embedding": 2e-5, "scores": 2e-5, "features": 1e-4},
    "bf16": {"embedding": 0.01, "scores": 0.01, "features": 0.03},
}
TRANSFORMER = {
    "fp32": {"class token": 1e-4, "attention": 1e-5},
    "bf16": {"class token": 0.12, "attention": 0.05},
}
DINO_HEAD = {"fp32": 5e-5, "bf16": 0.015}
DINO_WRAPPER = {"fp32": 5e-5, "bf16": 0.06}
CONVNET = {"fp32": 1e-4, "bf16": 0.03}
# Of a training step, against float64: loss relative; gradient: the length of the difference over its
# own. A CPU is off by 3e-6 and 0.24 (SwAV), 6e-7 and 0.006 (DINO), but by 6e-3 in float32 where a ReLU
# of the ResNet is so near to 0 that rounding decides it.
STEP = {
    "swav": {"fp32": {"loss": 1e-5, "gradient": 1e-2}, "bf16": {"loss": 0.01, "gradient": 0.5}},
    "dino": {"fp32": {"loss": 1e-5, "gradient": 1e-5}, "bf16": {"loss": 0.01, "gradient": 0.02}},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def close(actual, expected, atol):
    np.testing.assert_allclose(to_host(actual), expected, rtol=0, atol=atol)


# ============ golden outputs ============
@pytest.fixture(scope="module")
def resnet(device):
    """SwAV's ResNet-50 of the golden file, laid out as in training."""
    model = resnet50(**test_resnet.SWAV, nmb_prototypes=30)
    return fill(model, "hash").eval().to(device, memory_format=torch.channels_last)


@torch.no_grad()
def test_a_resnet_50_gives_the_golden_embedding_scores_and_features(
    golden, device, precision, resnet
):
    arrays, tolerances = golden("resnet50_swav"), RESNET[precision]
    large, small = to_device(arrays, ["crops_global", "crops_local"], device)
    with dist.autocast(device, precision):
        embedding, scores = resnet([*large, *small])
        features = resnet.forward_backbone(large[0])
    assert features.dtype == DTYPES[precision]
    assert embedding.dtype == scores.dtype == torch.float32
    close(embedding, arrays["hash_embedding"], tolerances["embedding"])
    close(scores, arrays["hash_scores"], tolerances["scores"])
    assert relative_error(features, arrays["hash_avgpool"]) <= tolerances["features"]


@torch.no_grad()
@pytest.mark.parametrize("name", test_vision_transformer.GOLDEN)
def test_a_vision_transformer_gives_the_golden_class_tokens_and_attention(golden, device, name):
    arrays = golden("vit_small16")
    build, patch_size, img_size, *_ = test_vision_transformer.GOLDEN[name]
    model = fill(build(patch_size, [img_size]), "hash").eval().to(device)
    for precision, tolerances in TRANSFORMER.items():
        for kind in test_vision_transformer.INPUTS:
            (x,) = to_device(arrays, [f"{name}_x_{kind}"], device)
            with dist.autocast(device, precision):
                tokens = model(x)
                attention = model.get_last_selfattention(x)
            close(tokens, arrays[f"{name}_hash_cls_{kind}"], tolerances["class token"])
            if kind != "larger":
                expected = arrays[f"{name}_hash_lastattn_{kind}"]
                close(attention, expected, tolerances["attention"])


@torch.no_grad()
@pytest.mark.parametrize("variant", test_dino_head.VARIANTS)
def test_dinos_head_gives_the_golden_outputs(golden, device, precision, variant):
    arrays = golden("dino_head")
    head = fill(test_dino_head.golden_head(variant), "hash").eval().to(device)
    (x,) = to_device(arrays, ["x"], device)
    with dist.autocast(device, precision):
        output = head(x)
    assert output.dtype == DTYPES[precision]
    close(output, arrays[f"{variant}_hash_out"], DINO_HEAD[precision])


@torch.no_grad()
def test_transformer_and_head_give_the_golden_outputs_of_several_crops(golden, device, precision):
    arrays = golden("dino_head")
    wrapper = fill(test_dino_head.golden_wrapper(), "hash").eval().to(device)
    large, small = to_device(arrays, ["mc_global", "mc_local"], device)
    with dist.autocast(device, precision):
        output = wrapper([*large, *small])
    close(output, arrays["mc_out"], DINO_WRAPPER[precision])


@torch.no_grad()
@pytest.mark.parametrize("arch", ["alexnet", "vgg16"])
def test_a_convnet_with_sobel_filters_gives_the_features_of_float64(device, precision, arch):
    model = test_convnets.small(arch, num_classes=7)
    for parameter in model.classifier.parameters():  # as far from 0 as trained ones
        parameter.mul_(10)
    size = test_convnets.SIZES[arch]
    x = test_convnets.images(2, 3, size, size)
    expected = test_convnets.by_hand(model, arch, x)
    model.to(device, memory_format=torch.channels_last)
    with dist.autocast(device, precision):
        features, scores = model(x.to(device))
    assert features.dtype == DTYPES[precision] and scores.shape == (2, 7)
    assert relative_error(features, expected) <= CONVNET[precision]


# ============ gradients ============
def crops_of(sizes, batch_size):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(batch_size, 3, size, size, generator=generator) for size in sizes]


def swav_step(model, crops, device, precision):
    """The loss of a training step; the gradients are left in the parameters."""
    with dist.autocast(device, precision):
        _, scores = model(crops)
    prototypes, views = model.prototypes.weight.detach(), scores.detach().unflatten(0, (3, -1))
    codes = assign_codes(views, prototypes, [0, 1], None, False, epsilon=0.05, iterations=3)
    loss = swav_loss(scores, codes, [2, 1], [0, 1], 0.1)
    loss.backward()
    return loss


def dino_step(student, crops, device, precision):
    """As swav_step; the teacher is a copy of the student, before any step."""
    teacher = copy.deepcopy(student)
    criterion = DINOLoss(16, 3, 0.04, 0.04, 0, 1).to(device)
    with dist.autocast(device, precision):
        with torch.no_grad():
            teacher_output = teacher(crops[:2])
        student_output = student(crops)
    loss = criterion(student_output, teacher_output, 0)
    loss.backward()
    clip_gradients(list(student.parameters()), 3.0)
    return loss


def swav_network():
    torch.manual_seed(0)
    return resnet10(
        normalize=True, hidden_mlp=32, output_dim=16, nmb_prototypes=12, stem="small", width=0.25
    )


def dino_network():
    torch.manual_seed(0)
    trunk = VisionTransformer(patch_size=4, img_size=16, embed_dim=48, num_heads=3, depth=3)
    student = MultiCropWrapper(trunk, DINOHead(48, 16, hidden_dim=32, bottleneck_dim=16))
    return test_vision_transformer.spread(student, std=0.2)


def gradient_of(model):
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return np.concatenate([to_host(gradient).astype(np.float64).ravel() for gradient in gradients])


METHODS = {  # network, training step, sizes of the crops
    "swav": (swav_network, swav_step, [32, 32, 16]),
    "dino": (dino_network, dino_step, [16, 16, 8]),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_has_the_loss_and_gradient_of_float64(device, precision, method):
    build, step, sizes = METHODS[method]
    tolerances = STEP[method][precision]
    model, crops = build().train(), crops_of(sizes, batch_size=8)
    exact = copy.deepcopy(model).double()
    expected = step(exact, [crop.double() for crop in crops], torch.device("cpu"), "fp32")
    model.to(device, memory_format=torch.channels_last)
    loss = step(model, [crop.to(device) for crop in crops], device, precision)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert loss.item() == pytest.approx(expected.item(), rel=tolerances["loss"])
    found, exact_gradient = gradient_of(model), gradient_of(exact)
    difference = np.linalg.norm(found - exact_gradient) / np.linalg.norm(exact_gradient)
    assert difference <= tolerances["gradient"]
    buffers = zip(model.buffers(), exact.buffers(), strict=True)  # statistics of the batch norms
    for buffer, expected_buffer in buffers:
        assert relative_error(buffer, to_host(expected_buffer)) <= tolerances["gradient"]


# ============ the host ============
def test_the_host_waits_for_nothing_in_a_training_step_of_swav(device, precision):
    if device.type != "cuda":
        pytest.skip("only PyTorch's CUDA can tell where the host waits")
    model = swav_network().train().to(device, memory_format=torch.channels_last)
    augment = Augment(MEAN, STD, **SWAV)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-6)
    optimizer = LARC(sgd)
    batch = random_batch(batch_size=8, counts=(2, 1), sizes=(32, 16))
    batch = [images.pin_memory() for images in batch]
    for mode in ("default", "error"):  # the first step sets up libraries and buffers
        torch.cuda.set_sync_debug_mode(mode)
        try:
            crops = [images.to(device, non_blocking=True) for images in batch]
            loss = swav_step(model, augment(crops, generator(0)), device, precision)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
