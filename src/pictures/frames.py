"""Images one after the other, from a file, a folder or a video; decoded only when they are due."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from ..data.folders import list_images, read_file
from ..data.images import BrokenImage, UnfitImage, decode_image, match_channels
from ..errors import printable

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(".mp4 .mkv .mov .avi .webm .m4v .mpg .mpeg .ogv .wmv .flv".split())
ANIMATED_SUFFIXES = frozenset(".gif .webp .apng".split())

Frames = Iterator[tuple[str, torch.Tensor]]


def open_frames(
    path: str | Path, in_chans: int = 3, flag: str = "--image_path"
) -> tuple[Frames, int | None]:
    """(frames, their number): pairs (name, uint8 (in_chans, H, W)), one in memory at a time.

    path: an image file; a folder, whose images come sorted by name, those of subfolders included; an
    animated GIF or WebP; a video, read with PyAV. The number is 1 for a single image only, and None
    where the file does not tell it. Names are paths without suffix, relative to the folder.
    A file of a folder that does not decode is named in the log and left out. Raises ValueError or
    OSError, with a sentence that names `flag`: now for a path that is wrong, while reading for what
    cannot be decoded.
    """
    path = os.path.expanduser(path)
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        names = list_images(path)
        if not names:
            raise FileNotFoundError(f"{flag} {path} has no image in it, nor in its subfolders")
        return _of_folder(path, names, in_chans, flag), len(names)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{flag} {path} does not exist: give an image, a folder of images, or a video"
        )
    if suffix in VIDEO_SUFFIXES:
        return _open_video(path, in_chans, flag)
    if suffix in ANIMATED_SUFFIXES:
        try:
            with Image.open(path) as animation:
                count = getattr(animation, "n_frames", 1)
        except OSError as error:
            raise _unreadable(flag, path, error) from error
        if count > 1:
            return _of_animation(path, in_chans, flag), count
    return _of_image(path, in_chans, flag), 1


def in_batches(
    frames: Frames, at_once: Callable[[torch.Tensor], int]
) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
    """(names, images) of frames of one shape that follow each other, `at_once(image)` at most."""
    names, images, most = [], [], 1
    for name, image in frames:
        if images and (len(images) == most or image.shape != images[0].shape):
            yield names, images
            names, images = [], []
        if not images:
            most = at_once(image)
        names.append(name)
        images.append(image)
    if images:
        yield names, images


def _of_image(path, in_chans, flag):
    try:
        yield Path(path).stem, decode_image(Path(path).read_bytes(), in_chans)
    except (BrokenImage, UnfitImage) as error:
        raise _unreadable(flag, path, error) from error


def _of_folder(root, names, in_chans, flag):
    stems = Counter(os.path.splitext(name)[0] for name in names)
    found = 0
    for name in names:
        try:
            image = decode_image(read_file(os.path.join(root, name)), in_chans)
        except (BrokenImage, UnfitImage, OSError) as error:
            file = printable(os.path.join(root, name))
            logger.warning("cannot read %s (%s): left out", file, error)
            continue
        found += 1
        stem = os.path.splitext(name)[0]
        yield stem if stems[stem] == 1 else name.replace(".", "_"), image
    if not found:
        raise ValueError(f"{flag} {root}: none of its {len(names)} images is readable")


def _of_animation(path, in_chans, flag):
    try:
        with Image.open(path) as animation:
            for number, frame in enumerate(ImageSequence.Iterator(animation)):
                pixels = torch.from_numpy(np.array(frame.convert("RGB"))).permute(2, 0, 1)
                yield _numbered(number), match_channels(pixels, in_chans)
    except (OSError, SyntaxError, UnfitImage) as error:  # PIL's decoders raise both of them
        raise _unreadable(flag, path, error) from error


def _open_video(path, in_chans, flag):
    try:
        import av
    except ImportError:
        raise ValueError(
            f"{flag} {path} is a video, which needs the package av: pip install av"
        ) from None
    try:
        with av.open(path) as container:
            streams = container.streams.video
            if not streams:
                raise ValueError(f"{flag} {path} has no video in it")
            count = streams[0].frames or None
    except av.FFmpegError as error:
        raise _unreadable(flag, path, error) from error
    return _of_video(av, path, in_chans, flag), None if count == 1 else count


def _of_video(av, path, in_chans, flag):
    number = damaged = 0
    try:
        with av.open(path) as container:
            for packet in container.demux(video=0):
                try:
                    decoded = packet.decode()
                except av.FFmpegError:
                    damaged += 1
                    continue
                for frame in decoded:
                    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                    yield _numbered(number), match_channels(pixels, in_chans)
                    number += 1
    except (av.FFmpegError, UnfitImage) as error:
        raise _unreadable(flag, path, error) from error
    if number == 0:
        raise ValueError(f"{flag} {path} has no frame that can be read")
    if damaged:
        logger.warning("%d parts of %s are damaged: left out, %d frames", damaged, path, number)


def _numbered(number):
    return f"frame_{number:06}"


def _unreadable(flag, path, error):
    return ValueError(f"{flag} {path} cannot be read ({error})")
