"""Small videos in the layout of DAVIS 2017: coloured squares that move over noise, and their masks."""

import numpy as np
from PIL import Image

from src.evaluate.davis import write_mask

COLOURS = [(230, 40, 40), (40, 60, 230)]


def write_davis(folder, names=("bear", "dogs"), frames=5, size=(48, 64), objects=2, step=2):
    """A folder DAVIS with the split val; returns it. Object k starts at row 4 + 20 k and moves right."""
    rng = np.random.default_rng(0)
    (folder / "ImageSets" / "2017").mkdir(parents=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("".join(f"{name}\n" for name in names))
    for name in names:
        for kind in ("JPEGImages", "Annotations"):
            (folder / kind / "480p" / name).mkdir(parents=True)
        for number in range(frames):
            pixels = rng.integers(90, 130, (*size, 3), dtype=np.uint8)
            labels = np.zeros(size, np.uint8)
            for k in range(objects):
                place = (
                    slice(4 + 20 * k, 20 + 20 * k),
                    slice(step * number + 6, step * number + 22),
                )
                pixels[place], labels[place] = COLOURS[k], k + 1
            file = folder / "JPEGImages" / "480p" / name / f"{number:05}.jpg"
            Image.fromarray(pixels).save(file, quality=95)
            write_mask(folder / "Annotations" / "480p" / name / f"{number:05}.png", labels)
    return folder
