"""Images from the bytes of a file: decoding to uint8 (C, H, W), ranges and channel counts.

EXIF orientation is not applied: the published pipelines (PIL's `convert("RGB")`) ignore it.
JPEGs go through torchvision's decoder, which gave PIL's pixels exactly (maximum difference 0 on
baseline, progressive, gray and CMYK files, Pillow 13 and torchvision 0.29) in two thirds of the
time; whatever it refuses is tried with PIL. A truncated file is a broken file for both.

`decode_reduced` takes fewer pixels out of a JPEG in less time: libjpeg applies a smaller inverse
transform to each block of 8 x 8 pixels, of 4 x 4, 2 x 2 or 1 x 1. torchvision does not offer this, and
Pillow does (Image.draft).

A JPEG beyond Pillow's limit of a decompression bomb is decoded at a half, a quarter or an eighth of
its size. Of other files four times that limit are decoded, and what is larger is a broken image.
"""

import contextlib
import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .gif .ppm .pgm .npy".split()
)
JPEG_MAGIC, NPY_MAGIC = b"\xff\xd8", b"\x93NUMPY"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PILLOW_LIMIT = Image.MAX_IMAGE_PIXELS  # 89 million pixels
JPEG_PIXELS, MAX_PIXELS = PILLOW_LIMIT, 4 * PILLOW_LIMIT


class BrokenImage(Exception):
    """The bytes do not decode."""


class UnfitImage(ValueError):
    """The image decodes, but not to the number of channels that was asked for."""


class Reduced(NamedTuple):
    """An image of which a JPEG may have been decoded at a part of its size.

    pixels: uint8 (C, ceil(height / scale), ceil(width / scale)). height, width: of the file, in pixels.
    scale: 1, 2, 4 or 8; a pixel stands for scale x scale of the file's from the top left on.
    """

    pixels: torch.Tensor
    height: int
    width: int
    scale: int


