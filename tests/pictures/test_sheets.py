"""src.pictures.sheets and the sheets of it: headers, names, sizes, scales, and pixels that stay whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.datasets import open_dataset
from src.pictures import crops, neighbours, sheets
from src.pictures.sheets import Group, Header, Row, Scale, Tile

BLACK = Image.new("RGB", (40, 30))


def pixels(sheet, box):
    left, top, right, bottom = box
    return np.asarray(sheet.image)[top:bottom, left:right]


def inked(sheet, bottom):
    """How many pixels above `bottom` are not paper."""
    return int((np.asarray(sheet.image)[:bottom] != sheets.PAPER).any(2).sum())


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in {"a wide one.png": (60, 200, 3), "b\n\x1b.png": (300, 100, 3)}.items():
        pixels = rng.integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return open_dataset(str(tmp_path))


# ============ headers ============
def test_a_header_makes_the_sheet_taller_and_is_not_blank():
    rows = [Row([[Tile(BLACK)]])]
    plain = sheets.draw_sheet(Header(""), [Group("")], rows)
    header = Header("A title", ["what is shown", "of which run"], [("red: wrong", (255, 0, 0))])
    titled = sheets.draw_sheet(header, [Group("")], rows)
    top = titled.boxes[0][0][0][1]
    assert titled.image.height > plain.image.height and top > plain.boxes[0][0][0][1]
    assert inked(titled, top) > 300 and inked(plain, plain.boxes[0][0][0][1]) == 0
    assert (np.asarray(titled.image)[:top] == (255, 0, 0)).all(2).any()


def test_the_columns_have_names_and_no_name_is_cut():
    name = "a name that is much wider than the only image below it"
    sheet = sheets.draw_sheet(Header("x"), [Group(name), Group("y")], [Row([[Tile(BLACK)]] * 2)])
    (left, _, _, _), (right, top, _, _) = (boxes[0] for boxes in sheet.boxes[0])
    assert right - left > sheets.font_of(14).getlength(name)
    names = np.asarray(sheet.image)[top - 28 : top - 4, right:]
    assert (names != sheets.PAPER).any() and sheet.image.width > right + 40


def test_a_long_title_is_wrapped_and_stays_on_the_sheet():
    title = " ".join(["words"] * 40)
    one, many = (
        sheets.draw_sheet(Header(x), [Group("")], [Row([[Tile(BLACK)]])]) for x in ("words", title)
    )
    assert many.image.height > one.image.height + 40
    margin = np.asarray(many.image)[:, -sheets.MARGIN + 4 :]
    assert (
        margin == sheets.PAPER
    ).all() and many.image.width <= sheets.LEAST_TEXT + 2 * sheets.MARGIN


def test_a_scale_shows_its_colours_from_the_lowest_to_the_highest():
    colours = np.array([[0, 0, 200], [200, 0, 0]], np.uint8)
    header = Header("x", scale=Scale(colours, "0", "0.5"))
    sheet = sheets.draw_sheet(header, [Group("")], [Row([[Tile(BLACK)]])])
    array = np.asarray(sheet.image)[: sheet.boxes[0][0][0][1]]
    blue, red = ((array == colour).all(2).any(0).nonzero()[0] for colour in colours)
    assert 0 < blue.max() < red.min()


# ============ names ============
def test_a_name_is_cut_in_the_middle_to_the_width_of_its_image():
    font, name = sheets.font_of(12), "IMG_2024-07-15_holidays_0042.jpg"
    short = sheets.cut(name, font, 110)
    assert font.getlength(short) <= 110 and sheets.ELLIPSIS in short
    begin, end = short.split(sheets.ELLIPSIS)
    assert name.startswith(begin) and name.endswith(end) and end.endswith(".jpg")
    assert len(short) > 10 and sheets.cut(name, font, 1000) == name


def test_what_cannot_be_drawn_is_escaped():
    font = sheets.font_of(12)
    assert sheets.drawable("a\nb\x1b[2J\udcff", font) == "a\\nb\\x1b[2J\\xff"
    assert sheets.drawable("\u4e2d.jpg", font) == "\\u4e2d.jpg"  # a letter that the font lacks
    assert sheets.drawable("caf\u00e9", font) == "caf\u00e9"


def test_a_name_stays_below_its_image():
    tiles = [Tile(BLACK, ["a name that is far too long for it.png"]), Tile(BLACK)]
    sheet = sheets.draw_sheet(Header("x"), [Group("")], [Row([tiles])])
    (left, _, right, bottom), (other, _, _, _) = sheet.boxes[0][0]
    below = (np.asarray(sheet.image)[bottom:] != sheets.PAPER).any(2).any(0).nonzero()[0]
    assert left <= below.min() and below.max() < right < other


# ============ images ============
def test_an_image_has_its_own_resolution_up_to_a_limit_and_its_shape():
    image = torch.randint(0, 256, (3, 60, 200), dtype=torch.uint8)
    assert np.array_equal(np.asarray(sheets.to_picture(image)), image.permute(1, 2, 0).numpy())
    assert sheets.to_picture(image, (500, 500)).size == (200, 60)
    assert sheets.to_picture(image, (100, 100)).size == (100, 30)
    assert sheets.to_picture(image, (500, 30)).size == (100, 30)
    assert sheets.to_picture(image[:1]).getpixel((3, 5)) == (int(image[0, 5, 3]),) * 3


def test_small_images_are_enlarged_by_one_whole_factor():
    tiny = [Image.new("RGB", size) for size in ((8, 8), (3, 5))]
    assert sheets.factor_for(tiny, 72) == 9 and sheets.enlarge(tiny[1], 9).size == (27, 45)
    assert sheets.factor_for([Image.new("RGB", (100, 20))], 72) == 1


def test_a_frame_lies_around_an_image_and_hides_none_of_it():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    sheet = sheets.draw_sheet(
        Header("x"), [Group("")], [Row([[Tile(picture, ["a"], (255, 0, 0))]])]
    )
    left, top, right, bottom = sheet.boxes[0][0][0]
    assert np.array_equal(pixels(sheet, (left, top, right, bottom)), np.asarray(picture))
    around = np.asarray(sheet.image)[top - 3 : bottom + 3, left - 3 : right + 3]
    assert (around[:3] == (255, 0, 0)).all() and (around[:, :3] == (255, 0, 0)).all()


def test_normalisation_is_undone_for_pictures():
    image = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    m, s = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    assert torch.equal(sheets.to_uint8((image / 255 - m) / s, mean, std), image)


# ============ crops ============
def test_the_crops_of_a_batch_stand_beside_their_images(photographs, tmp_path, drawn):
    views = [
        torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
        for size in (96, 96, 48, 48, 48)
    ]
    crops.draw_batch(photographs, [1, 0], views, tmp_path / "plots" / "crops.png", "First crops")
    sheet = drawn["crops.png"]
    assert [list(map(len, boxes)) for boxes in sheet.boxes] == [[1, 2, 3]] * 2
    for i, (original, large, small) in enumerate(sheet.boxes):
        for view, box in zip(views, [*large, *small], strict=True):
            tile = pixels(sheet, box)[::2, ::2]  # 96 pixels are enlarged to 192
            assert np.array_equal(tile, view[i].permute(1, 2, 0).numpy())
        left, top, right, bottom = original[0]
        assert (right - left, bottom - top) == [(64, 192), (200, 60)][
            i
        ]  # shrunk to 192, or its own
    # Two lines of small crops are about as high as a large one.
    assert sheet.boxes[0][2][2][1] > sheet.boxes[0][2][1][3]
    with Image.open(tmp_path / "plots" / "crops.png") as picture:
        assert picture.size == sheet.image.size


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_picture_that_is_cut_short_leaves_the_one_that_was_there(
    photographs, tmp_path, monkeypatch, error
):
    def cut_short(image, path, **options):
        Path(path).write_bytes(b"half")
        raise error

    views = [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
    path = crops.draw_batch(photographs, [0, 1], views, tmp_path / "plots" / "crops.png", "x")
    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", cut_short)
    with pytest.raises(type(error)):
        crops.draw_batch(photographs, [0, 1], views, path, "x")
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


# ============ neighbours ============
def test_neighbours_are_framed_by_whether_they_are_right_and_named(photographs, tmp_path, drawn):
    photographs.labels, photographs.classes = torch.tensor([0, 1]), ["cat", "dog"]
    features = torch.eye(2)
    split = [features, photographs.labels, features[:1], torch.tensor([0])]
    neighbours.draw_neighbours(split, photographs, photographs, tmp_path, "features of x", k=2)
    assert (tmp_path / "plots" / "neighbours.png").is_file()
    sheet = drawn["neighbours.png"]
    (query, (right, wrong)) = sheet.boxes[0]
    array = np.asarray(sheet.image)
    assert (array[right[1] - 1, right[0] - 1] == neighbours.RIGHT).all()
    assert (array[wrong[1] - 1, wrong[0] - 1] == neighbours.WRONG).all()
    assert (array[query[0][1] - 1, query[0][0] - 1] == sheets.PAPER).all()
    assert [b - a for a, b in zip(right[:2], right[2:], strict=True)] == [160, 48]  # 200 x 60
    tile = neighbours._tile(photographs, 1, "dog", None, 0.5)
    assert sheets.drawable(tile.captions[0], sheets.font_of(12)) == "b\\n\\x1b.png"
    assert tile.captions[1] == "dog, 0.50"
