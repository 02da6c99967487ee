"""Pictures inside a page, as data: URIs, made smaller until all of them fit."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import cause

# From the best to the smallest: pixels of the longer side, and the quality of a JPEG, None for a PNG.
# Before all of them comes the file as it is.
LEVELS = (
    (1800, None),
    (1800, 88),
    (1400, 82),
    (1100, 76),
    (900, 70),
    (700, 62),
    (500, 55),
    (360, 45),
    (240, 40),
)
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # errors of PIL


@dataclass
class Embedded:
    """A picture as it stands in a page: uri, width and height in pixels, and why it is not there."""

    uri: str = ""
    width: int = 0
    height: int = 0
    missing: str = ""


def embed_images(paths: Sequence[Path], most_bytes: int) -> list[Embedded]:
    """The pictures of some files, whose URIs have at most `most_bytes` characters together.

    As long as they have more, the largest goes on to the next of LEVELS, from the file itself; after
    the last it is left out. A file that is no image is missing, too.
    """
    found, levels = [_as_it_is(path) for path in paths], [iter(LEVELS) for _ in paths]
    while sum(len(x.uri) for x in found) > most_bytes:
        largest = max(range(len(found)), key=lambda i: len(found[i].uri))
        level = next(levels[largest], None)
        if level is not None:
            found[largest] = _made_smaller(paths[largest], level)
        else:
            name = paths[largest].name
            found[largest] = Embedded(missing=f"{name} is left out: the page would be too large.")
    return found


def _as_it_is(path):
    """A PNG or JPEG file without a change, others as the first of LEVELS."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
            if image.format not in ("PNG", "JPEG"):
                return encode(picture, LEVELS[0])
            kind = image.format.lower()
        return Embedded(_uri(kind, path.read_bytes()), picture.width, picture.height)
    except UNREADABLE as error:
        return _unreadable(path, error)


def _made_smaller(path, level):
    """The file at one of LEVELS; it may have changed since it was read as it is."""
    try:
        with Image.open(path) as image:
            return encode(image.convert("RGB"), level)
    except UNREADABLE as error:
        return _unreadable(path, error)


def _unreadable(path, error):
    return Embedded(missing=f"{path.name} cannot be read ({cause(error)[:80]}).")


def _uri(kind, contents):
    return f"data:image/{kind};base64,{base64.b64encode(contents).decode()}"


def encode(picture: Image.Image, level: tuple[int, int | None]) -> Embedded:
    """An RGB picture at one of LEVELS, shrunk where it is larger than that."""
    side, quality = level
    scale = min(1.0, side / max(picture.size))
    size = [max(1, round(scale * length)) for length in picture.size]
    if scale < 1:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if quality is None:
        picture.save(file, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(file, "JPEG", quality=quality, optimize=True, progressive=True)
        kind = "jpeg"
    return Embedded(_uri(kind, file.getvalue()), picture.width, picture.height)