def decode_image(data: bytes, in_chans: int) -> torch.Tensor:
    """Decode the bytes of one image file to uint8 `(in_chans, H, W)`.

    One and three channels take any image (gray is repeated, colour becomes PIL's luma, alpha is
    dropped); other counts take .npy arrays and files with that many bands. Of several frames the
    first counts. 16-bit and float images are scaled to 8 bits, see `to_uint8`.
    Raises BrokenImage, or UnfitImage when the channels cannot be had.
    """
    try:
        if in_chans in (1, 3) and 0 < math.prod(_jpeg_size(data)) <= JPEG_PIXELS:
            from torchvision.io import ImageReadMode, decode_jpeg  # seconds, once a process

            mode = ImageReadMode.RGB if in_chans == 3 else ImageReadMode.GRAY
            try:
                return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
            except RuntimeError:
                pass  # PIL knows more kinds of JPEG, and says what is wrong with a broken one
        if data[: len(NPY_MAGIC)] == NPY_MAGIC:
            return _from_array(_npy_array(data), in_chans)
        if in_chans in (1, 3):
            return _from_array(_pil_array(data, in_chans), in_chans)
        return _from_array(_banded_array(data, in_chans), in_chans)
    except (UnfitImage, BrokenImage, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly every type on damaged bytes
        reason = str(error).split(", this is the part")[0].split("<_io")[0].strip()
        raise BrokenImage(f"{type(error).__name__}: {reason}") from error


def decode_reduced(data: bytes, in_chans: int, scale_for: Callable[[int, int], int]) -> Reduced:
    """Decode as decode_image, or a JPEG at the part of its size that `scale_for` says.

    scale_for: of height and width in pixels; 1, or 2, 4, 8 for a half, a quarter, an eighth. It is asked
    for JPEGs of one or three channels that decode_image would decode at full size, and no other images.
    Raises as decode_image.
    """
    height, width = _jpeg_size(data)
    if in_chans in (1, 3) and 0 < height * width <= JPEG_PIXELS:
        scale = scale_for(height, width)
        reduced = _reduced_pixels(data, in_chans, scale) if scale > 1 else None
        if reduced is not None and reduced.shape[1:] == (-(-height // scale), -(-width // scale)):
            return Reduced(reduced, height, width, scale)
    image = decode_image(data, in_chans)
    return Reduced(image, *image.shape[1:], scale=1)


def _reduced_pixels(data, in_chans, scale):
    """A JPEG at 1 / scale of its size, uint8 (in_chans, H, W); None where PIL does not decode it."""
    mode = "RGB" if in_chans == 3 else "L"
    try:
        with _open(data) as image:
            image.draft(mode, (image.width // scale, image.height // scale))
            array = np.array(image if image.mode == mode else image.convert(mode))
    except Exception:  # of a broken image, on which decode_image has the last word
        return None
    return torch.from_numpy(array if in_chans == 3 else array[:, :, None]).permute(2, 0, 1)


def _jpeg_size(data):
    """Height and width that the frame header of a JPEG says; 0, 0 where it is not found at once."""
    if data[:2] != JPEG_MAGIC:
        return 0, 0
    offset = 2
    while offset + 9 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            height = int.from_bytes(data[offset + 5 : offset + 7], "big")
            return height, int.from_bytes(data[offset + 7 : offset + 9], "big")
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return 0, 0


@contextlib.contextmanager
def _open(data):
    """PIL's image, not decoded yet. Raises BrokenImage for more pixels than we decode."""
    try:
        Image.MAX_IMAGE_PIXELS = None  # the limit is ours, which says more than a warning
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS and image.format != "JPEG":
                raise BrokenImage(f"{len(data):,} bytes that unfold to {width} x {height} pixels")
            Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # of a tile
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = PILLOW_LIMIT


def _draft(image, mode):
    """Have a JPEG of too many pixels decoded at a half, a quarter or an eighth of its size."""
    width, height = image.size
    for scale in (1, 2, 4, 8):
        if width * height <= JPEG_PIXELS * scale**2:
            break
    if scale > 1:
        image.draft(mode, (width // scale, height // scale))


def _npy_array(data):
    """The array of a .npy file, which shares its memory; BrokenImage if it claims more than is there."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, in_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, in_columns, dtype = np.lib.format.read_array_header_2_0(stream)
    else:  # of arrays with named fields
        raise BrokenImage(f"version {version} of .npy is no image's")
    if dtype.hasobject:
        raise BrokenImage("it holds Python objects")
    size, start = math.prod(shape), stream.tell()
    if size * dtype.itemsize > len(data) - start:
        raise BrokenImage(f"it claims to be {shape} {dtype}, and has {len(data):,} bytes")
    values = np.frombuffer(data, dtype, count=size, offset=start)
    return values.reshape(shape, order="F" if in_columns else "C")


def _pil_array(data, in_chans):
    """`(H, W)` or `(H, W, 3)`, uint8 or a wider range, by PIL's own conversions."""
    with _open(data) as image:
        if image.format == "JPEG":
            _draft(image, "RGB" if in_chans == 3 else "L")
        if image.mode.startswith("I") or image.mode == "F":  # PIL's convert would clip these
            return np.asarray(image)
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # a transparent palette has no direct way to RGB
        return np.asarray(image.convert("RGB" if in_chans == 3 else "L"))


def _banded_array(data, in_chans):
    """The bands of a file as they are, `(H, W, bands)`; TIFFs that PIL cannot read by tifffile."""
    is_tiff = data[:4] in TIFF_MAGIC
    try:
        with _open(data) as image:
            array = np.asarray(image)
    except BrokenImage:
        raise
    except Exception:
        if not is_tiff:
            raise
        array = None
    if array is not None and (not is_tiff or in_chans in array.shape[2:]):
        return array
    try:
        from tifffile import TiffFile
    except ImportError:
        raise UnfitImage(
            f"a TIFF of {in_chans} bands needs the package tifffile: pip install tifffile"
        ) from None
    with TiffFile(io.BytesIO(data)) as file:
        shape = file.series[0].shape
        if math.prod(shape) > MAX_PIXELS * in_chans:
            raise BrokenImage(f"it unfolds to {shape} values")
        return file.asarray()


def _from_array(array, in_chans):
    """`(H, W)`, `(H, W, C)` or `(C, H, W)` of any range to uint8 `(in_chans, H, W)`."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise UnfitImage(f"an image must be (H, W) or (H, W, channels), this one is {array.shape}")
    if array.shape[2] not in (in_chans, 1, 3) and array.shape[0] in (in_chans, 1, 3):
        array = array.transpose(1, 2, 0)
    pixels = torch.from_numpy(np.array(to_uint8(array), order="C"))  # (H, W, C), our own memory
    return match_channels(pixels.permute(2, 0, 1), in_chans)


def match_channels(image: torch.Tensor, in_chans: int) -> torch.Tensor:
    """uint8 `(C, H, W)` to `(in_chans, H, W)`: as it is, gray repeated to 3, or RGB to PIL's luma."""
    channels = len(image)
    if channels == in_chans:
        return image
    if channels == 1 and in_chans == 3:
        return image.expand(3, -1, -1)
    if channels == 3 and in_chans == 1:
        red, green, blue = image.int()
        luma = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16  # PIL's fixed point
        return luma.to(torch.uint8)[None]
    shape = " x ".join(map(str, image.shape))
    raise UnfitImage(f"it has {channels} channels ({shape}) and --in_chans is {in_chans}")


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Scale an array to 8 bits by its type, so that images of one kind are all scaled alike.

    Unsigned 16-bit: 0..65535 to 0..255. Float: 0..1 to 0..255; up to 255, rounded. Other integers:
    up to 255 as they are, up to 65535 as 16-bit (older Pillow opens 16-bit files so). What is
    negative or larger has no natural range: the image's own minimum and maximum become 0 and 255.
    """
    kind, size = array.dtype.kind, array.dtype.itemsize
    if array.dtype == np.uint8:
        return array
    if kind == "b":
        return array.astype(np.uint8) * 255
    if kind == "u" and size == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if kind not in "iuf":
        raise UnfitImage(f"its values have the type {array.dtype}, which is no image")
    values = np.nan_to_num(array.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if low < 0 or high > (255 if kind == "f" else 65535):
        values = (values - low) * (255 / max(high - low, 1e-12))
    elif kind == "f" and high <= 1:
        values = values * 255
    elif high > 255:
        values = values / 257
    return np.rint(values).astype(np.uint8)
