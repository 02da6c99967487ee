"""Images with boxes around their objects: PASCAL VOC and COCO as distributed, and how they are prepared."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..data.datasets import ImageDataset
from ..data.folders import is_of_one_file, read_file
from ..data.images import BrokenImage, UnfitImage
from ..data.multicrop import crop_generator
from .coco_files import read_coco, refuse_repeated
from .masks import masks_of_segments
from .voc import CLASSES

VOC_SPLITS = (["2007_trainval", "2012_trainval"], "2007_test")  # to train on, to test on: VOC07+12
COCO_SPLITS = (["train2017"], "val2017")


@dataclass
class Objects:
    """The objects of one image.

    boxes (n, 4) float32: x1, y1, x2, y2 in pixels, from the corner of the image, x2 and y2 behind the last
    pixel. labels (n,) int64, from 1. ignored (n,) bool: difficult in VOC, a crowd in COCO. segments: of
    COCO, what its files say of each mask, polygons or runs; empty where masks are not needed. Raises
    ValueError where only some have a mask.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    segments: list = field(default_factory=list)

    def __post_init__(self):
        if len(self.segments) not in (0, len(self.boxes)):
            raise ValueError(f"{len(self.segments)} masks of {len(self.boxes)} objects")

    def chosen(self, rows: np.ndarray) -> "Objects":
        """Those of the rows, (n,) bool."""
        segments = [self.segments[row] for row in np.flatnonzero(rows)] if self.segments else []
        return Objects(self.boxes[rows], self.labels[rows], self.ignored[rows], segments)


@dataclass
class DetectionSet:
    """Images, the objects of each, the names of the classes by label - 1.

    kind: "voc" or "coco". ids: what each image is called in results, categories: what each class is.
    contents: of COCO, what src.evaluate.coco_files.read_coco gives of a split, where it was to be kept.
    """

    kind: str
    images: ImageDataset
    objects: list[Objects]
    classes: list[str]
    ids: list[str | int]
    categories: list[int]
    contents: dict | None = None

    def __len__(self):
        return len(self.objects)

    def digest(self) -> str:
        """Of the names of the images, and of all boxes, labels and masks."""
        found = hashlib.blake2b(self.images.digest().encode(), digest_size=8)
        for objects in self.objects:
            for array in (objects.boxes, objects.labels, objects.ignored):
                found.update(array.tobytes())
            for segment in objects.segments:
                if isinstance(segment, list):
                    segment = [polygon.tolist() for polygon in segment]
                found.update(json.dumps(segment, sort_keys=True).encode())
        return found.hexdigest()

    def with_objects(self) -> list[int]:
        """The images to train on: those with an object that counts, a crowd is none (VOC's difficult do)."""
        return [i for i, objects in enumerate(self.objects) if self.trained_on(objects).any()]

    def has_counted(self) -> bool:
        """Whether an average precision can be measured: any object is neither difficult nor a crowd."""
        return any((~objects.ignored).any() for objects in self.objects)

    def trained_on(self, objects: Objects) -> np.ndarray:
        """Which objects a detector is trained on, (n,) bool: difficult ones too, as in Detectron2."""
        if self.kind == "voc":
            return np.ones(len(objects.labels), bool)
        return ~objects.ignored


class _Files:
    """Image files by their paths, a source of ImageDataset."""

    def __init__(self, root, paths):
        self.root, self.paths = root, paths

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return os.path.join(self.root, self.paths[index])

    def fingerprint(self):
        return "\n".join(self.paths).encode(errors="surrogateescape")

    def read(self, index):
        return read_file(self.name(index))

    def is_of_one_file(self, index, error):
        return is_of_one_file(os.fsencode(self.name(index)), os.fsencode(self.root), error)


