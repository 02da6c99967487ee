"""A small folder of PASCAL VOC 2007, with images of noise: what tests of its evaluations share."""

import numpy as np
from PIL import Image

from src.evaluate.voc import CLASSES

ANNOTATION = "<annotation>{}</annotation>"
OBJECT = "<object><name>{}</name><difficult>{}</difficult></object>"
COLOURS = {"aeroplane": 0, "tvmonitor": 2}  # red and blue; the others have no image


def write_voc(folder, difficult=()):
    """A VOC2007 folder of noise of 20 images a split; difficult: images whose aeroplane is so."""
    rng = np.random.default_rng(0)
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    labels = {}
    for number in range(60):
        name, split = f"{number:06}", ("train", "val", "test")[number // 20]
        pixels = rng.integers(0, 80, (18, 16 + number % 5, 3), dtype=np.uint8)
        present = [kind for i, kind in enumerate(COLOURS) if (number >> i) & 1]
        for kind in present:
            pixels[:, :, COLOURS[kind]] += 120
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        flags = {k: int(k == "aeroplane" and number in difficult) for k in present}
        objects = "".join(OBJECT.format(kind, flag) for kind, flag in flags.items())
        (folder / "Annotations" / f"{name}.xml").write_text(ANNOTATION.format(objects))
        labels[name] = (split, flags)
    for split in ("train", "val", "trainval", "test"):
        names = [n for n, (own, _) in labels.items() if own in split or own == split]
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for kind in CLASSES:
            lines = []
            for name in names:
                flag = labels[name][1].get(kind)
                lines.append(f"{name} {'-1' if flag is None else ' 0' if flag else ' 1'}")
            text = "\n".join(lines) + "\n"
            (folder / "ImageSets" / "Main" / f"{kind}_{split}.txt").write_text(text)
    return folder
