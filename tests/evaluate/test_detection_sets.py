"""VOC and COCO as distributed: boxes, difficult objects, crowds, masks; flips and sizes keep boxes right."""

import json

import numpy as np
import pytest
import torch

from src.evaluate.detection_sets import (
    Objects,
    TestImages,
    TrainingImages,
    kind_of_set,
    mirror_boxes,
    open_detection,
    resize_boxes,
    size_of_image,
)
from src.evaluate.masks import masks_of_segments, runs_of_masks
from tests.detection_images import COCO_CATEGORIES, VOC_NAMES, runs_of, write_coco, write_voc

TestImages.__test__ = False  # of detection, and no class of tests


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc") / "VOCdevkit"
    counts = {"2007_trainval": 5, "2012_trainval": 4, "2007_test": 3}
    written = write_voc(folder, counts, difficult=(("2007_trainval", 1, 0), ("2007_test", 0, 0)))
    return folder, written


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    pytest.importorskip("pycocotools")
    folder = tmp_path_factory.mktemp("coco") / "coco"
    written = write_coco(folder, {"train2017": 6, "val2017": 4}, crowd=(("train2017", 0, 0),))
    return folder, written


# ============ reading ============
def test_boxes_of_voc_begin_at_the_corner_of_the_image_and_end_behind_the_last_pixel(voc):
    folder, written = voc
    data = open_detection(str(folder), ["2007_trainval", "2012_trainval"])
    assert kind_of_set(str(folder)) == "voc" and len(data) == 9
    rows = written["2007_trainval"] + written["2012_trainval"]
    assert data.ids == [name for name, _ in rows]
    for objects, (_, shapes) in zip(data.objects, rows, strict=True):
        assert objects.boxes.tolist() == [box for _, box in shapes]
        names = [data.classes[label - 1] for label in objects.labels]
        assert names == [VOC_NAMES[kind] for kind, _ in shapes]
    assert [bool(x.ignored.any()) for x in data.objects] == [False, True, *[False] * 7]
    assert data.images.load(0).shape == (3, 64, 72)
    parent = open_detection(str(folder.parent), ["2007_test"])  # what holds the VOCdevkit
    assert len(parent) == 3 and parent.digest() != data.digest()


def test_difficult_objects_are_trained_on_and_crowds_are_not(voc, coco):
    data = open_detection(str(voc[0]), ["2007_trainval"])
    assert data.with_objects() == [0, 1, 2, 3, 4]
    assert data.trained_on(data.objects[1]).all()
    data = open_detection(str(coco[0]), ["train2017"])
    assert data.objects[0].ignored.tolist()[0] and not data.trained_on(data.objects[0])[0]
    others = (~data.objects[0].ignored).any()
    assert data.with_objects() == [*([0] if others else []), 1, 2, 3, 4]  # the last one has none


def test_categories_of_coco_become_labels_in_order_and_keep_their_numbers(coco):
    folder, written = coco
    data = open_detection(str(folder), ["train2017"], with_masks=True)
    assert data.kind == "coco" and data.classes == list(COCO_CATEGORIES.values())
    assert data.categories == list(COCO_CATEGORIES)
    assert data.ids == [image["id"] for image in written["train2017"]["images"]]
    for number, image in zip(range(6), data.ids, strict=True):
        own = [x for x in written["train2017"]["annotations"] if x["image_id"] == image]
        objects = data.objects[number]
        expected = [
            [x["bbox"][0], x["bbox"][1], x["bbox"][0] + x["bbox"][2], x["bbox"][1] + x["bbox"][3]]
            for x in own
        ]
        np.testing.assert_allclose(objects.boxes, np.reshape(expected, (-1, 4)), atol=1e-5)
        assert [data.categories[label - 1] for label in objects.labels] == [
            x["category_id"] for x in own
        ]
        assert len(objects.segments) == len(own)


def test_boxes_of_coco_are_cut_to_the_image_and_those_without_an_area_are_left_out(coco, tmp_path):
    write_coco(tmp_path / "coco", {"train2017": 2})
    file = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    contents = json.loads(file.read_text())
    first = contents["annotations"][0]
    boxes = [[-5, 10, 20, 100], [3, 3, 0, 9], [80, 2, 9, 9]]
    contents["annotations"] = [{**first, "id": i, "bbox": box} for i, box in enumerate(boxes)]
    file.write_text(json.dumps(contents))
    data = open_detection(str(tmp_path / "coco"), ["train2017"])
    assert data.objects[0].boxes.tolist() == [[0, 10, 15, 64]]


