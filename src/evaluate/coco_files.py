"""COCO's lists of objects, instances_<split>.json: read, checked, with a value for what they leave out."""

import json
import math
from pathlib import Path

CORNERS = 3  # of a polygon, at least
FARTHEST = 100_000  # pixels from the corner of an image that a polygon reaches at most


def read_coco(file: Path, with_masks: bool) -> dict:
    """The images, annotations and categories (by id) of a file.

    An annotation has "id" (from 1, in their order), "image_id", "category_id", "bbox", "area" (that of the
    box where the file says none), "iscrowd" (0 where it says none) and, with masks, "segmentation": runs, or
    polygons of three corners or more; smaller ones are left out, as Detectron2 does. Raises ValueError with
    the file and the annotation for what is malformed, or has no mask where masks are asked for.
    """
    try:
        contents = json.loads(file.read_text())
        images, annotations = list(contents["images"]), list(contents["annotations"])
        categories = sorted(contents["categories"], key=lambda category: category["id"])
        numbers = {category["id"]: category["name"] for category in categories}
        sizes = {image["id"]: (image["width"], image["height"]) for image in images}
        names = [str(image["file_name"]) for image in images]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} is no list of objects in COCO's format, with images, annotations and categories: "
            f"{type(error).__name__} {error}"
        ) from None
    for column, what in (
        ([image["id"] for image in images], "the image id"),
        (names, "the image"),
        ([category["id"] for category in categories], "the category id"),
    ):
        refuse_repeated(column, f"{file} has {what}")
    for number, size in sizes.items():
        if not _are_numbers(list(size)) or min(size) < 1:
            raise ValueError(f"{file}: image {number} has no width and height in pixels")
    checked = []
    for place, annotation in enumerate(annotations, 1):
        try:
            one = _checked(annotation, sizes, numbers, with_masks)
        except (ValueError, TypeError) as error:
            number = annotation.get("id") if isinstance(annotation, dict) else None
            name = f"the {place}-th annotation" if number is None else f"annotation {number}"
            raise ValueError(f"{file}: {name} {error}") from None
        checked.append({"id": place, **one})
    return {"images": images, "annotations": checked, "categories": categories}


def refuse_repeated(column: list, what: str) -> None:
    """Raise ValueError, which begins with `what`, for a value that stands in a column twice."""
    if len(set(column)) < len(column):
        seen = set()
        value = next(x for x in column if x in seen or seen.add(x))
        raise ValueError(f"{what} {value} twice: name each once")


def _checked(annotation, sizes, numbers, with_masks):
    """An annotation as read_coco gives it; what is wrong with it goes on where its name ends."""
    if not isinstance(annotation, dict):
        raise ValueError("is no object")
    image, category = annotation.get("image_id"), annotation.get("category_id")
    if image not in sizes:
        raise ValueError(f"is of image {image}, which the file does not list")
    if category not in numbers:
        raise ValueError(f"is of category {category}, which the file does not list")
    box = annotation.get("bbox")
    if not _are_numbers(box) or len(box) != 4:
        raise ValueError("has no bbox of four numbers, x, y, width and height")
    area = annotation.get("area")
    if area is None:
        area = float(box[2] * box[3])
    if not _are_numbers([area]):
        raise ValueError("has an area that is no number")
    crowd = int(bool(annotation.get("iscrowd")))
    one = {"image_id": image, "category_id": category, "bbox": box}
    one |= {"area": area, "iscrowd": crowd}
    if with_masks:
        one["segmentation"] = _mask(annotation.get("segmentation"), *sizes[image])
    return one


def _are_numbers(values):
    """Whether something is a list of finite numbers; of millions of lists, so without a loop."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        return False
    try:
        return math.isfinite(sum(values))
    except OverflowError:  # a whole number beyond those of float
        return False


# ============ masks ============
def _mask(segment, width, height):
    """The polygons of a mask that have an inside, or its runs of pixels."""
    if segment is None:
        raise ValueError("has no mask (segmentation), and masks are learnt and measured")
    if isinstance(segment, dict):
        _check_runs(segment, width, height)
        return segment
    if not isinstance(segment, list):
        raise ValueError("has a segmentation that is neither a list of polygons nor runs of pixels")
    polygons = []
    for polygon in segment:
        if not _are_numbers(polygon) or len(polygon) % 2:
            raise ValueError("has a segmentation with a polygon that is no list of x and y in turn")
        if len(polygon) >= 2 * CORNERS:
            polygons.append(polygon)
            if max(polygon) > FARTHEST or min(polygon) < -FARTHEST:
                raise ValueError("has a segmentation with a polygon far outside of its image")
    if not polygons:
        raise ValueError(f"has a segmentation without a polygon of {CORNERS} corners")
    return polygons


def _check_runs(runs, width, height):
    """Raise ValueError unless runs of pixels fill an image of width x height."""
    if runs.get("size") != [height, width]:
        raise ValueError(
            f"has a segmentation with the size {runs.get('size')}, and its image is [{height}, {width}], "
            "height and width"
        )
    counts = runs.get("counts")
    lengths = _lengths_of_text(counts) if isinstance(counts, str) else counts
    if not _are_numbers(lengths) or any(x < 0 or x % 1 for x in lengths):
        raise ValueError("has a segmentation with counts that are no lengths of runs of pixels")
    if sum(lengths) != height * width:
        raise ValueError(
            f"has a segmentation with runs of {sum(lengths)} pixels, and its image has {height * width}"
        )


def _lengths_of_text(text):
    """The lengths of runs in COCO's compressed text; None where it is none.

    Numbers of 5 bits a letter, the lowest first; from the fourth on less the one before the last.
    """
    lengths, value, shift = [], 0, 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(lengths) > 2:
            value += lengths[-2]
        lengths.append(value)
        value, shift = 0, 0
    return None if shift else lengths
