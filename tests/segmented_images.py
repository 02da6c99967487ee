"""Small images in the layout of PASCAL VOC 2012's segmentation: bright objects on a dark ground."""

import numpy as np
from PIL import Image

from src.evaluate.davis import write_mask


def write_segments(folder, count=5, size=(48, 64)):
    """A folder VOCdevkit/VOC2012; image i has two objects of class 8 and one of class 15, with a border."""
    rng = np.random.default_rng(0)
    for name in ("JPEGImages", "SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    names = [f"2007_{i:06}" for i in range(count)]
    for i, name in enumerate(names):
        pixels = rng.integers(0, 40, (*size, 3), dtype=np.uint8)
        objects, classes = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        for number, (row, column, kind) in enumerate([(8, 8, 8), (8, 40, 8), (32, 16 + i, 15)], 1):
            border = (slice(row - 2, row + 14), slice(column - 2, column + 14))
            place = (slice(row, row + 12), slice(column, column + 12))
            objects[border] = classes[border] = 255
            objects[place], classes[place] = number, kind
            pixels[place] = 200 + 10 * number
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        write_mask(folder / "SegmentationObject" / f"{name}.png", objects)
        write_mask(folder / "SegmentationClass" / f"{name}.png", classes)
    text = "".join(f"{name}\n" for name in names)
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text(text)
    return folder