@pytest.mark.parametrize("remove", ["VOC2007/ImageSets/Main/test.txt", "VOC2007/Annotations"])
def test_a_voc_folder_that_is_not_whole_is_refused_in_a_sentence(tmp_path, remove):
    write_voc(tmp_path / "VOCdevkit", {"2007_trainval": 1, "2007_test": 1})
    path = tmp_path / "VOCdevkit" / remove
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError) as caught:
        open_detection(str(tmp_path / "VOCdevkit"), ["2007_test"])
    known = "there are 2007_trainval" if "ImageSets" in remove else "2007_test_00000.xml"
    assert known in str(caught.value)


def test_other_folders_broken_files_and_unknown_splits_are_refused_in_a_sentence(coco, tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_path .* neither a VOCdevkit.*nor COCO"):
        kind_of_set(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--train_split val2014.*train2017, val2017"):
        open_detection(str(coco[0]), ["val2014"])
    write_coco(tmp_path / "coco", {"train2017": 2})
    file = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    file.write_text("{}")
    with pytest.raises(
        ValueError, match="instances_train2017.json is no list of objects.*KeyError"
    ):
        open_detection(str(tmp_path / "coco"), ["train2017"])
    write_voc(tmp_path / "VOCdevkit", {"2007_test": 1})
    file = next((tmp_path / "VOCdevkit" / "VOC2007" / "Annotations").iterdir())
    file.write_text("<annotation><object><name>gnu</name></object></annotation>")
    with pytest.raises(ValueError, match="00000.xml is no annotation of VOC.*gnu"):
        open_detection(str(tmp_path / "VOCdevkit"), ["2007_test"])


def open_changed_coco(folder, change, with_masks=True):
    """A set of COCO after change(contents) of its file."""
    contents = write_coco(folder / "coco", {"train2017": 2}, size=(72, 64))["train2017"]
    change(contents)
    file = folder / "coco" / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps(contents))
    return open_detection(str(folder / "coco"), ["train2017"], with_masks=with_masks)


@pytest.mark.parametrize(
    ("segment", "words"),
    [
        (None, r"has no mask"),
        ([], "without a polygon of 3 corners"),
        ([[]], "without a polygon of 3 corners"),
        ([[1, 2, 3, 4]], "without a polygon of 3 corners"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon that is no list of x and y in turn"),
        ([1, 2, 3, 4, 5, 6], "a polygon that is no list of x and y in turn"),
        ([[1, 2, 3, 4, 5, None]], "a polygon that is no list of x and y in turn"),
        ([[1, 2, 3, 4, 5, float("nan")]], "a polygon that is no list of x and y in turn"),
        ([[1, 2, 3, 4, 5, 1e300]], "a polygon far outside of its image"),
        (7, "neither a list of polygons nor runs"),
        ({"size": [9, 9], "counts": [81]}, r"the size \[9, 9\], and its image is \[64, 72\]"),
        ({"size": [64, 72], "counts": [81]}, "runs of 81 pixels, and its image has 4608"),
        ({"size": [64, 72], "counts": [-1, 4609]}, "counts that are no lengths"),
        ({"size": [64, 72]}, "counts that are no lengths"),
        ({"size": [64, 72], "counts": "\x01"}, "counts that are no lengths"),
        ({"size": [64, 72], "counts": "11"}, "runs of 2 pixels, and its image has 4608"),
    ],
)
def test_a_malformed_mask_is_a_sentence_with_the_file_and_the_annotation(tmp_path, segment, words):
    def change(contents):
        first = contents["annotations"][0]
        contents["annotations"] = [first, {**first, "id": 17, "segmentation": segment}]

    words = f"--train_split train2017: .*instances_train2017.json: annotation 17 .*{words}"
    with pytest.raises(ValueError, match=words) as caught:
        open_changed_coco(tmp_path, change)
    assert "\n" not in str(caught.value)
    data = open_detection(str(tmp_path / "coco"), ["train2017"])  # boxes need no masks
    assert len(data.objects[0].boxes) == 2 and data.objects[0].segments == []


def test_a_polygon_of_two_corners_beside_others_is_left_out(tmp_path):
    def change(contents):
        contents["annotations"][0]["segmentation"].append([1, 2, 3, 4])

    data = open_changed_coco(tmp_path, change)
    assert len(data.objects[0].segments[0]) == 1


def test_runs_of_pixels_of_the_size_of_the_image_are_whole_plain_or_compressed(tmp_path):
    pytest.importorskip("pycocotools")
    rng = np.random.default_rng(0)
    masks = [rng.random((64, 72)) < share for share in (0.5, 0.001, 0.999)]
    masks += [np.zeros((64, 72), bool), np.ones((64, 72), bool)]
    segments = [*runs_of_masks(np.stack(masks)), {"size": [64, 72], "counts": runs_of(masks[0])}]

    def change(contents):
        first = contents["annotations"][0]
        contents["annotations"] = [{**first, "segmentation": x} for x in segments]

    assert open_changed_coco(tmp_path, change).objects[0].segments == segments


def test_objects_have_masks_all_or_none():
    boxes, labels = np.zeros((2, 4), np.float32), np.ones(2, np.int64)
    with pytest.raises(ValueError, match="1 masks of 2 objects"):
        Objects(boxes, labels, np.zeros(2, bool), [[np.zeros(6, np.float32)]])


def test_other_masks_are_another_set(tmp_path):
    def change(contents):
        contents["annotations"][0]["segmentation"][0][0] += 1

    digests = []
    for name, changed in (("a", lambda contents: None), ("b", change)):
        for with_masks in (True, False):
            folder = tmp_path / f"{name}{with_masks}"
            folder.mkdir()
            digests.append(open_changed_coco(folder, changed, with_masks).digest())
    assert digests[0] != digests[2] and digests[1] == digests[3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x["images"].append(x["images"][0]), "the image id 1000 twice"),
        (lambda x: x["images"].append({**x["images"][0], "id": 3}), "0{12}.jpg twice"),
        (lambda x: x["images"][0].update(width=0), "image 1000 has no width and height"),
        (lambda x: x["annotations"][0].update(image_id=5), "annotation 1 is of image 5"),
        (lambda x: x["annotations"][0].update(category_id=5), "annotation 1 is of category 5"),
        (lambda x: x["annotations"][0].update(bbox=[1, 2, 3]), "annotation 1 has no bbox of four"),
        (lambda x: x["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "1 has no bbox of fo"),
        (lambda x: x["annotations"][0].update(area="big"), "annotation 1 has an area that is no n"),
        (lambda x: x["annotations"].insert(0, 3), "the 1-th annotation is no object"),
    ],
)
def test_a_malformed_file_of_coco_is_a_sentence(tmp_path, change, words):
    with pytest.raises(ValueError, match=f"--train_split train2017: .*train2017.json.*{words}"):
        open_changed_coco(tmp_path, change, with_masks=False)


def write_voc_boxes(folder, *boxes, size=""):
    """A VOCdevkit with an image of 72 x 64 px and boxes (xmin, ymin, xmax, ymax)."""
    write_voc(folder, {"2007_test": 1}, size=(72, 64))
    names = ("xmin", "ymin", "xmax", "ymax")
    objects = []
    for box in boxes:
        corners = "".join(f"<{x}>{y}</{x}>" for x, y in zip(names, box, strict=True))
        objects.append(f"<object><name>cat</name><bndbox>{corners}</bndbox></object>")
    file = folder / "VOC2007" / "Annotations" / "2007_test_00000.xml"
    file.write_text(f"<annotation>{size}{''.join(objects)}</annotation>")
    return folder


@pytest.mark.parametrize("box", [(1, 1, 0, 9), ("nan", 1, 9, 9), (1, 1, "inf", 9), (9, 9, 5, 20)])
def test_a_box_of_voc_without_an_area_is_a_sentence_with_the_file(tmp_path, box):
    folder = write_voc_boxes(tmp_path / "VOCdevkit", (1, 1, 5, 5), box)
    with pytest.raises(ValueError, match="00000.xml is no annotation of VOC .*a cat in the box"):
        open_detection(str(folder), ["2007_test"])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("", [72, 64]),  # of the image itself
        ("<size><width>0</width><height>0</height></size>", [72, 64]),
        ("<size><width>70</width><height>60</height></size>", [70, 60]),
    ],
)
def test_boxes_of_voc_are_cut_to_the_image_and_those_outside_are_left_out(tmp_path, size, expected):
    folder = write_voc_boxes(
        tmp_path / "VOCdevkit", (-3, 11, 90, 100), (200, 1, 300, 9), (5, 6, 7, 8), size=size
    )
    data = open_detection(str(folder), ["2007_test"])
    assert data.objects[0].boxes.tolist() == [[0, 10, *expected], [4, 5, 7, 8]]


