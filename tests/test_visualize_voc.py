"""visualize.py attention --voc: masks of attention against VOC 2012's objects, and what stands beside."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from src.evaluate.voc_segments import open_segmented, read_labels, true_masks
from src.nets.backbones import build_backbone
from src.pictures import attention_masks
from src.pictures.attention import fit_image, fit_labels, keep_mass
from tests.segmented_images import write_segments

SMALL = shlex.split("--device cpu --seed 3 --arch vit_tiny --depth 1 --width 0.34 --patch_size 8")
SIZE = ["--image_size", "48", "64"]


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_segments(tmp_path_factory.mktemp("voc") / "VOCdevkit" / "VOC2012")


def measure(folder, voc, *argv):
    words = ["attention", *SMALL, *SIZE, "--voc", voc, "--dump_path", folder, *argv]
    assert visualize.main([str(word) for word in words]) == 0
    text = (folder / "attention_voc.json").read_text()
    assert text.count("\n") == 1
    return json.loads(text)


# ============ the true masks ============
def test_true_masks_are_of_objects_of_classes_and_of_all_without_the_border(voc):
    for path in (voc, voc.parent, voc.parent.parent):
        images = open_segmented(str(path))
        assert [x.name for x in images] == [f"2007_{i:06}" for i in range(5)]
    masks, void = true_masks(read_labels(images[0]))
    assert {kind: len(x) for kind, x in masks.items()} == {
        "objects": 3,
        "classes": 2,
        "foreground": 1,
    }
    assert masks["objects"].sum((1, 2)).tolist() == [144, 144, 144]
    assert masks["classes"].sum((1, 2)).tolist() == [288, 144]
    assert masks["foreground"].sum() == 3 * 144 and not (masks["foreground"] & void).any()


def test_labels_are_resized_and_cut_as_images_are():
    labels = torch.arange(6 * 10).view(1, 6, 10).to(torch.uint8)
    for size in ([12, 20], [13], [6, 10], [3]):
        image = fit_image(labels.expand(3, -1, -1), size, 3)
        assert fit_labels(labels, size, 3).shape[1:] == image.shape[1:]
    assert torch.equal(
        fit_labels(labels, [12, 20], 4), labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    )
    assert torch.equal(
        fit_labels(labels, [3, 5], 1), labels[:, 1::2, 1::2]
    )  # the nearest, no mixture


# ============ similarities ============
def test_similarities_are_of_the_best_mask_for_each_object_and_of_one_for_all():
    labels = np.zeros((2, 4, 8), np.uint8)
    labels[:, :2, :2], labels[0, :2, 4:6], labels[1, :2, 4:6] = 1, 2, 1  # two objects of class 1
    labels[:, 3] = 255
    first, second = labels[0] == 1, labels[0] == 2
    overlaps = attention_masks.Overlaps()
    assert overlaps.add("a", np.stack([first, second]), labels).tolist() == [0.5, 0.5]
    overlaps.add("a", np.stack([first | second, first]), labels)
    (row,) = overlaps.table()
    assert row["images"] == 2
    assert row["objects"] == pytest.approx(100 * np.mean([1, (1 + 0.5) / 2]))
    assert row["classes"] == row["foreground"] == pytest.approx(100 * np.mean([0.5, 1]))
    assert row["foreground_one"] == pytest.approx(75) and row["foreground_number"] == 0
    assert row["objects_one"] == pytest.approx(50)
    void = np.zeros((2, 4, 8), np.uint8)
    assert overlaps.add("a", np.stack([first]), void) is None  # no object: not counted


def test_random_places_are_as_many_as_each_head_has():
    maps = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0)) ** 8
    masks = attention_masks.masks_of(maps, 0.6, torch.Generator().manual_seed(1))
    again = attention_masks.masks_of(maps, 0.6, torch.Generator().manual_seed(1))
    assert torch.equal(masks["best head"], keep_mass(maps, 0.6))
    assert torch.equal(masks["mean of the heads"], keep_mass(maps.mean(0, keepdim=True), 0.6))
    random = masks["random places"]
    assert random.sum((1, 2)).tolist() == masks["best head"].sum((1, 2)).tolist()
    assert not torch.equal(random, masks["best head"])
    assert torch.equal(random, again["random places"])


# ============ whole runs ============
def test_attention_on_the_objects_beats_random_places(tmp_path, voc, monkeypatch):
    def look_at_bright(model, images):
        """Attention of one head to what is bright, of another to what is not."""
        means = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)  # (B, N)
        heads = torch.stack([means.softmax(1), (-means).softmax(1)], 1)  # (B, 2, N)
        tokens = 1 + heads.shape[2]
        attention = torch.zeros(len(images), 2, tokens, tokens)
        attention[:, :, 0, 1:] = heads
        return attention

    vit = type(build_backbone("vit_tiny", depth=1))
    monkeypatch.setattr(vit, "get_last_selfattention", look_at_bright)
    rows = {row["masks"]: row for row in measure(tmp_path, voc)["results"]}
    assert set(rows) == {"best head", "mean of the heads", "random places"}
    for kind in ("objects", "classes", "foreground"):
        assert rows["best head"][kind] > rows["random places"][kind] + 10, kind
    assert rows["best head"]["foreground_number"] == 0 and rows["best head"]["images"] == 5
    assert rows["best head"]["foreground"] > 2 * rows["random places"]["foreground"]
    assert Image.open(tmp_path / "attention_voc.png").width > 900


@pytest.mark.slow
def test_a_baseline_is_measured_as_if_it_were_alone(tmp_path, voc):
    model = build_backbone("vit_tiny", depth=2, patch_size=4, img_size=32)
    torch.save(model.state_dict(), tmp_path / "other.pth")
    both = measure(tmp_path / "both", voc, "--baseline", tmp_path / "other.pth")
    words = ["--voc", voc, "--device", "cpu", *SIZE, "--pretrained", tmp_path / "other.pth"]
    words = ["attention", *words, "--dump_path", tmp_path / "alone"]
    assert visualize.main([str(word) for word in words]) == 0
    alone = json.loads((tmp_path / "alone" / "attention_voc.json").read_text())
    assert "other.pth" in both["networks"]["baseline"]
    expected = {**alone["results"][0], "masks": "baseline"}
    assert both["results"][-1] == expected
    assert both["results"][:3] == measure(tmp_path / "own", voc)["results"]
    words += ["--dump_path", tmp_path / "same", "--baseline", "untrained"]
    assert visualize.main([str(word) for word in words]) == 0
    trained = json.loads((tmp_path / "same" / "attention_voc.json").read_text())
    assert trained["networks"]["baseline"] == "an untrained vit_tiny"
    assert trained["results"][:3] == alone["results"] and trained["results"][-1] != expected


def test_the_mass_and_the_number_of_images_are_those_of_the_flags(tmp_path, voc):
    small = measure(tmp_path / "a", voc, "--threshold", 0.2, "--num_images", 2)
    assert small["mass"] == 0.2 and small["results"][0]["images"] == 2
    assert small["results"] != measure(tmp_path / "b", voc, "--num_images", 2)["results"]


# ============ misuse ============
def test_what_is_missing_or_does_not_fit_is_one_sentence(tmp_path, voc):
    with pytest.raises(
        FileNotFoundError, match="--voc .* has no SegmentationObject: give the fold"
    ):
        measure(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="--voc brings its images: leave out --image_path"):
        measure(tmp_path, voc, "--image_path", "a.jpg")
    with pytest.raises(ValueError, match="--baseline is measured with --voc"):
        visualize.main(
            ["attention", *SMALL, "--baseline", "untrained", "--dump_path", str(tmp_path)]
        )
    torch.save(build_backbone("resnet18", width=0.25).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="no class token"):
        measure(tmp_path, voc, "--baseline", tmp_path / "resnet.pth")
    other = write_segments(tmp_path / "VOC2012", count=1)
    (other / "SegmentationClass" / "2007_000000.png").unlink()
    with pytest.raises(
        FileNotFoundError, match="SegmentationClass.2007_000000.png, which .*val.txt"
    ):
        measure(tmp_path, other)
