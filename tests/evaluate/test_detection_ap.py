"""Average precision of detections by VOC's and COCO's rules: the truth has 1, difficult ones do not count."""

import copy
import json

import numpy as np
import pytest
import torch

from src.evaluate.average_precision import average_precision, interpolated_precision
from src.evaluate.coco_files import read_coco
from src.evaluate.detection_ap import (
    FOUND,
    LEFT_OUT,
    WRONG,
    coco_precision,
    gather_lists,
    judge,
    overlaps,
    voc_precision,
)
from src.evaluate.detection_sets import Objects, open_detection
from src.evaluate.masks import masks_of_segments, runs_of_masks
from tests.detection_images import write_coco, write_voc
from tests.gloo import run_ranks


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc") / "VOCdevkit"
    write_voc(folder, {"2007_test": 8})
    return open_detection(str(folder), ["2007_test"])


def truth_as_detections(data):
    """All objects, in COCO's format, with scores that fall."""
    found = []
    for name, objects in zip(data.ids, data.objects, strict=True):
        for box, label in zip(objects.boxes.astype(float), objects.labels, strict=True):
            x1, y1, x2, y2 = box.tolist()
            found.append(
                {
                    "image_id": name,
                    "category_id": data.categories[label - 1],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": 1 - len(found) / 1000,
                }
            )
    return found


# ============ VOC ============
def test_the_truth_has_an_average_precision_of_1_by_the_rule_of_voc(voc):
    result = voc_precision(voc, truth_as_detections(voc))
    for name in ("ap", "ap50", "ap75", "ap_11points", "ap50_11points", "ap75_11points"):
        assert result[name] == pytest.approx(100), name
    assert result["by_class"]["aeroplane"] == pytest.approx(100)
    assert result["by_class"]["sofa"] is None


def test_nothing_found_is_0_and_no_object_is_refused(voc):
    assert voc_precision(voc, [])["ap50"] == 0
    nothing = copy.copy(voc)
    nothing.objects = [x.chosen(np.zeros(len(x.labels), bool)) for x in voc.objects]
    with pytest.raises(ValueError, match="no class has an object"):
        voc_precision(nothing, [])


def test_overlaps_are_those_of_voc_which_counts_the_last_pixel_in():
    def with_added_pixel(a, b):  # corners from 1, both within the box
        width = min(a[2], b[2]) - max(a[0], b[0]) + 1
        height = min(a[3], b[3]) - max(a[1], b[1]) + 1
        common = max(width, 0) * max(height, 0)
        areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
        return common / (sum(areas) - common)

    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(1, 30, (12, 2, 2)), axis=1).reshape(12, 4)  # x1 y1 x2 y2
    ours = corners - np.array([1, 1, 0, 0])
    found = overlaps(ours, ours)
    for i in range(12):
        for j in range(12):
            assert found[i, j] == pytest.approx(with_added_pixel(corners[i], corners[j]))


def objects_of(boxes, ignored):
    return Objects(np.array(boxes, np.float32), np.ones(len(boxes), int), np.array(ignored))


def test_the_second_detection_of_an_object_is_wrong_and_those_of_difficult_ones_are_left_out():
    objects = objects_of([[0, 0, 10, 10], [20, 20, 30, 30]], [False, True])
    boxes = np.array(
        [[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 29], [50, 50, 60, 60]]
    )
    verdict = judge(boxes.astype(float), np.array([0.5, 0.9, 0.8, 0.7, 0.6]), objects)
    assert verdict[:, 0].tolist() == [WRONG, FOUND, LEFT_OUT, LEFT_OUT, WRONG]
    # An overlap of 0.9 is none of 0.95: the difficult object is missed, which is wrong.
    assert verdict[3].tolist() == [*[LEFT_OUT] * 9, WRONG]
    # By score: the first one finds the object where it overlaps enough, beyond it the other one does.
    verdict = judge(boxes[:2].astype(float), np.array([0.9, 0.5]), objects)
    assert verdict[0].tolist() == [*[FOUND] * 9, WRONG] and verdict[1].tolist() == [
        *[WRONG] * 9,
        FOUND,
    ]


def test_difficult_objects_that_are_missed_or_found_change_nothing(voc):
    detections = truth_as_detections(voc)
    hard = copy.copy(voc)
    hard.objects = [copy.deepcopy(x) for x in voc.objects]
    hard.objects[0].ignored[:] = True
    own = [x for x in detections if x["image_id"] != voc.ids[0]]
    assert voc_precision(hard, own)["ap"] == pytest.approx(100)
    assert voc_precision(hard, detections)["ap"] == pytest.approx(100)
    assert voc_precision(voc, own)["ap"] < 99


def test_recall_is_of_all_objects_also_of_those_without_a_detection():
    scores, positive = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True])
    area, points = average_precision(scores, positive, 4)  # recalls 1/4 and 2/4
    assert area == pytest.approx((1 + 2 / 3) / 4)
    assert interpolated_precision(scores, positive, 4) == pytest.approx((1 + 2 / 3) / 4)
    assert points == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)  # 0, 0.1, 0.2; 0.3, 0.4, 0.5
    assert average_precision(scores, positive, 2) == average_precision(scores, positive)
    assert average_precision(scores, positive & False, 4) == (0.0, 0.0)