def test_what_is_named_twice_or_is_no_text_is_refused_in_a_sentence(voc, tmp_path):
    with pytest.raises(ValueError, match="--train_split has 2007_trainval twice"):
        open_detection(str(voc[0]), ["2007_trainval", "2007_trainval"])
    write_voc(tmp_path / "VOCdevkit", {"2007_test": 2})
    listed = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "test.txt"
    (listed.parent / "val.txt").write_text("2007_test_00001\n")
    with pytest.raises(ValueError, match="there is VOC2007/JPEGImages/2007_test_00001.jpg twice"):
        open_detection(str(tmp_path / "VOCdevkit"), ["2007_test", "2007_val"])
    listed.write_text("2007_test_00001\n2007_test_00001\n")
    with pytest.raises(ValueError, match="test.txt has the image 2007_test_00001 twice"):
        open_detection(str(tmp_path / "VOCdevkit"), ["2007_test"])
    listed.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="2007_test: .*test.txt is no text in UTF-8"):
        open_detection(str(tmp_path / "VOCdevkit"), ["2007_test"])


# ============ masks ============
def test_a_polygon_is_filled_at_the_size_of_the_resized_image():
    pytest.importorskip("pycocotools")
    square = [np.array([4.0, 2, 12, 2, 12, 10, 4, 10], np.float32)]
    mask = masks_of_segments([square], (16, 20), (32, 40))[0].numpy()
    expected = np.zeros((32, 40), np.uint8)
    expected[4:20, 8:24] = 1
    assert (mask != expected).mean() < 0.03  # pycocotools rounds the border
    assert mask[6:18, 10:22].all() and not mask[:3].any()


