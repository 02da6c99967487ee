"""Draw docs/crops_photographs.png: what SwAV is trained on, shown on two photographs.

    python scripts/readme_picture.py

Each row has a photograph of scikit-learn with the windows of its crops, and beside it the crops as the
network sees them: cut out, resized, and changed in colour by the code that the training scripts run,
with the sizes, scales and strengths of the SwAV paper. A frame has the colour of its window.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from sklearn.datasets import load_sample_images  # noqa: E402

from src.data.augment import Augment  # noqa: E402
from src.data.datasets import open_dataset  # noqa: E402
from src.data.multicrop import MultiCropDataset, collate_crops, generator  # noqa: E402
from src.pictures.crops import crop_windows  # noqa: E402
from src.pictures.sheets import to_uint8  # noqa: E402

NUM_GLOBAL, NUM_LOCAL, LOCAL_ROWS = 2, 6, 2

# ============ sizes of the picture, in pixels ============
HEIGHT = 272  # of a photograph and of a global crop
LOCAL = 130  # side of a local crop: two of them and a gap are as high as a photograph
GAP = 12  # between crops
COLUMN_GAP = 28  # between photograph, global crops and local crops
MARGIN = 16
HEADER = 42
LETTERS = 20
FRAME = 4

PAPER, INK = (255, 255, 255), (40, 40, 40)
# The global crops come first. All are told apart on both photographs.
COLOURS = [
    (0, 90, 220),
    (255, 120, 0),
    (0, 190, 170),
    (230, 30, 100),
    (250, 205, 0),
    (150, 60, 220),
    (90, 200, 30),
    (90, 200, 255),
]


def main(seed: int, path: Path) -> None:
    """Draw the picture. seed: of windows and colours; path: of the PNG file."""
    photographs = open_dataset(Path(load_sample_images().filenames[0]).parent)
    crops_of = MultiCropDataset(
        photographs,
        num_crops=[NUM_GLOBAL, NUM_LOCAL],
        size_crops=[224, 96],
        min_scale_crops=[0.14, 0.05],
        max_scale_crops=[1.0, 0.14],
        seed=seed,
    )
    batch, _ = collate_crops([crops_of[i] for i in range(len(photographs))])
    augment = Augment(photographs.mean, photographs.std)
    views = augment(batch, generator(seed))  # one (B, 3, S, S) for each crop
    views = [to_uint8(view, augment.mean, augment.std) for view in views]

    width = HEIGHT * 640 // 427
    columns = [MARGIN]  # left edges of the three parts
    columns.append(columns[0] + width + COLUMN_GAP)
    columns.append(columns[1] + NUM_GLOBAL * (HEIGHT + GAP) - GAP + COLUMN_GAP)
    in_a_row = NUM_LOCAL // LOCAL_ROWS
    right = columns[2] + in_a_row * (LOCAL + GAP) - GAP + MARGIN
    bottom = HEADER + len(photographs) * (HEIGHT + MARGIN)
    page = Image.new("RGB", (right, bottom), PAPER)

    font = ImageFont.truetype(
        Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", LETTERS
    )
    headers = ["Photograph with the windows", "2 global crops of 224 px", "6 local crops of 96 px"]
    for left, header in zip(columns, headers, strict=True):
        ImageDraw.Draw(page).text((left, HEADER - 10), header, INK, font, anchor="ls")

    for i in range(len(photographs)):
        top = HEADER + i * (HEIGHT + MARGIN)
        image = photographs.load(i)  # (3, H, W)
        windows = crop_windows(crops_of, 0, i, *image.shape[1:])
        page.paste(with_windows(image, windows, width), (columns[0], top))
        for k, view in enumerate(views):
            if k < NUM_GLOBAL:
                side, place = HEIGHT, (columns[1] + k * (HEIGHT + GAP), top)
            else:
                row, column = divmod(k - NUM_GLOBAL, in_a_row)
                side = LOCAL
                place = (columns[2] + column * (LOCAL + GAP), top + row * (LOCAL + GAP))
            page.paste(framed(view[i], side, COLOURS[k]), place)

    path.parent.mkdir(parents=True, exist_ok=True)
    few_colours(page).save(path, optimize=True)


def few_colours(page: Image.Image) -> Image.Image:
    """The page in 256 colours, dithered, which keeps the file below 400 KB; frames stay what they are."""
    exact = [PAPER, INK, *COLOURS]
    colours = page.quantize(colors=256 - len(exact), kmeans=4).getpalette()
    colours = colours[: 3 * (256 - len(exact))] + [value for colour in exact for value in colour]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours)
    return page.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def picture_of(image: torch.Tensor) -> Image.Image:
    """uint8 (3, H, W) -> PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def with_windows(image: torch.Tensor, windows: list, width: int) -> Image.Image:
    """The photograph at `width` x HEIGHT with the outlines of `windows` (top, left, height, width)."""
    picture = picture_of(image).resize((width, HEIGHT), Image.Resampling.LANCZOS)
    canvas, scale = ImageDraw.Draw(picture), width / image.shape[2]
    for k, window in enumerate(windows):
        top, left, height, length = (round(scale * x) for x in window)
        box = [left, top, min(left + length, width) - 1, min(top + height, HEIGHT) - 1]
        canvas.rectangle(box, outline=COLOURS[k], width=4 if k < NUM_GLOBAL else 3)
    return picture


def framed(view: torch.Tensor, side: int, colour: tuple[int, int, int]) -> Image.Image:
    """A crop, uint8 (3, S, S), at `side` x `side` with a frame around its pixels."""
    inner = side - 2 * FRAME
    picture = Image.new("RGB", (side, side), colour)
    picture.paste(picture_of(view).resize((inner, inner), Image.Resampling.LANCZOS), (FRAME, FRAME))
    return picture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=327, help="of windows and colours (default: 327)"
    )
    parser.add_argument("--path", type=Path, default=ROOT / "docs" / "crops_photographs.png")
    args = parser.parse_args()
    main(args.seed, args.path)
