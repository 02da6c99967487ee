"""Where the class token of a vision transformer looks: mass, masks, heat maps and their pictures.

Source: Caron et al. 2021, arXiv:2104.14294, figures 1, 3, 4 and 8: the self-attention of the class
token in the last block, one map for each head; masks keep the patches with 60 % of the mass.
Pictures are uint8 arrays (H, W, 3).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .sheets import (
    Group,
    Header,
    Row,
    Scale,
    Sheet,
    Tile,
    distinct_colours,
    draw_sheet,
    enlarge,
    factor_for,
    three_channels,
)

ROUNDING = 1e-9  # of the mass: what is reached but for rounding is reached
BATCH_BYTES, IMAGE_BYTES, MOST_IMAGES = 256 << 20, 8 << 30, 32  # see images_at_once
LEAST, MOST = 192, 256  # pixels of the longer side of an image on a sheet
GIF_FRAMES = 1000  # they are all in memory until the file is written


# ============ mathematics ============
def class_attention(attention: Tensor, rows: int, cols: int, num_registers: int = 0) -> Tensor:
    """Attention of the class token to the patches: (B, heads, T, T) -> (B, heads, rows, cols).

    Tokens are the class token, `num_registers` registers, then rows * cols patches row by row. What
    the class token gives to itself and to registers is left out, so that a map sums to 1 or less.
    """
    return attention[:, :, 0, 1 + num_registers :].unflatten(2, (rows, cols))


def keep_mass(attention: Tensor, mass: float) -> Tensor:
    """The smallest set of patches with at least `mass` of a map's sum, 0 < mass <= 1.

    (..., rows, cols) float -> (..., rows, cols) bool. Of equal patches the first ones are taken.
    """
    values = attention.flatten(-2).double()  # (..., N)
    ordered, order = values.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # mass of the patches that come earlier
    kept = before < mass * (1 - ROUNDING) * values.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept).view(attention.shape)


def images_at_once(model: nn.Module, image: Tensor) -> int:
    """How many images (C, H, W) a batch may have, so that its attention fits into BATCH_BYTES.

    Raises ValueError where that of a single one takes more than IMAGE_BYTES.
    """
    num_tokens = 1 + model.num_registers + image[0].numel() // model.patch_size**2
    size = 4 * model.num_heads * num_tokens**2
    if size > IMAGE_BYTES:
        text = " ".join(map(str, image.shape[1:]))
        raise ValueError(
            f"--image_size {text} makes {num_tokens:,} tokens, whose attention takes "
            f"{size / 2**30:.0f} GiB an image: use a smaller one"
        )
    return min(MOST_IMAGES, max(1, BATCH_BYTES // size))


def fit_image(image: Tensor, size: Sequence[int], patch_size: int) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, H', W'), resized, then cut at the bottom and right to patches.

    size: height and width in pixels; or one value, of the shorter side. Raises ValueError where no
    patch is left.
    """
    size = _size_of(image, size)
    if min(size) < patch_size:
        text = " ".join(map(str, size))
        raise ValueError(f"--image_size {text} leaves no whole patch of --patch_size {patch_size}")
    if tuple(image.shape[1:]) != tuple(size):
        image = F.interpolate(image[None], size=tuple(size), mode="bilinear", antialias=True)[0]
    height, width = (side - side % patch_size for side in size)
    return image[:, :height, :width].contiguous()


def fit_labels(labels: Tensor, size: Sequence[int], patch_size: int) -> Tensor:
    """Labels of pixels (n, H, W) -> uint8 (n, H', W'), as fit_image has it; the nearest pixel's each."""
    size = _size_of(labels, size)
    labels = F.interpolate(labels[None].float(), size=tuple(size), mode="nearest-exact")[0]
    height, width = (side - side % patch_size for side in size)
    return labels[:, :height, :width].to(torch.uint8)