def test_runs_of_pixels_give_back_their_mask_plain_or_compressed():
    pytest.importorskip("pycocotools")
    mask = np.random.default_rng(0).random((9, 7)) < 0.5
    plain = {"size": [9, 7], "counts": runs_of(mask)}
    (compressed,) = runs_of_masks(mask[None])
    assert isinstance(compressed["counts"], str)
    for segment in (plain, compressed):
        assert (masks_of_segments([segment], (9, 7), (9, 7))[0].numpy() == mask).all()
    doubled = masks_of_segments([plain], (9, 7), (18, 14))[0].numpy()
    assert (doubled == mask.repeat(2, 0).repeat(2, 1)).all()


# ============ preparing ============
def test_the_shorter_side_is_as_asked_unless_the_longer_one_grows_too_long():
    assert size_of_image(480, 640, 800, 1333) == (800, 1067)
    assert size_of_image(640, 480, 800, 1333) == (1067, 800)
    assert size_of_image(300, 900, 800, 1333) == (444, 1333)


def test_a_mirrored_and_a_resized_box_are_around_the_same_pixels():
    image = torch.zeros(1, 10, 12)
    image[0, 2:6, 1:4] = 1
    box = np.array([[1.0, 2, 4, 6]], np.float32)
    for changed, boxes in (
        (image.flip(2), mirror_boxes(box, 12)),
        (
            image.repeat_interleave(3, 1).repeat_interleave(2, 2),
            resize_boxes(box, (10, 12), (30, 24)),
        ),
    ):
        rows, columns = (changed[0].any(dim).nonzero().flatten() for dim in (1, 0))
        around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert boxes[0].tolist() == [float(x) for x in around]


def test_training_images_have_boxes_and_masks_where_their_shapes_are(coco):
    data = open_detection(str(coco[0]), ["train2017"], with_masks=True)
    images = TrainingImages(data, [96, 128], 400, seed=3)
    sides, mirrored = set(), set()
    for epoch in range(6):
        for place in range(len(images)):
            image, boxes, labels, masks, index = images[epoch, place]
            sides.add(min(image.shape[1:]))
            assert index == place and len(boxes) == len(labels) == len(masks)
            assert masks.shape[1:] == image.shape[1:] and image.dtype == torch.uint8
            before = data.objects[images.numbers[place]]
            kept = before.boxes[~before.ignored]
            scale = image.shape[2] / 72
            is_mirrored = not np.allclose(boxes[:, 0], kept[:, 0] * scale, atol=1e-3)
            mirrored.add(is_mirrored)
            for box, mask in zip(boxes.round().int().tolist(), masks, strict=True):
                rows, columns = (mask.any(dim).nonzero().flatten() for dim in (1, 0))
                around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert np.abs(np.array(box) - np.array([int(x) for x in around])).max() <= 2
                # The noise is below 90, a shape has a colour above 190.
                assert image[:, mask.bool()].amax(0).float().mean() > 180
    assert sides == {96, 128} and mirrored == {False, True}
    again = images[2, 1]
    assert torch.equal(again[0], images[2, 1][0]) and torch.equal(again[1], images[2, 1][1])


def test_a_broken_training_image_is_replaced_with_its_objects_and_a_test_image_is_refused(tmp_path):
    write_voc(tmp_path / "VOCdevkit", {"2007_trainval": 3})
    data = open_detection(str(tmp_path / "VOCdevkit"), ["2007_trainval"])
    images = TrainingImages(data, [64], 400, seed=0)
    whole = images[0, 2]
    (tmp_path / "VOCdevkit/VOC2007/JPEGImages/2007_trainval_00001.jpg").write_bytes(b"torn")
    image, boxes, labels, _, _ = images[0, 1]
    assert labels.tolist() == whole[2].tolist() and image.shape == whole[0].shape
    widths = [sorted((x[:, 2] - x[:, 0]).tolist()) for x in (boxes, whole[1])]
    assert widths[0] == widths[1]
    with pytest.raises(ValueError, match="2007_trainval_00001.jpg cannot be read"):
        TestImages(data, 64, 100)[1]
