"""A sheet of videos with the masks of their objects, in the colours of their files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.folders import read_file
from ..data.images import decode_image
from ..evaluate.davis import palette, read_mask
from .attention import paint_mask
from .sheets import Group, Header, Row, Tile, draw_sheet, three_channels

COLUMNS = 5  # frames of a video, evenly spaced, the first and the last one among them
ROWS = 12  # videos, evenly spaced
SIDE = 240  # pixels of the longer side of a frame


def draw_videos(
    videos: Sequence[tuple[str, Sequence[Path], Path]], path: str | Path, source: str
) -> None:
    """Write a PNG with some frames of some videos under their masks.

    videos: name, files of the frames, and the folder of the masks, whose names are those of the frames.
    source: whose features carried the masks on.
    """
    chosen = sorted({round(i) for i in np.linspace(0, len(videos) - 1, ROWS)})
    rows = []
    for name, frames, folder in (videos[i] for i in chosen):
        places = sorted({round(i) for i in np.linspace(0, len(frames) - 1, COLUMNS)})
        tiles = []
        for place in places:
            mask = read_mask(folder / f"{frames[place].stem}.png")
            caption = f"frame {place}, given" if place == 0 else f"frame {place}"
            tiles.append(Tile(overlay(frames[place], mask), [caption]))
        rows.append(Row([tiles], [name, f"{len(frames)} frames"]))
    header = Header("The mask of the first frame, carried on", [f"features of {source}"])
    draw_sheet(header, [Group("frames under their masks")], rows).save(path)


def overlay(frame: Path, mask: np.ndarray) -> Image.Image:
    """A frame, small, each object of its mask (H, W) tinted and outlined in its own colour."""
    image = three_channels(decode_image(read_file(frame), 3)).permute(1, 2, 0).numpy()
    scale = SIDE / max(mask.shape)
    size = [max(1, round(scale * side)) for side in mask.shape[::-1]]  # width, height
    enlarged = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    picture = np.asarray(Image.fromarray(image).resize(size, enlarged))
    small = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    colours = np.array(palette()).reshape(-1, 3)
    for label in np.unique(small[small > 0]):
        picture = paint_mask(picture, small == label, colours[label])
    return Image.fromarray(picture)