def _size_of(image, size):
    """Height and width; of one value the shape stays, as torchvision's Resize has it."""
    if len(size) > 1:
        return size
    shorter = min(image.shape[1:])
    return [size[0] * side // shorter for side in image.shape[1:]]


# ============ pictures of one image ============
def draw_attention(
    image: Tensor, attention: Tensor, threshold: float | None = None
) -> dict[str, np.ndarray]:
    """Pictures by file name, without suffix, of one image and the maps of its heads.

    image: uint8 (C, H, W). attention: (heads, rows, cols). "img"; for each head and for the mean of
    all heads "attn-<head>", a heat map from its minimum to its maximum, and "overlay-<head>", the
    same over the image; with a threshold "mask_th<threshold>_<head>", the patches of `keep_mass`,
    and "masks_th<threshold>", the masks of all heads in their colours.
    """
    picture = three_channels(image).permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
    maps = torch.cat([attention, attention.mean(0, keepdim=True)]).float().cpu()
    names = [*(f"head{i}" for i in range(len(attention))), "mean"]
    pictures = {"img": picture}
    for name, values in zip(names, maps.numpy(), strict=True):
        heat = heat_map(values, picture.shape[:2])
        pictures[f"attn-{name}"] = heat
        pictures[f"overlay-{name}"] = blend(picture, heat, 0.6)
    if threshold is not None:
        together = picture
        colours = distinct_colours(len(names))
        for name, mask, colour in zip(
            names, keep_mass(maps, threshold).numpy(), colours, strict=True
        ):
            mask = _enlarge(mask, picture.shape[:2])
            pictures[f"mask_th{threshold}_{name}"] = paint_mask(picture, mask, colour)
            if name != "mean":
                together = paint_mask(together, mask, colour)
        pictures[f"masks_th{threshold}"] = together
    return pictures


def heat_map(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(rows, cols) float -> (H, W, 3), a square of one colour for each patch, darkest the minimum."""
    from matplotlib import colormaps  # here, since it takes a second to import

    low, high = values.min(), values.max()
    scaled = (values - low) / max(high - low, np.finfo(np.float32).tiny)
    colours = colormaps["viridis"](scaled, bytes=True)[:, :, :3]  # (rows, cols, 3)
    return _enlarge(colours, shape)


def blend(picture: np.ndarray, colours: np.ndarray, share: float) -> np.ndarray:
    """`share` of `colours` (a picture, or one colour) over a picture, which is seen as grey."""
    grey = picture.mean(2, keepdims=True)
    return (grey * (1 - share) + np.asarray(colours) * share).round().astype(np.uint8)


def paint_mask(picture: np.ndarray, mask: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """Tint where `mask` (H, W) is true, and draw its outline."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    painted = picture.copy()
    tint = picture[mask] * 0.5 + np.array(colour) * 0.5
    painted[mask] = tint.round().astype(np.uint8)
    painted[mask & ~inner] = colour
    return painted


def _enlarge(values, shape):
    """(rows, cols, ...) -> (H, W, ...), each value as a rectangle."""
    tall, wide = (n // cells for n, cells in zip(shape, values.shape[:2], strict=True))
    return values.repeat(tall, 0).repeat(wide, 1)


# ============ sheets and animations ============
def image_sheet(
    pictures: dict[str, np.ndarray],
    attention: Tensor,
    threshold: float | None,
    title: str,
    source: str,
) -> Sheet:
    """The pictures of one image: its heads side by side, as heat, over the image, and as masks.

    attention: (heads, rows, cols), of which the smallest and the largest values are said.
    """
    names = [name.removeprefix("attn-") for name in pictures if name.startswith("attn-")]
    maps = [*attention.float(), attention.float().mean(0)]
    ranges = [f"{float(x.min()):.2g} to {float(x.max()):.2g}" for x in maps]
    heat = [Tile(_small(pictures[f"attn-{x}"]), [y]) for x, y in zip(names, ranges, strict=True)]
    over = [Tile(_small(pictures[f"overlay-{x}"])) for x in names]
    rows = [[Tile(_small(pictures["img"])), *heat]]
    rows.append([Tile(_small(pictures["img"])), *over])
    if threshold is not None:
        first = Tile(
            _small(pictures[f"masks_th{threshold}"]), [f"{threshold:g} of each head's mass"]
        )
        masks = [Tile(_small(pictures[f"mask_th{threshold}_{x}"])) for x in names]
        rows.append([first, *masks])
    groups = ["image", *(name.replace("head", "head ") for name in names)]
    equal = 1 / max(1, attention[0].numel())
    note = (
        "numbers: the smallest and the largest share of a patch; spread evenly, each of "
        f"{attention[0].numel():,} patches would have {equal:.2g}"
    )
    return _attention_sheet(Header(title, [source, note], scale=heat_scale()), groups, rows)


def summary_sheet(rows: Sequence[tuple[str, dict]], title: str, source: str) -> Sheet:
    """(name, pictures) of several images: a row for each, its overlays, all masks on one picture."""
    tiles, groups = [], []
    for name, pictures in rows:
        shown = [key for key in pictures if key.startswith(("overlay", "masks"))]
        groups = [
            "image",
            *(key.removeprefix("overlay-").replace("head", "head ") for key in shown),
        ]
        small = [Tile(pictures["img"], [name]), *(Tile(pictures[key]) for key in shown)]
        tiles.append(small)
    groups = [f"{x[8:]} of the mass" if x.startswith("masks_th") else x for x in groups]
    note = "each map from its own minimum to its own maximum, over the image"
    return _attention_sheet(Header(title, [source, note], scale=heat_scale()), groups, tiles)


def summary_pictures(pictures: dict[str, np.ndarray]) -> dict[str, Image.Image]:
    """What summary_sheet needs of the pictures of an image, as small as it is drawn."""
    return {
        key: _small(picture)
        for key, picture in pictures.items()
        if key == "img" or key.startswith(("overlay", "masks"))
    }


def heat_scale() -> Scale:
    """The colours of heat_map."""
    values = np.linspace(0, 1, 64, dtype=np.float32)[None]
    return Scale(heat_map(values, (1, 64))[0], "smallest of a map", "largest")


def _attention_sheet(header, names, rows):
    """A column for each of `names`; the images of all rows are enlarged by one factor."""
    factor = factor_for([tile.picture for row in rows for tile in row], LEAST)
    for tile in (tile for row in rows for tile in row):
        tile.picture = enlarge(tile.picture, factor)
    return draw_sheet(header, [Group(x) for x in names], [Row([[x] for x in row]) for row in rows])


def _small(picture):
    return shrink(picture, MOST) if max(picture.shape[:2]) > MOST else Image.fromarray(picture)


def shrink(picture: np.ndarray, side: int) -> Image.Image:
    """A picture whose longer side is `side` pixels; small ones are enlarged, pixel by pixel."""
    image = Image.fromarray(picture)
    scale = side / max(image.size)
    smooth = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    return image.resize([max(1, round(scale * length)) for length in image.size], smooth)


class Animation:
    """A GIF of the first GIF_FRAMES pictures; the later ones take its size from the first."""

    def __init__(self):
        self.frames, self.left_out = [], 0

    def add(self, pictures: Sequence[np.ndarray], side: int = 240) -> None:
        """One frame: pictures side by side."""
        if len(self.frames) == GIF_FRAMES:
            self.left_out += 1
            return
        frame = Image.fromarray(np.concatenate([np.asarray(shrink(p, side)) for p in pictures], 1))
        if self.frames and frame.size != self.frames[0].size:
            frame = frame.resize(self.frames[0].size)
        self.frames.append(frame.quantize(256, dither=Image.Dither.NONE))  # a byte a pixel

    def save(self, path: str | Path, fps: float) -> None:
        """Write the frames as a GIF, which counts in hundredths of a second."""
        first, *rest = self.frames
        # A GIF counts in hundredths of a second.
        milliseconds = max(10, round(100 / fps) * 10)
        first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0)
