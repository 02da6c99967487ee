"""Detectors on trunks of ours and of libraries: which maps they use, what they train and draw."""

import pytest
import torch

from src.evaluate.detection_networks import TrunkMaps, build_detector
from src.evaluate.detection_samples import SamplesByImage, set_draws
from src.nets.pretrained import open_pretrained


def detector_of(kind, arch="resnet10", **options):
    options = {"width": 0.125, **options} if arch.startswith(("resnet", "vit")) else options
    network = open_pretrained("", arch, **options)
    return build_detector(network, kind, 3, mean=[0.5] * 3, std=[0.3] * 3, seed=0, proposals=16)


def losses_of(detector, num=2, size=(64, 96)):
    """The losses of a batch of noise with a box in each image."""
    draws = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=draws) for _ in range(num)]
    masks = torch.zeros(1, *size, dtype=torch.uint8)
    masks[:, 10:40, 5:50] = 1
    target = {"boxes": torch.tensor([[5.0, 10, 50, 40]]), "labels": torch.tensor([2])}
    detector.train()
    set_draws(detector, [(1, i) for i in range(num)])
    return detector(images, [{**target, "masks": masks}] * num)


# ============ maps ============
@pytest.mark.parametrize(
    ("arch", "options", "strides"),
    [
        ("resnet10", {}, [4, 8, 16, 32]),
        ("resnet10", {"stem": "small"}, [1, 2, 4, 8]),
        ("mobilenet_v3_small", {}, [4, 8, 16, 32]),
        ("vit_tiny", {"depth": 1, "patch_size": 16}, [4, 8, 16, 32]),
        ("vit_tiny", {"depth": 1, "patch_size": 8}, [2, 4, 8, 16]),
    ],
)
def test_a_pyramid_stands_on_four_maps_of_any_trunk_and_all_that_is_trained_has_a_gradient(
    arch, options, strides
):
    detector = detector_of("faster_rcnn_fpn", arch, **options)
    assert detector.backbone.maps.strides == strides
    maps = detector.backbone.eval()(torch.zeros(1, 3, 64, 96))
    sizes = [tuple(x.shape[2:]) for x in maps.values()]
    assert sizes[:4] == [(64 // stride, 96 // stride) for stride in strides]
    assert len(sizes) == 5
    sum(losses_of(detector).values()).backward()
    trained = {name: p for name, p in detector.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert len(trained) > 40


def test_the_maps_of_a_resnet_are_the_outputs_of_its_stages():
    network = open_pretrained("", "resnet10", width=0.125)
    expected = open_pretrained("", "resnet10", width=0.125).model
    maps = TrunkMaps(network, 4)
    assert maps.layers == ["layer1", "layer2", "layer3", "layer4"]
    images = torch.randn(2, 3, 64, 64)
    x = expected.maxpool(expected.relu(expected.bn1(expected.conv1(images))))
    for i, found in enumerate(maps(images).values()):
        x = getattr(expected, f"layer{i + 1}")(x)
        assert torch.equal(found, x)


def test_anchors_and_levels_of_boxes_are_as_published_at_the_published_strides():
    detector = detector_of("mask_rcnn_fpn")
    assert detector.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    pool = detector.roi_heads.box_roi_pool
    assert (pool.canonical_scale, pool.canonical_level) == (224, 4)
    small = detector_of("faster_rcnn_fpn", stem="small")
    assert small.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))
    of_c4 = detector_of("faster_rcnn_c4")
    assert of_c4.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),)
    assert of_c4.rpn._pre_nms_top_n == {"training": 12000, "testing": 6000}