# ============ reading ============
def kind_of_set(path: str, flag: str = "--data_path") -> str:
    """ "voc" or "coco", by what the folder holds. Raises FileNotFoundError naming `flag`."""
    folder = Path(path).expanduser()
    if (folder / "annotations").is_dir():
        return "coco"
    if any(_voc_years(folder)):
        return "voc"
    raise FileNotFoundError(
        f"{flag} {path} is neither a VOCdevkit, with VOC2007/JPEGImages, Annotations and ImageSets/Main, nor "
        "COCO, with annotations/instances_train2017.json and train2017/"
    )


def open_detection(
    path: str,
    splits: Sequence[str],
    in_chans: int = 3,
    *,
    with_masks: bool = False,
    flag: str = "--data_path",
    split_flag: str = "--train_split",
    keep_contents: bool = False,
    **reading,
) -> DetectionSet:
    """The images and objects of splits, one behind the other.

    path: VOCdevkit, with splits such as 2007_trainval, or the folder of COCO, with splits such as train2017,
    of annotations/instances_train2017.json and train2017/. keep_contents: keep what the file of COCO holds,
    of a single split, which average precisions are of. reading: storage_timeout and max_broken of
    ImageDataset. Raises FileNotFoundError or ValueError naming a flag.
    """
    folder = Path(path).expanduser()
    kind = kind_of_set(path, flag)
    refuse_repeated(list(splits), f"{split_flag} has")
    if kind == "voc":
        parts = [_read_voc(_voc_root(folder), split, split_flag) for split in splits]
    else:
        parts = [_read_coco(folder, split, with_masks, split_flag) for split in splits]
    classes, categories = parts[0][2:]
    if any(part[2:] != parts[0][2:] for part in parts):
        raise ValueError(f"{split_flag} {' '.join(splits)}: they have other categories each")
    root = str(_voc_root(folder) if kind == "voc" else folder)
    rows = [row for part in parts for row in part[0]]  # (id, path, objects)
    if not rows:
        raise ValueError(f"{split_flag} {' '.join(splits)}: they name no image")
    ids, paths, objects = (list(column) for column in zip(*rows, strict=True))
    refuse_repeated(paths, f"{split_flag} {' '.join(splits)}: there is")
    for split, part in zip(splits, parts, strict=True):
        first = os.path.join(root, part[0][0][1]) if part[0] else root
        if not os.path.exists(first):
            raise FileNotFoundError(f"{flag} {path}: there is no {first}, which {split} names")
    name = f"{'VOC' if kind == 'voc' else 'COCO'} {' + '.join(splits)}"
    images = ImageDataset(_Files(root, paths), name, in_chans, flag, **reading)
    contents = parts[0][1] if keep_contents else None
    return DetectionSet(kind, images, objects, classes, ids, categories, contents)


def _voc_years(folder):
    """The VOC2007, VOC2012, ... of a VOCdevkit or of the folder that holds it."""
    for root in (folder, folder / "VOCdevkit"):
        yield from (x.parent for x in sorted(root.glob("VOC[0-9][0-9][0-9][0-9]/JPEGImages")))


def _voc_root(folder):
    return next(_voc_years(folder)).parent


def _read_voc(root, split, flag):
    """([(id, path, Objects)], None, classes, categories) of a split such as 2007_trainval."""
    year, _, name = split.partition("_")
    folder = root / f"VOC{year}"
    listed = folder / "ImageSets" / "Main" / f"{name}.txt"
    if not (year.isdigit() and name and listed.is_file()):
        there = [f"{x.parents[2].name[3:]}_{x.stem}" for x in _image_sets(root)]
        raise FileNotFoundError(
            f"{flag} {split}: there is no {listed}; in {root} there are {', '.join(there) or 'none'}"
        )
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{flag} {split}: {listed} is no text in UTF-8") from None
    rows = []
    for line in lines:
        if line.strip():
            image = line.split()[0]
            path = f"VOC{year}/JPEGImages/{image}.jpg"
            file = folder / "Annotations" / f"{image}.xml"
            rows.append((image, path, read_voc_objects(file, root / path, flag)))
    refuse_repeated([image for image, _, _ in rows], f"{flag} {split}: {listed} has the image")
    return rows, None, list(CLASSES), list(range(1, len(CLASSES) + 1))


