"""src.nets.layers: what a layer of any network puts out, by its name."""

import pytest
import torch

from src.nets.convnets import build_convnet
from src.nets.layers import forward_of_layer, module_name
from src.nets.resnet import build_model, resnet10
from src.nets.vision_transformer import ARCHITECTURES


def test_a_layer_is_averaged_over_positions_before_the_next_works_in_place():
    model = resnet10(width=0.125, stem="small").eval()
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        maps = model.bn1(model.conv1(x))  # the ReLU behind it works in place
        torch.testing.assert_close(forward_of_layer(model, "bn1")(x), maps.mean((2, 3)))
        maps = model.layer2(model.layer1(model.relu(maps)))
        torch.testing.assert_close(forward_of_layer(model, "layer2")(x), maps.mean((2, 3)))
        pooled = model.forward_backbone(x)
        torch.testing.assert_close(forward_of_layer(model)(x), pooled)
        torch.testing.assert_close(forward_of_layer(model, "layer4")(x), pooled)
        torch.testing.assert_close(forward_of_layer(model, "avgpool")(x), pooled)


def test_layers_of_other_networks_too():
    with torch.no_grad():
        model = ARCHITECTURES["vit_micro"](patch_size=4, img_size=8, depth=2).eval()
        tokens = forward_of_layer(model, "blocks.1")(torch.randn(3, 3, 8, 8))
        assert tokens.shape == (3, model.num_features)
        model = build_convnet("alexnet", 5, sobel=True, width=0.05).eval()
        features = forward_of_layer(model, "classifier.1")(torch.randn(2, 3, 64, 64))
        assert features.shape == (2, 205) and features.min() < 0  # before its ReLU, in place
    with pytest.raises(ValueError, match="--layer top_layer has no part"):
        forward_of_layer(model, "top_layer")(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match="--layer layer9 is not in the network; near to it are"):
        forward_of_layer(model, "layer9")


def test_the_names_of_a_network_of_others_need_no_name_of_what_wraps_it():
    model = build_model("squeezenet1_1")
    assert module_name(model, "features.3") == ("trunk.features.3", [])
    assert module_name(model, "trunk.features.3") == ("trunk.features.3", [])
    whole, near = module_name(model, "feature.3")
    assert whole is None and "features.3" in near
