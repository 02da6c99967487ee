"""src.evaluate.finetuning: classifier, rates by layer, average of the weights, folded Sobel filters."""

import pytest
import torch

from src.evaluate.finetuning import (
    FineTunedNetwork,
    WeightAverage,
    groups_by_layer,
    trunk_and_classifier,
)
from src.nets.convnets import VGG16, build_convnet
from src.nets.folded_sobel import fold_sobel
from src.nets.resnet import build_model
from src.nets.vision_transformer import VisionTransformer


def vit(depth=3):
    return VisionTransformer(
        patch_size=4, img_size=8, embed_dim=12, num_heads=3, depth=depth, num_registers=1
    )


def rates_of(module, groups):
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_the_classifier_alone_has_its_own_rate():
    module = FineTunedNetwork(build_model("resnet10", width=0.125), 5, seed=1)
    rates = rates_of(module, trunk_and_classifier(module, 0.02, 5.0))
    assert set(rates) == {name for name, _ in module.named_parameters()}
    for name, group in rates.items():
        assert group["base_lr"] == (5.0 if name.startswith("linear.") else 0.02)


def test_rates_fall_by_the_layer_decay_for_each_block_from_the_last():
    module = FineTunedNetwork(vit(), 5, seed=1)
    groups = groups_by_layer(module, 1.0, 2.0, layer_decay=0.5, decays_vectors=False)
    rates = rates_of(module, groups)
    assert set(rates) == {name for name, _ in module.named_parameters()}
    for name, rate in (
        ("linear.weight", 2.0),
        ("backbone.norm.weight", 1.0),
        ("backbone.blocks.2.mlp.fc1.weight", 0.5),
        ("backbone.blocks.0.norm1.bias", 0.125),
        ("backbone.patch_embed.proj.weight", 0.0625),
        ("backbone.cls_token", 0.0625),
        ("backbone.pos_embed", 0.0625),
    ):
        assert rates[name]["base_lr"] == rate, name
    undecayed = {name for name, group in rates.items() if group.get("weight_decay") == 0}
    tokens = {f"backbone.{name}" for name in ("cls_token", "pos_embed", "register_tokens")}
    vectors = {name for name, p in module.named_parameters() if p.ndim == 1}
    assert undecayed == vectors | tokens
    assert (
        groups[-1]["params"][0] is module.linear.weight
    )  # the log's last rate is the classifier's


def test_a_layer_decay_of_a_network_without_blocks_is_refused():
    module = FineTunedNetwork(build_model("resnet10", width=0.125), 5, seed=1)
    with pytest.raises(ValueError, match="--layer_decay 0.5"):
        groups_by_layer(module, 1.0, 1.0, layer_decay=0.5)
    (group,) = groups_by_layer(module, 1.0, 1.0)
    assert len(group["params"]) == len(list(module.parameters())) and "weight_decay" not in group


def test_crops_of_several_sizes_are_classified_crop_major():
    module = FineTunedNetwork(vit(), 5, seed=1).eval()
    crops = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)]
    scores = module(crops)
    torch.testing.assert_close(scores, torch.cat([module(crop) for crop in crops]))


def test_the_classifier_depends_on_the_seed_and_leaves_the_random_state():
    before = torch.get_rng_state()
    first, same, other = (
        FineTunedNetwork(build_model("resnet10", width=0.125), 5, seed=seed).linear.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    torch.set_rng_state(before)
    FineTunedNetwork(vit(), 5, seed=1)
    assert first.abs().max() <= 1 / first.shape[1] ** 0.5


def test_the_linear_layers_of_vgg_start_anew():
    network = VGG16(width=1 / 64)
    before = network.features[0].weight.clone()
    torch.nn.init.ones_(network.classifier[0].weight)
    module = FineTunedNetwork(network, 5, seed=1)
    for layer in (module.backbone.classifier[0], module.backbone.classifier[3]):
        assert abs(layer.weight.std() - 0.01) < 2e-3 and (layer.bias == 0.1).all()
    assert torch.equal(module.backbone.features[0].weight, before)


def test_the_average_follows_weights_and_buffers():
    network = torch.nn.BatchNorm1d(2)
    average = WeightAverage(network, 0.9, torch.device("cpu"))
    expected, counts = torch.ones(2), 0
    for step in range(3):
        with torch.no_grad():
            network.weight += step + 1.0
        network(torch.randn(4, 2))
        average.update(network)
        expected, counts = 0.9 * expected + 0.1 * network.weight.detach(), counts + 1
    torch.testing.assert_close(average.module.weight, expected)
    assert average.module.num_batches_tracked == counts and not average.module.training
    assert not average.module.weight.requires_grad


@pytest.mark.parametrize("arch", ["vgg16", "resnet10"])
@torch.no_grad()
def test_folded_sobel_filters_give_the_same_features_of_colours(arch):
    torch.manual_seed(0)
    network = build_convnet(arch, sobel=True, sobel_padding=2, width=0.125).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = network.forward_backbone(images)
    fold_sobel(network)
    assert network.sobel is None
    torch.testing.assert_close(network.forward_backbone(images), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="--sobel2RGB"):
        fold_sobel(network)