def test_average_precision_is_that_of_a_plain_loop_in_the_words_of_the_benchmark(voc):
    rng = np.random.default_rng(1)
    detections = truth_as_detections(voc)
    for detection in detections:
        detection["score"] = float(rng.random())
        detection["bbox"] = (np.array(detection["bbox"]) + rng.normal(0, 2, 4)).clip(1).tolist()
    for i in range(12):
        other = {**detections[i], "score": float(rng.random())}
        detections.append({**other, "category_id": int(rng.integers(1, 4))})
    result = voc_precision(voc, detections)
    for number, name in enumerate(("aeroplane", "bicycle", "bird"), 1):
        truth = {
            image: [box for box, label in zip(x.boxes, x.labels, strict=True) if label == number]
            for image, x in zip(voc.ids, voc.objects, strict=True)
        }
        total = sum(len(boxes) for boxes in truth.values())
        taken, hits = set(), []
        own = [x for x in detections if x["category_id"] == number]
        for detection in sorted(own, key=lambda x: -x["score"]):
            x, y, width, height = detection["bbox"]
            boxes = truth[detection["image_id"]]
            best, place = 0, None
            for i, box in enumerate(boxes):
                common = max(0, min(x + width, box[2]) - max(x, box[0])) * max(
                    0, min(y + height, box[3]) - max(y, box[1])
                )
                area = width * height + (box[2] - box[0]) * (box[3] - box[1]) - common
                if common / area > best:
                    best, place = common / area, (detection["image_id"], i)
            hits.append(best >= 0.5 and place not in taken)
            if best >= 0.5:
                taken.add(place)
        recall = np.cumsum(hits) / total
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        highest = np.maximum.accumulate(precision[::-1])[::-1]
        area = (np.diff(np.concatenate([[0], recall])) * highest).sum()
        assert result["by_class"][name] == pytest.approx(100 * area)


# ============ COCO ============
@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    pytest.importorskip("pycocotools")
    folder = tmp_path_factory.mktemp("coco") / "coco"
    write_coco(folder, {"val2017": 6})
    data = open_detection(str(folder), ["val2017"], with_masks=True, keep_contents=True)
    (folder / "annotations" / "instances_val2017.json").unlink()  # which is not read again
    return data


def as_runs(polygons):
    """The masks of polygons in an image of 72 x 64 px, as a detector's."""
    return runs_of_masks(masks_of_segments(polygons, (64, 72), (64, 72)).bool().numpy())


def test_the_truth_has_an_average_precision_of_1_by_the_rule_of_coco(coco):
    detections = truth_as_detections(coco)
    polygons = [segment for objects in coco.objects for segment in objects.segments]
    for detection, runs in zip(detections, as_runs(polygons), strict=True):
        detection["segmentation"] = runs
    result = coco_precision(coco.contents, detections, with_masks=True)
    for name in ("ap", "ap50", "ap75", "mask_ap", "mask_ap50", "mask_ap75"):
        assert result[name] == pytest.approx(100), name
    assert result["ap_large"] is None  # of more than 96 x 96 px there is none
    assert set(result["by_class"]) == {"circle", "square", "triangle"}
    assert all(value in (None, pytest.approx(100)) for value in result["by_class"].values())


def test_whether_a_mask_is_small_is_said_by_its_own_area_and_not_by_its_box(coco):
    detections = truth_as_detections(coco)
    (large,) = runs_of_masks(np.ones((1, 64, 72), bool))  # 4,608 pixels, medium
    wrong = {**detections[0], "bbox": [0.0, 0, 10, 10], "segmentation": large, "score": 1.0}
    polygons = [segment for objects in coco.objects for segment in objects.segments]
    for detection, runs in zip(detections, as_runs(polygons), strict=True):
        detection["segmentation"] = runs
    result = coco_precision(coco.contents, [wrong, *detections], with_masks=True)
    assert result["mask_ap_small"] == pytest.approx(100)
    assert result["ap_small"] < 100  # its box is small


def test_truth_without_ids_areas_and_crowds_is_measured_as_with_them(coco, tmp_path):
    detections = truth_as_detections(coco)
    expected = coco_precision(coco.contents, detections[:-1], with_masks=False)
    contents = json.loads(json.dumps(coco.contents))
    for zero in (False, True):
        for place, annotation in enumerate(contents["annotations"]):
            for name in ("id", "area", "iscrowd"):
                annotation.pop(name, None)
            annotation |= {"id": place} if zero else {}  # pycocotools takes an object 0 for none
        file = tmp_path / "bare.json"
        file.write_text(json.dumps(contents))
        bare = read_coco(file, with_masks=False)
        assert coco_precision(bare, detections[:-1], with_masks=False) == expected


def test_nothing_found_in_coco_is_0_and_masks_are_measured_only_where_asked_for(coco):
    result = coco_precision(coco.contents, [], with_masks=False)
    assert result["ap"] == result["ap50"] == 0 and "mask_ap" not in result


def test_what_was_read_stays_as_it_is_while_it_is_measured_by(coco):
    before, detections = json.dumps(coco.contents), truth_as_detections(coco)
    polygons = [segment for objects in coco.objects for segment in objects.segments]
    for detection, runs in zip(detections, as_runs(polygons), strict=True):
        detection["segmentation"] = runs
    first = coco_precision(coco.contents, detections, with_masks=True)
    assert json.dumps(coco.contents) == before
    assert coco_precision(coco.contents, detections, with_masks=True) == first


# ============ several processes ============
def _gathered(rank, world_size):
    return gather_lists([{"rank": rank, "score": 0.1 + i / 3} for i in range(2 * rank)])


def test_the_lists_of_all_processes_come_together_an_empty_one_too():
    expected = [{"rank": 1, "score": 0.1 + i / 3} for i in range(2)]
    assert run_ranks(_gathered, 2) == [expected, expected]
    assert gather_lists(expected) == expected
