import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from src.data import images
from src.data.folders import has_image, list_images
from src.data.images import BrokenImage, UnfitImage, decode_image, match_channels, to_uint8

GRADIENT = np.linspace(0, 255, 24 * 32).reshape(24, 32).astype(np.uint8)
COLOUR = np.stack([GRADIENT, GRADIENT[::-1], 255 - GRADIENT], axis=-1)  # (24, 32, 3)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pil_pixels(data, mode="RGB"):
    """What PIL makes of the bytes, (H, W, 3) or (H, W)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


def pixels(tensor):
    assert tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"quality": 90}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 2}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
def test_jpeg_decodes_to_pils_pixels(mode, options):
    noise = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((151, 77)).convert(mode)
    data = encode(smooth, "JPEG", **options)
    colour = pixels(decode_image(data, 3)).astype(int) - pil_pixels(data)
    assert np.abs(colour).max() <= 1  # 0 with the libjpeg-turbo of today's wheels
    gray = pixels(decode_image(data, 1))[..., 0].astype(int) - pil_pixels(data, "L")
    assert np.abs(gray).mean() < 0.2  # the file's own luma; PIL's comes from clipped RGB


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WebP", "GIF", "PPM"])
def test_other_formats_decode_to_pils_pixels(kind):
    data = encode(Image.fromarray(COLOUR), kind)
    assert np.array_equal(pixels(decode_image(data, 3)), pil_pixels(data))
    assert np.array_equal(pixels(decode_image(data, 1))[..., 0], pil_pixels(data, "L"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb_or_gray(mode):
    data = encode(Image.fromarray(COLOUR).convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(pixels(decode_image(data, 3)), pil_pixels(data))
    assert decode_image(data, 1).shape == (1, 24, 32)


@pytest.mark.filterwarnings("error")  # PIL warns of the direct way, for every file
def test_palette_with_transparency_keeps_its_colours():
    image = Image.fromarray(COLOUR).convert("P")
    data = encode(image, "PNG", transparency=bytes(range(256)))
    assert np.array_equal(pixels(decode_image(data, 3)), np.asarray(image.convert("RGB")))


def test_first_frame_of_a_gif_counts():
    frames = [Image.new("L", (6, 5), value) for value in (10, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(data, 3) == 10).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_is_scaled_and_not_clipped(kind):
    deep = GRADIENT.astype(np.uint16) * 257 + 3
    deep[0, 0], deep[-1, -1] = 0, 65535
    image = pixels(decode_image(encode(Image.fromarray(deep), kind), 3))
    assert np.abs(image.astype(int) - GRADIENT[..., None]).max() <= 1
    assert image.min() == 0 and image.max() == 255 and len(np.unique(image)) > 200
    assert decode_image(encode(Image.fromarray(deep), kind), 1).shape == (1, 24, 32)


def test_big_endian_16_bit_tiff_is_read_in_its_byte_order():
    rows = np.array([[0, 257, 65535]], dtype=">u2")
    tags = [
        (256, 3),
        (257, 1),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, 6),
    ]
    body = struct.pack(">2sHI", b"MM", 42, 16) + rows.tobytes() + b"\0\0"
    body += struct.pack(">H", len(tags))
    for tag, value in tags:
        body += struct.pack(">HHIHH", tag, 3, 1, value, 0)
    data = body + struct.pack(">I", 0)
    assert decode_image(data, 1).flatten().tolist() == [0, 1, 255]


def test_float_tiff_is_scaled_by_its_range():
    unit = encode(Image.fromarray((GRADIENT / 255).astype(np.float32)), "TIFF")
    eight_bit = encode(Image.fromarray(GRADIENT.astype(np.float32)), "TIFF")
    assert np.array_equal(pixels(decode_image(unit, 1))[..., 0], GRADIENT)
    assert np.array_equal(pixels(decode_image(eight_bit, 1))[..., 0], GRADIENT)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 128, 129, 257, 65535], np.uint16), [0, 0, 1, 1, 255]),
        (np.array([0, 20, 255], np.int64), [0, 20, 255]),
        (np.array([0, 257, 65535], np.int32), [0, 1, 255]),
        (np.array([-1000, 0, 1000], np.int16), [0, 128, 255]),
        (np.array([0.0, 0.5, 1.0]), [0, 128, 255]),
        (np.array([0.0, 99.6, 200.0]), [0, 100, 200]),
        (np.array([0.0, np.nan, np.inf, 1.0]), [0, 0, 0, 255]),
        (np.array([7.0, 7.0]) * 1e6, [0, 0]),
        (np.array([False, True]), [0, 255]),
    ],
)
def test_ranges_are_scaled_to_8_bits(values, expected):
    assert np.abs(to_uint8(values).astype(int) - expected).max() <= (values.min() < 0)


def test_orientation_in_exif_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = encode(Image.fromarray(COLOUR), "JPEG", exif=exif)
    assert decode_image(data, 3).shape == (3, 24, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(range(200)), b"nonsense"]
)
def test_broken_exif_does_no_harm(kind, exif):
    data = encode(Image.fromarray(COLOUR), kind, exif=exif)
    for in_chans in (1, 3):
        assert decode_image(data, in_chans).shape == (in_chans, 24, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WebP"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_truncated_file_is_broken(kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    with pytest.raises(BrokenImage):
        decode_image(data[: int(len(data) * share)], 3)


def test_random_damage_never_raises_anything_else():
    generator = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "TIFF", "GIF", "BMP", "WebP"):
        whole = encode(Image.fromarray(COLOUR), kind)
        for _ in range(60):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), 8):
                data[place] = generator.integers(0, 256)
            try:
                decode_image(bytes(data), 3)
            except BrokenImage:
                pass


@pytest.mark.parametrize("layout", [(24, 32, 5), (5, 24, 32)])
def test_arrays_of_any_channel_count(layout):
    array = np.random.default_rng(0).integers(0, 256, layout, dtype=np.uint8)
    buffer = io.BytesIO()
    np.save(buffer, array)
    image = decode_image(buffer.getvalue(), 5)
    channels_last = array if layout[-1] == 5 else array.transpose(1, 2, 0)
    assert np.array_equal(pixels(image), channels_last)
    with pytest.raises(UnfitImage, match="5.*--in_chans is 3"):
        decode_image(buffer.getvalue(), 3)


def test_bands_of_a_file_are_kept_where_the_count_fits():
    rgba = np.dstack([COLOUR, GRADIENT])
    for kind in ("PNG", "TIFF"):
        data = encode(Image.fromarray(rgba), kind)
        assert np.array_equal(pixels(decode_image(data, 4)), rgba)
    with pytest.raises(UnfitImage, match="--in_chans"):
        decode_image(encode(Image.fromarray(COLOUR), "PNG"), 4)


def test_pickled_arrays_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([object()]), allow_pickle=True)
    with pytest.raises(BrokenImage):
        decode_image(buffer.getvalue(), 3)


def test_luma_is_pils():
    rgb = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8))
    expected = np.asarray(Image.fromarray(rgb.numpy()).convert("L"))
    assert np.array_equal(match_channels(rgb.permute(2, 0, 1), 1)[0].numpy(), expected)


def test_listing_is_sorted_recursive_and_without_hidden_files(tmp_path):
    for name in (
        "b/2.JPEG",
        "b/c/3.png",
        "a.jpg",
        ".hidden.jpg",
        ".cache/x.jpg",
        "b/._2.jpg",
        "t.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path, tmp_path / "b" / "up")  # leads back: not followed for ever
    os.symlink(tmp_path / "b" / "c", tmp_path / "linked")
    assert list_images(str(tmp_path)) == ["a.jpg", "b/2.JPEG", "b/c/3.png"]
    (tmp_path / "none").mkdir()
    assert has_image(tmp_path / "b") and not has_image(tmp_path / "none")


# ============ files that claim more than they are ============


def test_an_array_that_claims_more_than_its_file_holds_is_broken():
    header = {"descr": "|u1", "fortran_order": False, "shape": (100_000, 100_000, 3)}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    with pytest.raises(BrokenImage, match="claims to be"):
        decode_image(buffer.getvalue() + bytes(100), 3)


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_in_any_order_of_memory_is_read(order):
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(COLOUR, order=order))
    assert np.array_equal(pixels(decode_image(buffer.getvalue(), 3)), COLOUR)


@pytest.fixture
def small_limits(monkeypatch):
    """Limits as they are, divided by 89,478,485 / 100."""
    monkeypatch.setattr(images, "PILLOW_LIMIT", 100)
    monkeypatch.setattr(images, "JPEG_PIXELS", 100)
    monkeypatch.setattr(images, "MAX_PIXELS", 400)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF"])
def test_an_image_within_four_times_pillows_limit_is_used_without_a_warning(small_limits, kind):
    data = encode(Image.new("L", (20, 19), 7), kind)
    assert decode_image(data, 3).shape == (3, 19, 20)
    assert Image.MAX_IMAGE_PIXELS == 100  # for whoever else uses Pillow


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_an_image_beyond_four_times_pillows_limit_is_broken(small_limits, in_chans):
    with pytest.raises(BrokenImage, match="unfold to 30 x 20 pixels"):
        decode_image(encode(Image.new("L", (30, 20)), "PNG"), in_chans)


def test_a_small_file_of_gigapixels_is_refused_before_it_is_decoded():
    data = bytearray(encode(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(BrokenImage, match="bytes that unfold to 60000 x 60000 pixels"):
        decode_image(bytes(data), 3)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("side", "decoded"), [(10, 10), (20, 10), (24, 6), (90, 12)])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(small_limits, side, decoded, in_chans):
    data = encode(Image.new("RGB", (side, side), (9, 9, 9)), "JPEG")
    image = decode_image(data, in_chans)
    assert image.shape == (in_chans, decoded, decoded) and (image == 9).all()


@pytest.mark.parametrize("progressive", [False, True])
def test_the_size_of_a_jpeg_is_read_from_its_header(progressive):
    noise = Image.fromarray(COLOUR).resize((151, 77))
    exif = Image.Exif()
    exif[0x010E] = "words " * 100
    data = encode(noise, "JPEG", progressive=progressive, exif=exif, comment=b"more")
    assert images._jpeg_size(data) == (77, 151)
    assert images._jpeg_size(data[:300]) == images._jpeg_size(b"\xff\xd8") == (0, 0)
