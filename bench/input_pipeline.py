"""Images a second of one core through the input pipeline: 2x224 + 6x96 from JPEGs of about 500x375.

Compared with the plain published pipeline, sample by sample and crop by crop: PIL decoding,
torchvision's RandomResizedCrop, flip, ColorJitter, grayscale, PIL's GaussianBlur, to tensor,
normalise. Ours once as the loader alone, which is all a core does when the colours are changed on
a GPU, and once with the colours changed on the CPU as well. albumentations stands beside them where it
is installed: OpenCV's decoding and operations on 8-bit images, and its resizing, which does not antialias.

Floor: a JPEG of this size takes about 0.6 ms to decode (libjpeg-turbo, EPYC 9005), after which 8
crops have to be read and 467 kB written. Everything runs in one process on one thread.

    python -m bench.input_pipeline [--device cuda]

With a GPU it also times the colours there: 64 images, copied as uint8 and changed in one batch.
"""

import functools
import importlib.util
import io
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter

from bench.measure import get_parser, median_seconds, parse_args, print_table
from src.data.augment import Augment
from src.data.datasets import EpochSampler, open_dataset
from src.data.multicrop import MultiCropDataset, multicrop_loader

NUM_CROPS, SIZES, LOW, HIGH = [2, 6], [224, 96], [0.14, 0.05], [1.0, 0.14]
MEAN, STD = [0.485, 0.456, 0.406], [0.228, 0.224, 0.225]
BATCH = 16


def write_images(folder, num):
    """JPEGs of random content, smooth with some texture, about 65 kB each; returns their mean size."""
    generator = np.random.default_rng(0)
    for i in range(num):
        width, height = 500, 375
        layers = []
        for detail, weight in ((4, 1.0), (12, 0.6), (40, 0.35), (120, 0.18)):
            coarse = generator.integers(0, 256, (detail * 3 // 4, detail, 3), dtype=np.uint8)
            layer = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
            layers.append(weight * np.asarray(layer, dtype=np.float32))
        pixels = sum(layers) + 18 * generator.standard_normal((height, width, 1))
        pixels = 255 * (pixels - pixels.min()) / (pixels.max() - pixels.min())
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:04d}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.iterdir()) / num


class RandomBlur:
    def __call__(self, image):
        if random.random() < 0.5:
            return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))
        return image


def published_transforms():
    """One transform a crop, as the published multi-crop dataset applies them."""
    transforms = []
    for number, size, low, high in zip(NUM_CROPS, SIZES, LOW, HIGH, strict=True):
        steps = [
            T.RandomResizedCrop(size, scale=(low, high)),
            T.RandomHorizontalFlip(0.5),
            T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            T.RandomGrayscale(0.2),
            RandomBlur(),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
        transforms += [T.Compose(steps)] * number
    return transforms


def albumentations_transforms():
    """One transform a crop of the same steps and draws; None where albumentations is not installed."""
    if importlib.util.find_spec("albumentations") is None:
        return None
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for its version
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2

    cv2.setNumThreads(1)
    strong = (0.2, 1.8)
    transforms = []
    for number, size, low, high in zip(NUM_CROPS, SIZES, LOW, HIGH, strict=True):
        steps = [
            A.RandomResizedCrop(size=(size, size), scale=(low, high)),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(
                brightness=strong, contrast=strong, saturation=strong, hue=(-0.2, 0.2), p=0.8
            ),
            A.ToGray(p=0.2),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5),
            A.Normalize(MEAN, STD),
            ToTensorV2(),
        ]
        transforms += [A.Compose(steps)] * number
    return transforms


def by_albumentations(paths, transforms):
    """All crops of all images."""
    import cv2

    for path in paths:
        image = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
        [transform(image=image) for transform in transforms]


