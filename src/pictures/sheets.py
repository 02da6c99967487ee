"""Sheets of images: a header that says what they show, named columns, captions, a scale.

A sheet is a table. Each of its rows has a label and, in every group of columns, some tiles; each tile
is an image with lines of text below it. Everything is as wide as it must be, so that only names that
are wider than their image are shortened, in the middle.
"""

import colorsys
import functools
import importlib.util
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import printable
from ..run.log import whole

Colour = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

PAPER = (226, 226, 226)  # behind the images, which are often white or black themselves
INK, PALE = (25, 25, 25), (85, 85, 85)  # of titles, and of what is said beside them
# Pixels around a sheet, between tiles, between groups of columns.
MARGIN, GAP, GROUP_GAP = 16, 10, 26
FRAME = 3  # pixels of the frame around an image
LABEL = 200  # pixels that the text on the left of a row takes at most
LEAST_TEXT = 560  # pixels that a header may be wide, however narrow the images are
BAR = (160, 14)  # width and height in pixels of a scale
ELLIPSIS = "..."
MISSING = "\U0010fffe"  # a character that no font has


# ============ images ============
def three_channels(images: Tensor) -> Tensor:
    """(..., C, H, W) -> (..., 3, H, W): the first three channels, or the first one as grey."""
    if images.shape[-3] >= 3:
        return images[..., :3, :, :]
    return images[..., :1, :, :].expand(*images.shape[:-3], 3, -1, -1)