def test_the_last_stage_and_a_batch_norm_are_the_head_of_c4():
    network = open_pretrained("", "resnet10", width=0.125)
    stage = network.model.layer4
    detector = build_detector(
        network, "faster_rcnn_c4", 3, mean=[0.5] * 3, std=[0.3] * 3, seed=0, proposals=16
    )
    head = detector.roi_heads.box_head
    assert head[0] is stage and isinstance(head[1], torch.nn.BatchNorm2d)
    assert detector.backbone.strides == [16] and detector.backbone.channels == [32]
    names = [name for name, _ in detector.named_parameters()]
    assert not any("backbone" in name and "layer4" in name for name in names)
    losses = losses_of(detector)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.parameters())
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert losses.keys() == names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "arch", "words"),
    [
        ("faster_rcnn_c4", "mobilenet_v3_small", "faster_rcnn_c4 is for ResNets.*faster_rcnn_fpn"),
        ("faster_rcnn_fpn", "swin_t", "--arch swin_t has maps at the strides .* needs 4"),
        ("mask_rcnn_fpn", "alexnet", "--arch alexnet has maps at the strides"),
    ],
)
def test_a_trunk_that_does_not_fit_is_refused_in_a_sentence(kind, arch, words):
    with pytest.raises(ValueError, match=words):
        detector_of(kind, arch)


# ============ draws and types ============
def test_samples_of_an_image_depend_on_its_key_alone():
    labels = [torch.randint(-1, 3, (500,)) for _ in range(3)]
    sampler = SamplesByImage(64, 0.25)
    sampler.keys = [(7, i) for i in range(3)]
    positive, negative = sampler(labels)
    for of_image, found, others in zip(labels, positive, negative, strict=True):
        assert found.sum() == 16 and others.sum() == 48
        assert (of_image[found.bool()] >= 1).all() and (of_image[others.bool()] == 0).all()
    sampler.keys = [(7, 2), (7, 1)]
    alone = sampler([labels[2], labels[1]])
    assert torch.equal(alone[0][0], positive[2]) and torch.equal(alone[1][1], negative[1])
    sampler.keys = [(8, 2)]
    assert not torch.equal(sampler([labels[2]])[0][0], positive[2])


def test_few_positives_leave_their_room_to_negatives():
    labels = torch.zeros(300)
    labels[:5], labels[5:20] = 1, -1
    sampler = SamplesByImage(64, 0.25)
    sampler.keys = [(0,)]
    (positive,), (negative,) = sampler([labels])
    assert positive.sum() == 5 and negative.sum() == 59


def test_the_head_starts_as_the_seed_makes_it_whatever_was_drawn_before():
    first = detector_of("mask_rcnn_fpn").state_dict()
    torch.randn(7)
    second = detector_of("mask_rcnn_fpn").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["roi_heads.box_predictor.bbox_pred.weight"].std().item() == pytest.approx(
        0.001, rel=0.1
    )


def test_under_autocast_boxes_are_computed_in_float32():
    detector = detector_of("faster_rcnn_fpn")
    anchors = []
    generator = detector.rpn.anchor_generator
    generator.register_forward_hook(lambda module, inputs, output: anchors.append(output[0]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(detector)
        detector.eval()
        detector.roi_heads.score_thresh = 0.0
        with torch.no_grad():
            (found,) = detector([torch.rand(3, 64, 96)])
    assert all(x.dtype == torch.float32 for x in losses.values())
    assert found["boxes"].dtype == anchors[0].dtype == torch.float32
    assert len(found["boxes"]) and (found["boxes"] % 1 != 0).any()


def test_detections_are_of_the_image_before_it_was_resized():
    detector = detector_of("mask_rcnn_fpn").eval()
    detector.roi_heads.score_thresh = 0.0
    image = torch.rand(3, 64, 96)
    with torch.no_grad():
        (own,) = detector([image])
        detector.transform.original_sizes = [(128, 144)]
        (larger,) = detector([image])
    assert larger["masks"].shape[1:] == (1, 128, 144) and own["masks"].shape[1:] == (1, 64, 96)
    scale = torch.tensor([1.5, 2, 1.5, 2])
    torch.testing.assert_close(larger["boxes"], own["boxes"] * scale)