def main(argv=None):
    parser = get_parser(__doc__, repeats=7)
    parser.add_argument("--images", type=int, default=64)
    args = parse_args(parser, smoke={"images": 4}, argv=argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        size = write_images(folder, args.images)
        measure(folder, args.images, args.repeats, size, args.json)
    torch.set_num_threads(threads)
    if args.device != "cpu":
        measure_on_device(args.device, args.repeats, args.json)


def measure(folder, num, repeats, file_size, json_file):
    paths = sorted(folder.iterdir())
    transforms = published_transforms()
    cropping = [transform.transforms[0] for transform in transforms]
    dataset = open_dataset(str(folder))
    crops = MultiCropDataset(dataset, NUM_CROPS, SIZES, LOW, HIGH)
    batch_size = min(BATCH, num)
    sampler = EpochSampler(num, batch_size, 0, 1, seed=0)
    loader = multicrop_loader(crops, sampler, batch_size, 0, "cpu")
    augment, generator = Augment(MEAN, STD), torch.Generator().manual_seed(0)
    batches = list(loader)

    def pil_image(path):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return image.convert("RGB")

    def published():
        for path in paths:
            image = pil_image(path)
            [transform(image) for transform in transforms]

    def published_decode():
        [pil_image(path) for path in paths]

    def published_crops():
        for path in paths:
            image = pil_image(path)
            [crop(image) for crop in cropping]

    def load():
        for _ in loader:
            pass

    def load_and_augment():
        for batch, _ in loader:
            augment(batch, generator)

    def decode():
        [dataset.load(i) for i in range(num)]

    def photometry():
        for batch, _ in batches:
            augment(batch, generator)

    functions = [published, load, load_and_augment]
    functions += [published_decode, published_crops, decode, photometry]
    fast_transforms = albumentations_transforms()
    if fast_transforms is not None:
        functions.append(functools.partial(by_albumentations, paths, fast_transforms))
    times = [t / num for t in median_seconds(functions, repeats, warmup=1)]
    whole, loading, everything, pil_decode, pil_crops, decoding, colours, *peer = times
    rows = [
        ["published, per sample (PIL)", whole],
        *[["albumentations, per sample (OpenCV)", seconds] for seconds in peer],
        ["ours, loader only (colours on the device)", loading],
        ["ours, colours on the CPU", everything],
    ]
    print_table(
        f"input pipeline, 2x224 + 6x96 from {num} JPEGs of 500x375 ({file_size / 1e3:.0f} kB)",
        ["one core", "ms/image", "images/s", "times faster"],
        [[name, seconds * 1e3, 1 / seconds, whole / seconds] for name, seconds in rows],
        json_file,
    )
    rows = [
        ["decode", pil_decode, decoding],
        ["resized crops", pil_crops - pil_decode, loading - decoding],
        ["photometry, to float, normalise", whole - pil_crops, colours],
    ]
    print_table(
        "input pipeline, where it goes, ms an image",
        ["part", "published", "ours", "times faster"],
        [[name, a * 1e3, b * 1e3, a / b] for name, a, b in rows],
        json_file,
    )


def measure_on_device(device, repeats, json_file, batch_size=64):
    """Copying a pinned uint8 batch to the device, and its photometry there."""
    batch = [
        torch.randint(0, 256, (batch_size, number, size, size, 3), dtype=torch.uint8)
        .permute(0, 1, 4, 2, 3)
        .pin_memory()
        for number, size in zip(NUM_CROPS, SIZES, strict=True)
    ]
    augment, generator = Augment(MEAN, STD), torch.Generator().manual_seed(0)

    def copy():
        return [images.to(device, non_blocking=True) for images in batch]

    copied = copy()
    functions = [copy, lambda: augment(copied, generator), lambda: augment(copy(), generator)]
    times = median_seconds(functions, repeats=max(20, repeats), warmup=5, device=device)
    print_table(
        f"colours on {torch.cuda.get_device_name(device)}, batch of {batch_size}",
        ["part", "ms/batch", "us/image"],
        [
            [name, t * 1e3, t / batch_size * 1e6]
            for name, t in zip(["copy of uint8", "photometry", "both"], times, strict=True)
        ],
        json_file,
    )


if __name__ == "__main__":
    main()
