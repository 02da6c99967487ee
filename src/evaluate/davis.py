"""DAVIS 2017, videos with the masks of their objects, as distributed; its indexed PNG files.

Pont-Tuset et al. 2017, arXiv:1704.00675. JPEGImages/480p/<video>/00000.jpg, ...;
Annotations/480p/<video>/00000.png, ..., of which the first one is given; ImageSets/2017/<split>.txt.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from ..data.folders import read_file
from ..data.images import BrokenImage, UnfitImage, decode_image
from ..run.log import whole
from .segmentation_measures import VOID

RESOLUTIONS = ("480p", "Full-Resolution")  # folders, the first one that is there
CUT = 64  # pixels, at the published size: the longer side becomes a multiple of it
PUBLISHED_SIDE = 480  # pixels of the shorter side
SHRUNK = 1.5  # times, from which an image is smoothed before it is made smaller


@dataclass
class Video:
    """The files of a video's frames and, by place, of their masks: None where there is none."""

    name: str
    frames: list[Path]
    masks: list[Path | None]


def digest(video: Video) -> str:
    """What tells a video from others of its name: its frames by name, the first by content, its masks."""
    found = hashlib.blake2b(digest_size=8)
    for path in video.frames:
        found.update(path.name.encode(errors="surrogateescape") + b"\0")
    for path in (video.frames[0], *(mask for mask in video.masks if mask is not None)):
        found.update(path.read_bytes())
    return found.hexdigest()


def open_davis(path: str, split: str, flag: str = "--data_path") -> list[Video]:
    """The videos of ImageSets/2017/<split>.txt, such as val.

    path: the folder DAVIS, or the one that holds it. Raises FileNotFoundError or ValueError naming
    `flag`: where a folder, a frame or the first mask is missing.
    """
    places = [Path(path).expanduser() / subfolder for subfolder in (".", "DAVIS")]
    folder = next((place for place in places if (place / "JPEGImages").is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"{flag} {path} has no JPEGImages: give the folder DAVIS of DAVIS 2017, with JPEGImages, "
            "Annotations and ImageSets"
        )
    resolution = next((x for x in RESOLUTIONS if (folder / "JPEGImages" / x).is_dir()), None)
    if resolution is None:
        raise FileNotFoundError(f"{flag} {path}: JPEGImages has no {' or '.join(RESOLUTIONS)}")
    listed = folder / "ImageSets" / "2017" / f"{split}.txt"
    if not listed.is_file():
        raise FileNotFoundError(f"{flag} {path}: there is no {listed}, which names the videos")
    videos = []
    for name in listed.read_text().split():
        frames = sorted((folder / "JPEGImages" / resolution / name).glob("*.jpg"))
        masks = [folder / "Annotations" / resolution / name / f"{x.stem}.png" for x in frames]
        if len(frames) < 3:
            raise ValueError(
                f"{flag} {path}: the video {name} has {len(frames)} frames; the benchmark leaves out the "
                "first and the last one, and needs three"
            )
        if not masks[0].is_file():
            raise FileNotFoundError(f"{flag} {path}: there is no {masks[0]}, the first mask")
        videos.append(Video(name, frames, [x if x.is_file() else None for x in masks]))
    if not videos:
        raise ValueError(f"{flag} {path}: {listed} names no video")
    return videos


def palette() -> list[int]:
    """768 numbers, red, green and blue of each label: the colours of PASCAL VOC and of DAVIS.

    Label 8 a + b, b = rgb in binary: the highest bit of red, green and blue is r, g and b; the next
    ones come from a in the same way.
    """
    colours = np.zeros((256, 3), np.int64)
    labels = np.arange(256)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= (labels >> channel & 1) << (7 - place)
        labels = labels >> 3
    return colours.flatten().tolist()


def read_mask(path: Path) -> np.ndarray:
    """The labels (H, W) uint8 of an indexed PNG: 0 background, 255 void. Raises ValueError."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(
                    f"{path} has colours instead of labels ({image.mode}): masks are indexed PNG files"
                )
            return np.array(image)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error


def write_mask(path: Path, labels: np.ndarray) -> None:
    """Write labels (H, W) uint8 as an indexed PNG, whole or not at all."""
    image = Image.fromarray(labels)  # of mode L
    image.putpalette(palette())
    with whole(path) as spare:
        image.save(spare, format="PNG")


def count_objects(labels: np.ndarray) -> int:
    """The number of objects: the largest label of the first mask."""
    return int(labels[labels != VOID].max(initial=0))


def shrink_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels (H, W) -> those at the centres of the cells of a grid, (height, width) of `size`."""
    height, width = size
    return np.array(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


def size_of_frame(height: int, width: int, short_side: int, stride: int) -> tuple[int, int]:
    """Height and width in pixels that a frame is resized to: both are multiples of `stride`.

    The shorter side becomes `short_side`, the longer one is cut: as published to a multiple of 64, from
    480 px on and for strides that divide 64, so that 480 x 854 becomes 480 x 832. Raises ValueError.
    """
    shorter, longer = sorted((height, width))
    as_published = short_side >= PUBLISHED_SIDE and CUT % stride == 0
    multiple = CUT if as_published else stride
    short = short_side // stride * stride
    long = short_side * longer // shorter // multiple * multiple
    if not short:
        raise ValueError(
            f"--short_side {short_side} is smaller than a position of the features, which is {stride} x "
            f"{stride} px: use a multiple of {stride}"
        )
    return (short, max(long, short)) if height <= width else (max(long, short), short)


class Frames(Dataset):
    """The frames of a video, uint8 (in_chans, height, width) each, resized to `size` as published.

    An item is None for one that cannot be read: an error raised here would lose its sentence on the way.
    """

    def __init__(self, paths: list[Path], in_chans: int, size: tuple[int, int]):
        self.paths, self.in_chans, self.size = paths, in_chans, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | None:
        try:
            image = decode_image(read_file(self.paths[index]), self.in_chans)
        except (BrokenImage, UnfitImage, OSError):
            return None
        if tuple(image.shape[1:]) == self.size:
            return image
        shrinks = image.shape[1] > SHRUNK * self.size[0]
        resized = F.interpolate(image[None], size=self.size, mode="bilinear", antialias=shrinks)
        return resized[0]