def _image_sets(root):
    """Files of ImageSets/Main that list images, and not those of one class."""
    for file in sorted(root.glob("VOC*/ImageSets/Main/*.txt")):
        if file.stem in ("train", "val", "trainval", "test"):
            yield file


def read_voc_objects(file: Path, image: Path, flag: str = "--data_path") -> Objects:
    """The objects of an annotation of VOC, whose corners are pixels counted from 1, both within the box.

    Boxes are cut to the image, whose size its file says where the annotation does not. Raises
    FileNotFoundError or ValueError naming `flag`.
    """
    found = []
    try:
        tree = ElementTree.parse(file).getroot()
        for item in tree.iter("object"):
            name = item.findtext("name", "").strip()
            if name not in CLASSES:
                raise ValueError(f"it has an object {name!r}, no class of VOC")
            names = ("xmin", "ymin", "xmax", "ymax")
            corners = np.array([float(item.findtext(f"bndbox/{corner}")) for corner in names])
            box = corners - np.array([1, 1, 0, 0])
            if not (np.isfinite(box).all() and box[0] < box[2] and box[1] < box[3]):
                raise ValueError(
                    f"it has a {name} in the box {corners.tolist()}, which has no area"
                )
            is_difficult = item.findtext("difficult", "0").strip() == "1"
            found.append((box, CLASSES.index(name) + 1, is_difficult, None))
        size = _size_in_voc(tree, image) if found else None
    except FileNotFoundError:
        raise FileNotFoundError(f"{flag}: there is no {file}, which says the objects") from None
    except (ValueError, TypeError, ElementTree.ParseError) as error:
        raise ValueError(f"{flag}: {file} is no annotation of VOC ({error})") from None
    if size is not None:
        found = [(_cut(box, size), *more) for box, *more in found]
    return _gathered(found)


def _size_in_voc(tree, image):
    """Width and height by an annotation, or by the image's own first bytes; None where neither says."""
    said = [tree.findtext(f"size/{side}") for side in ("width", "height")]
    if None not in said:
        width, height = map(float, said)
        if width >= 1 and height >= 1:  # some sets have 0 there
            return width, height
    try:
        with Image.open(image) as opened:
            return opened.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # what is broken or missing is counted when it is read


def _read_coco(folder, split, with_masks, flag):
    """([(id, path, Objects)], contents, classes, categories) of a split such as train2017."""
    file = folder / "annotations" / f"instances_{split}.json"
    if not file.is_file():
        there = sorted(x.stem.removeprefix("instances_") for x in file.parent.glob("instances_*"))
        raise FileNotFoundError(
            f"{flag} {split}: there is no {file}; beside it there are {', '.join(there) or 'none'}"
        )
    try:
        contents = read_coco(file, with_masks)
    except ValueError as error:
        raise ValueError(f"{flag} {split}: {error}") from None
    images, categories = contents["images"], contents["categories"]
    numbers = {category["id"]: i for i, category in enumerate(categories, 1)}
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    found = {image["id"]: [] for image in images}
    for annotation in contents["annotations"]:
        number = annotation["image_id"]
        found[number].append(_coco_object(annotation, numbers, sizes[number]))
    rows = [
        (image["id"], f"{split}/{image['file_name']}", _gathered(found[image["id"]]))
        for image in images
    ]
    names = [str(category["name"]) for category in categories]
    return rows, contents, names, [category["id"] for category in categories]


def _coco_object(annotation, numbers, size):
    """(box, label, whether it is a crowd, segment or None), the box cut to the image."""
    x, y, width, height = annotation["bbox"]
    box = _cut(np.array([x, y, x + width, y + height], np.float64), size)
    segment = annotation.get("segmentation")
    if isinstance(segment, list):
        segment = [np.asarray(polygon, np.float32) for polygon in segment]
    return box, numbers[annotation["category_id"]], bool(annotation["iscrowd"]), segment


