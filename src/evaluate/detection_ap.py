"""Average precision of detections: by the rule of PASCAL VOC, computed here, and by COCO's own code."""

import contextlib
import io
import json
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .. import dist
from .average_precision import average_precision, interpolated_precision
from .detection_sets import DetectionSet, Objects
from .masks import import_pycocotools

# Overlaps that a detection must have with an object: 0.5, 0.55, ... 0.95.
OVERLAPS = np.arange(50, 100, 5) / 100
# What pycocotools counts, in its order, and the first of them.
COCO_FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
FOUND, WRONG, LEFT_OUT = 1, 0, -1


# ============ PASCAL VOC ============
def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union (n, m) of boxes (n, 4) and (m, 4), x2 and y2 behind the last pixel.

    The same as in VOC's code, which counts corners within the box and adds 1 to each side.
    """
    boxes, others = boxes.astype(np.float64)[:, None], others.astype(np.float64)[None]
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(
        boxes[..., :2], others[..., :2]
    )
    common = sides.clip(0).prod(-1)
    area, other_area = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (boxes, others))
    return common / np.maximum(area + other_area - common, 1e-12)


def judge(boxes: np.ndarray, scores: np.ndarray, objects: Objects) -> np.ndarray:
    """Which detections of a class in an image count, at each of OVERLAPS: (n, 10) of FOUND, WRONG, LEFT_OUT.

    Everingham et al. 2010 (IJCV 88), section 4.2.2: a detection belongs to the object of its class that it
    overlaps most; the first one by score finds it, others are wrong; difficult objects neither count as
    found nor as wrong. objects: of the class.
    """
    verdict = np.full((len(boxes), len(OVERLAPS)), WRONG)
    if len(boxes) == 0 or len(objects.boxes) == 0:
        return verdict
    common = overlaps(boxes, objects.boxes)  # (n, m)
    nearest = common.argmax(1)  # (n,)
    is_taken = np.zeros((len(objects.boxes), len(OVERLAPS)), bool)
    for row in np.argsort(-scores, kind="stable"):
        place = nearest[row]
        reached = common[row, place] >= OVERLAPS
        if objects.ignored[place]:
            verdict[row, reached] = LEFT_OUT
            continue
        verdict[row, reached & ~is_taken[place]] = FOUND
        is_taken[place] |= reached
    return verdict


def voc_precision(data: DetectionSet, detections: list[dict]) -> dict:
    """Average precisions in percent of detections in a set of VOC.

    detections: in COCO's format, {"image_id", "category_id", "bbox": [x, y, width, height], "score"}.
    "ap50", "ap75" and "ap", the mean over OVERLAPS, are the means over the classes of the area under the
    interpolated curve, VOC's rule since 2010; with "_11points" VOC 2007's, the mean precision at 11
    recalls, by which Detectron2 measures on VOC 2007. "by_class": AP50, None of a class without an object.
    Equal scores are one threshold. Raises ValueError where no class has an object.
    """
    places = {name: place for place, name in enumerate(data.ids)}
    found = {}  # by (class, image)
    for detection in detections:
        key = (detection["category_id"], places[detection["image_id"]])
        found.setdefault(key, []).append(detection)
    areas, points = [], []  # of each class by overlap
    for label in data.categories:
        num_positives, scores, verdicts = 0, [], []
        for place, objects in enumerate(data.objects):
            of_class = objects.chosen(objects.labels == label)
            num_positives += int((~of_class.ignored).sum())
            own = found.get((label, place), [])
            if own:
                scores.append(np.array([x["score"] for x in own]))
                boxes = boxes_of(x["bbox"] for x in own)
                verdicts.append(judge(boxes, scores[-1], of_class))
        if num_positives == 0:
            areas.append([math.nan] * len(OVERLAPS))
            points.append([math.nan] * len(OVERLAPS))
            continue
        scores = torch.from_numpy(np.concatenate([np.zeros(0), *scores]))
        verdicts = np.concatenate([np.zeros((0, len(OVERLAPS)), int), *verdicts])
        curves = [_precision(scores, verdict, num_positives) for verdict in verdicts.T]
        areas.append([area for area, _ in curves])
        points.append([at_points for _, at_points in curves])
    if np.isnan(areas).all():
        raise ValueError(f"{data.images.name}: no class has an object that counts")
    result = {}
    for suffix, values in (("", areas), ("_11points", points)):
        by_overlap = 100 * np.nanmean(np.array(values), 0)  # (10,)
        result[f"ap{suffix}"] = float(by_overlap.mean())
        result[f"ap50{suffix}"], result[f"ap75{suffix}"] = map(float, by_overlap[[0, 5]])
    by_class = {
        name: None if math.isnan(row[0]) else 100 * row[0]
        for name, row in zip(data.classes, areas, strict=True)
    }
    return {**result, "by_class": by_class}


def _precision(scores: Tensor, verdict: np.ndarray, num_positives: int):
    """(area under the interpolated curve, mean of 11 points) of detections (n,) of a class."""
    counted = torch.from_numpy(verdict != LEFT_OUT)
    positive = torch.from_numpy(verdict == FOUND)[counted]
    area = interpolated_precision(scores[counted], positive, num_positives)
    return area, average_precision(scores[counted], positive, num_positives)[1]


def boxes_of(coco_boxes: Iterable[list[float]]) -> np.ndarray:
    """x1, y1, x2, y2 (n, 4) of COCO's x, y, width, height."""
    boxes = np.array(list(coco_boxes), np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


# ============ COCO ============
def coco_precision(contents: dict, detections: list[dict], with_masks: bool) -> dict:
    """Average precisions in percent by pycocotools: COCO_FIGURES of boxes, and of masks as mask_ap, ...

    contents: of the file of the split, by src.evaluate.coco_files.read_coco. detections: in COCO's format,
    with runs of pixels as "segmentation" for masks. "by_class": AP of boxes. None
    where there is no object of a kind, such as small ones. Raises ValueError where pycocotools is not
    installed.
    """
    import_pycocotools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    result, by_class = {}, {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        truth = COCO()
        # Copies, as it writes into annotations.
        truth.dataset = {**contents, "annotations": [dict(x) for x in contents["annotations"]]}
        truth.createIndex()
        for kind, prefix in (("bbox", ""), ("segm", "mask_"))[: 1 + with_masks]:
            # pycocotools says how large a detection is by its box where it has one.
            left_out = "bbox" if kind == "segm" else None
            given = [{x: y for x, y in one.items() if x != left_out} for one in detections]
            evaluation = COCOeval(truth, _loaded(truth, given), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            stats = evaluation.stats[: len(COCO_FIGURES)].tolist()
            result |= {
                f"{prefix}{x}": _percent(y) for x, y in zip(COCO_FIGURES, stats, strict=True)
            }
            if kind == "bbox":
                for place, number in enumerate(evaluation.params.catIds):
                    values = evaluation.eval["precision"][:, :, place, 0, -1]  # overlaps x recalls
                    counted = values[values > -1]
                    mean = counted.mean().item() if len(counted) else -1
                    by_class[truth.cats[number]["name"]] = _percent(mean)
    return {**result, "by_class": by_class}


def _loaded(truth, detections):
    """Detections as pycocotools has them; it does not take an empty list."""
    if detections:
        return truth.loadRes(detections)
    empty = type(truth)()
    empty.dataset = {"images": truth.dataset["images"], "categories": truth.dataset["categories"]}
    empty.dataset["annotations"] = []
    empty.createIndex()
    return empty


def _percent(value):
    """None for what pycocotools writes as -1: there is no object."""
    return None if value < 0 else 100 * value


# ============ of all processes ============
def gather_lists(own: list[dict]) -> list[dict]:
    """The dicts of all processes, by rank; all call it. They are sent as JSON."""
    text = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
    sizes = dist.all_gather_rows(torch.tensor([len(text)])).tolist()
    parts = dist.all_gather_rows(text).split(sizes)
    return [item for part in parts for item in json.loads(part.numpy().tobytes())]
