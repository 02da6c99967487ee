"""Images a second of the loader with --reduced_decoding and without, and what it does to the pixels.

    python -m bench.reduced_decoding

scikit-learn's two photographs, of 640x427, are cut to 4:3 and written as JPEGs of quality 90 in several
sizes; enlarged ones are smoother than photographs of that size, so that their files are smaller and their
crops differ less. Files are read and decoded, and multi-crops of SwAV's scales are cut from them, in one
process on one thread: the colours are changed on a GPU. CPU time, the least of interleaved repeats of each
image, since other work on a machine counts little in it.

The difference is that of the crops, in levels of 0 to 255, of those images that were decoded at a part
of their size. It comes from the filter, which is sharper than two steps of bilinear ones, and from
windows that are moved to the whole pixels of the reduced image.

Floor: a JPEG's entropy code is read at any scale, about half of the time at full size.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.measure import get_parser, parse_args, print_table
from src.data.datasets import open_dataset
from src.data.multicrop import MultiCropDataset, reduction

SIZES = [(500, 375), (1000, 750), (2000, 1500)]
CROPS = {"2x224 + 6x96": [224, 96], "2x96 + 6x48": [96, 48]}
SCALES = {"min_scale_crops": [0.14, 0.05], "max_scale_crops": [1.0, 0.14]}


def write_images(folder, width, height):
    """The photographs as JPEGs of this size; returns the mean size of a file in kB."""
    from sklearn.datasets import load_sample_images

    for i, pixels in enumerate(load_sample_images().images):
        rows, columns = pixels.shape[:2]
        left = (columns - rows * 4 // 3) // 2
        image = Image.fromarray(pixels[:, left : columns - left])
        image.resize((width, height), Image.LANCZOS).save(folder / f"{i}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.iterdir()) / 2e3


def crops_of(folder, sizes):
    """The crops of a folder without and with reduced decoding."""
    dataset = open_dataset(str(folder))
    return [
        MultiCropDataset(dataset, [2, 6], sizes, reduced_decoding=reduced, **SCALES)
        for reduced in (False, True)
    ]


def main(argv=None):
    parser = get_parser(__doc__, repeats=7)
    parser.add_argument(
        "--images", type=int, default=60, help="with crops of their own, of the two photographs"
    )
    args = parse_args(parser, smoke={"images": 4}, argv=argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times, pixels = [], []
    for width, height in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            size = write_images(Path(folder), width, height)
            for name, sizes in CROPS.items():
                row = f"{width}x{height} ({size:.0f} kB), {name}"
                crops = crops_of(folder, sizes)
                times.append([row, *measure(crops, args.images, args.repeats)])
                pixels.append([row, *compare(crops, args.images, width, height)])
    header = ["photographs, crops", "images/s", "images/s, reduced", "times faster"]
    print_table("reduced decoding, the loader", header, times, args.json)
    header = [
        "photographs, crops",
        "% at 1/2",
        "1/4",
        "1/8",
        "mean difference",
        "largest mean",
        "max",
    ]
    print_table("reduced decoding, pixels of the crops (0 to 255)", header, pixels, args.json)
    torch.set_num_threads(threads)


def measure(crops, num, repeats):
    """Images a second of both, and their ratio, by the least CPU time of each image."""
    least = np.full((num, 2), np.inf)
    for i in range(num):
        for _ in range(1 + repeats):
            for form, each in enumerate(crops):
                start = time.process_time()
                each[i, i % 2]
                least[i, form] = min(least[i, form], time.process_time() - start)
    plain, reduced = least.sum(0).tolist()
    return [num / plain, num / reduced, plain / reduced]


def compare(crops, num, width, height):
    """Percent of images at each scale; of crops: mean difference, that of the worst crop, largest."""
    plain, reduced = crops
    scales = [
        reduction(plain.windows(i, i % 2, height, width), plain.size_crops) for i in range(10 * num)
    ]
    means, largest = [], 0
    for i in [i for i in range(num) if scales[i] > 1]:
        for ours, theirs in zip(reduced[i, i % 2][0], plain[i, i % 2][0], strict=True):
            difference = (ours.float() - theirs.float()).abs()
            means += difference.mean((1, 2, 3)).tolist()
            largest = max(largest, int(difference.max()))
    shares = [100 * float(np.mean(np.equal(scales, scale))) for scale in (2, 4, 8)]
    if not means:
        return [*shares, "-", "-", "-"]
    return [*shares, float(np.mean(means)), max(means), largest]


if __name__ == "__main__":
    main()