def _cut(box, size):
    """A box (4,) cut to an image of (width, height)."""
    return box.clip(0, np.array([*size, *size])).astype(np.float32)


def _gathered(found):
    """Objects of (box, label, whether it is ignored, segment or None), but for boxes without an area."""
    found = [item for item in found if item[0][2] > item[0][0] and item[0][3] > item[0][1]]
    boxes = np.array([item[0] for item in found], np.float32).reshape(-1, 4)
    labels = np.array([item[1] for item in found], np.int64)
    ignored = np.array([item[2] for item in found], bool)
    segments = [item[3] for item in found if item[3] is not None]  # of all, or of none
    return Objects(boxes, labels, ignored, segments)


# ============ preparing ============
def size_of_image(height: int, width: int, short_side: int, longest: int) -> tuple[int, int]:
    """Height and width with a shorter side of short_side pixels, or with a longer one of `longest`."""
    scale = min(short_side / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (C, H, W) -> (C, h, w), bilinear with a filter, as PIL does it."""
    if tuple(image.shape[1:]) == size:
        return image
    image = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, size=size, mode="bilinear", antialias=True)[0].contiguous()


def resize_boxes(boxes: np.ndarray, before: tuple[int, int], after: tuple[int, int]) -> np.ndarray:
    """Boxes (n, 4) of an image of (H, W) pixels in the same image of (h, w)."""
    down, across = after[0] / before[0], after[1] / before[1]
    return (boxes * np.array([across, down, across, down])).astype(np.float32)


def mirror_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes (n, 4) of the mirrored image."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


class TrainingImages(Dataset):
    """[(epoch, i)] -> (image uint8 (C, h, w), boxes (n, 4), labels (n,), masks uint8 (n, h, w), i).

    Of the i-th image with objects: mirrored or not, its shorter side one of short_sides; what is drawn
    depends on (seed, epoch, i). masks (0, h, w) where the set has none. A broken image is replaced by the
    next one that is whole, with its objects.
    """

    def __init__(self, data: DetectionSet, short_sides: list[int], longest: int, seed: int):
        self.data, self.short_sides, self.longest, self.seed = data, short_sides, longest, seed
        self.numbers = data.with_objects()

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, item):
        epoch, place = item
        image, number = self._load(place)
        objects = self.data.objects[number]
        objects = objects.chosen(self.data.trained_on(objects))
        draw = crop_generator(self.seed, epoch, place)
        is_mirrored, short_side = draw.random() < 0.5, draw.choice(self.short_sides)
        before = tuple(image.shape[1:])
        size = size_of_image(*before, short_side, self.longest)
        image, boxes = resize(image, size), resize_boxes(objects.boxes, before, size)
        masks = masks_of_segments(objects.segments, before, size)
        if is_mirrored:
            image, masks = image.flip(2), masks.flip(2)
            boxes = mirror_boxes(boxes, size[1])
        return image, torch.from_numpy(boxes), torch.from_numpy(objects.labels), masks, place

    def _load(self, place):
        """The image of a place, or of the next one that is whole, and its number in the set."""
        images = self.data.images
        for number in self.numbers[place:] + self.numbers[:place]:
            image = images.load(number)
            if not images.is_broken([number])[0]:
                return image, number
        raise ValueError(f"{images.name}: no image with objects is readable")


class TestImages(Dataset):
    """[i] -> (image uint8 (C, h, w) with a shorter side of short_side, i, its height and width before)."""

    def __init__(self, data: DetectionSet, short_side: int, longest: int):
        self.data, self.short_side, self.longest = data, short_side, longest

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        images = self.data.images
        try:
            image = images.read(index)
        except (BrokenImage, UnfitImage, FileNotFoundError) as error:
            file = images.file_name(index)
            raise ValueError(
                f"{file} cannot be read ({error}), and detection is measured on all images: mend it, or "
                "take it out of the split"
            ) from error
        before = tuple(image.shape[1:])
        image = resize(image, size_of_image(*before, self.short_side, self.longest))
        return image, index, before