def to_uint8(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation: (B, C, S, S) float -> uint8."""
    mean, std = (torch.as_tensor(x, device=crops.device).view(-1, 1, 1) for x in (mean, std))
    return (crops.float() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)


def to_picture(image: Tensor, box: tuple[int, int] | None = None) -> Image.Image:
    """uint8 (C, H, W) -> RGB, shrunk into `box` (width, height in pixels) where it is larger."""
    channels = three_channels(image).permute(1, 2, 0).contiguous().cpu().numpy()
    picture = Image.fromarray(channels)
    if box is None:
        return picture
    scale = min(1.0, box[0] / picture.width, box[1] / picture.height)
    if scale == 1:
        return picture
    size = [max(1, round(scale * length)) for length in picture.size]
    return picture.resize(size, Image.Resampling.BICUBIC)


def enlarge(picture: Image.Image, factor: int) -> Image.Image:
    """Each pixel as a square of factor x factor pixels."""
    size = [factor * length for length in picture.size]
    return picture.resize(size, Image.Resampling.NEAREST)


def factor_for(pictures: Iterable[Image.Image], least: int) -> int:
    """The smallest whole factor that makes the longest side of all at least `least` pixels."""
    longest = max((max(picture.size) for picture in pictures), default=least)
    return -(-least // longest)


def spread(total: int, number: int) -> list[int]:
    """At most `number` indices below `total`, evenly spaced: of all classes of sorted images."""
    return [i * total // min(number, total) for i in range(min(number, total))]


def distinct_colours(number: int) -> list[Colour]:
    """So many colours (red, green, blue), around the circle of hues."""
    hues = (i / number for i in range(number))
    return [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, 0.85, 1.0)) for hue in hues]


# ============ text ============
@functools.cache
def font_of(size: int) -> Font:
    """matplotlib's font where it is installed, which has Greek and Cyrillic letters; else Pillow's."""
    found = importlib.util.find_spec("matplotlib")  # which takes a second to import
    if found is not None and found.origin:
        path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        try:
            return ImageFont.truetype(str(path), size)
        except (OSError, ImportError):  # a matplotlib without it, or a Pillow without FreeType
            pass
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):  # Pillow before 10.1, or without FreeType
        return ImageFont.load_default()


def drawable(text: str, font: Font) -> str:
    """The text in characters that can be drawn: those that the font lacks are written as \\u4e2d."""
    return "".join(
        x if _has(font, x) else x.encode("unicode_escape").decode() for x in printable(text)
    )


@functools.lru_cache(maxsize=4096)
def _has(font, character):
    if not isinstance(font, ImageFont.FreeTypeFont):
        return character.isascii()
    if character.isascii():
        return True
    mask, missing = font.getmask(character), font.getmask(MISSING)
    return mask.size != missing.size or bytes(mask) != bytes(missing)


def cut(text: str, font: Font, width: float) -> str:
    """The text, its middle left out where it is wider than `width` pixels; drawable."""
    text = drawable(text, font)
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        end = kept // 2  # of a file's name the number and the suffix are at the end
        short = text[: kept - end] + ELLIPSIS + text[len(text) - end :]
        if font.getlength(short) <= width:
            return short
    return ""


def wrap(text: str, font: Font, width: float) -> list[str]:
    """The words of a text as lines of at most `width` pixels; a longer word is cut."""
    lines = []
    for word in drawable(text, font).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(cut(word, font, width))
    return lines


# ============ sheets ============
@dataclass
class Tile:
    """An image on a sheet: lines of text below it, and the colour of a frame around it."""

    picture: Image.Image
    captions: Sequence[str] = ()
    frame: Colour | None = None


@dataclass
class Group:
    """Columns that have one name; lines: into how many the tiles of a row are broken."""

    name: str
    lines: int = 1


@dataclass
class Row:
    """The tiles of each group, and what is said on the left of them."""

    tiles: Sequence[Sequence[Tile]]
    label: Sequence[str] = ()


@dataclass
class Scale:
    """What colours mean: colours (n, 3) uint8 from the lowest value to the highest, and their names."""

    colours: np.ndarray
    low: str
    high: str


@dataclass
class Header:
    """What a sheet shows: a title, sentences below it, those with a colour of their own, a scale."""

    title: str
    notes: Sequence[str] = ()
    legend: Sequence[tuple[str, Colour]] = ()
    scale: Scale | None = None


@dataclass
class Sheet:
    """A drawn sheet; boxes: (left, top, right, bottom) of the images of each row, group by group."""

    image: Image.Image
    boxes: list[list[list[tuple[int, int, int, int]]]] = field(default_factory=list)

    def save(self, path: str | Path) -> Path:
        """Write it as PNG, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as spare:
            self.image.save(spare, format="PNG")
        return path


def draw_sheet(header: Header, groups: Sequence[Group], rows: Sequence[Row]) -> Sheet:
    """The rows below the header and the names of the groups."""
    columns = [_num_columns(group, rows, g) for g, group in enumerate(groups)]
    cells = [_cell_width(rows, g) for g in range(len(groups))]
    captioned = [cell for g, cell in enumerate(cells) if _has_captions(rows, g)]
    captions = font_of(min(15, max(11, min(captioned, default=110) // 10)))
    labels = [drawable(text, font_of(14)) for row in rows for text in row.label]
    label_width = min(LABEL, max((_length(font_of(14), text) for text in labels), default=0))

    lefts, left = [], MARGIN + label_width + (GROUP_GAP if label_width else 0)
    for group, cell, number in zip(groups, cells, columns, strict=True):
        lefts.append(left)
        name = _length(font_of(14), drawable(group.name, font_of(14)))
        left += max(number * (cell + GAP) - GAP, name) + GROUP_GAP
    width = max(left - GROUP_GAP + MARGIN, _header_width(header))

    top_of_rows = _draw_header(None, header, width) + _line_height(font_of(14)) + 8
    tops, top = [], top_of_rows
    for row in rows:
        tops.append(top)
        heights = _line_heights(groups, row, captions)
        text = len(row.label) * _line_height(font_of(14))
        top += max(text, max(map(_stacked, heights), default=0)) + GAP + FRAME
    image = Image.new("RGB", (width, top - GAP - FRAME + MARGIN), PAPER)
    _draw_header(image, header, width)
    canvas = ImageDraw.Draw(image)
    for group, left in zip(groups, lefts, strict=True):
        place = (left, top_of_rows - 8 - _line_height(font_of(14)))
        canvas.text(place, drawable(group.name, font_of(14)), INK, font_of(14))
    boxes = []
    for row, top in zip(rows, tops, strict=True):
        for i, text in enumerate(row.label):
            place = (MARGIN, top + i * _line_height(font_of(14)))
            text = cut(text, font_of(14), label_width)
            canvas.text(place, text, PALE if i else INK, font_of(14))
        heights = _line_heights(groups, row, captions)
        boxes.append(
            [
                _draw_tiles(image, tiles, (left, top), cell, lines, captions)
                for tiles, left, cell, lines in zip(row.tiles, lefts, cells, heights, strict=True)
            ]
        )
    return Sheet(image, boxes)


def _num_columns(group, rows, g):
    """In how many columns the tiles of a group lie."""
    return max((-(-len(row.tiles[g]) // group.lines) for row in rows), default=0)


def _cell_width(rows, g):
    """Pixels between the left edges of a group's tiles, without the gap."""
    return max((tile.picture.width for row in rows for tile in row.tiles[g]), default=0)


def _has_captions(rows, g):
    return any(tile.captions for row in rows for tile in row.tiles[g])


def _line_heights(groups, row, font):
    """For each group the heights (image, text) of the lines of its tiles, (0, 0) where it has none.

    Where all groups have one line, it is as high in all of them, so that images stand side by side.
    """
    heights = []
    for group, tiles in zip(groups, row.tiles, strict=True):
        in_a_line = max(1, -(-len(tiles) // group.lines))
        lines = [tiles[i : i + in_a_line] for i in range(0, len(tiles), in_a_line)]
        heights.append([_height_of_line(line, font) for line in lines] or [(0, 0)])
    if all(len(lines) == 1 for lines in heights):
        highest = tuple(map(max, zip(*itertools.chain(*heights), strict=True)))
        heights = [[highest] for _ in heights]
    return heights


def _height_of_line(tiles, font):
    texts = max(len(tile.captions) for tile in tiles) * _line_height(font)
    return max(tile.picture.height for tile in tiles), texts


def _stacked(heights):
    """Pixels from the top of the first line of tiles to the bottom of the last."""
    return sum(picture + FRAME + text for picture, text in heights) + GAP * (len(heights) - 1)


def _draw_tiles(image, tiles, corner, cell, heights, font):
    """Draw the tiles of one row in one group, line by line, and return their boxes."""
    canvas, boxes = ImageDraw.Draw(image), []
    in_a_line = max(1, -(-len(tiles) // len(heights)))
    left, top = corner
    for i, tile in enumerate(tiles):
        line, column = divmod(i, in_a_line)
        if column == 0 and line:
            top += _stacked(heights[line - 1 : line]) + GAP
        x, bottom = left + column * (cell + GAP), top + heights[line][0]
        y = bottom - tile.picture.height if heights[line][1] else top  # next to its text, if any
        if tile.frame is not None:
            right, end = x + tile.picture.width, y + tile.picture.height
            corners = [x - FRAME, y - FRAME, right + FRAME - 1, end + FRAME - 1]
            canvas.rectangle(corners, fill=tile.frame)
        image.paste(tile.picture, (x, y))
        boxes.append((x, y, x + tile.picture.width, y + tile.picture.height))
        for number, text in enumerate(tile.captions):
            place = (x, bottom + FRAME + number * _line_height(font))
            canvas.text(place, cut(text, font, cell), PALE, font)
    return boxes


# ============ headers ============
def _header_width(header):
    """Pixels that a sheet must be wide for its header: as its longest sentence, but no more than usual."""
    title = _length(font_of(20), drawable(header.title, font_of(20)))
    texts = [*header.notes, *(text for text, _ in header.legend)]
    notes = max((_length(font_of(14), drawable(text, font_of(14))) for text in texts), default=0)
    scale = 0
    if header.scale is not None:
        names = (header.scale.low, header.scale.high)
        scale = BAR[0] + 16 + sum(_length(font_of(14), name) for name in names)
    return 2 * MARGIN + max(scale, min(LEAST_TEXT, max(title, notes)))


def _draw_header(image, header, width):
    """Draw the header, if there is an image to draw it on, and return where it ends."""
    canvas = ImageDraw.Draw(image or Image.new("RGB", (1, 1)))
    top, room = MARGIN, width - 2 * MARGIN
    lines = [(text, INK, font_of(20)) for text in wrap(header.title, font_of(20), room)]
    coloured = [(note, PALE) for note in header.notes] + list(header.legend)
    for note, colour in coloured:
        lines += [(text, colour, font_of(14)) for text in wrap(note, font_of(14), room)]
    for text, colour, font in lines:
        canvas.text((MARGIN, top), text, colour, font)
        top += _line_height(font)
    if header.scale is not None:
        font, left = font_of(14), MARGIN
        canvas.text((left, top + 4), header.scale.low, PALE, font)
        left += _length(font, header.scale.low) + 8
        colours = Image.fromarray(header.scale.colours[None])
        bar = colours.resize(BAR, Image.Resampling.NEAREST)
        if image is not None:
            image.paste(bar, (left, top + 6))
        canvas.text((left + bar.width + 8, top + 4), header.scale.high, PALE, font)
        top += 10 + _line_height(font)
    return top + 10


def _line_height(font):
    box = font.getbbox("Mgjy|")
    return round(1.25 * box[3])


def _length(font, text):
    return int(-(-font.getlength(text) // 1))
