"""Coloured shapes on noise as small sets for detection, in the formats of PASCAL VOC and COCO."""

import json

import numpy as np
from PIL import Image, ImageDraw

VOC_NAMES = ("aeroplane", "bicycle", "bird")  # circle, square, triangle
COCO_CATEGORIES = {3: "circle", 7: "square", 9: "triangle"}  # numbers with gaps, as COCO's
COLOURS = ((230, 60, 60), (60, 220, 60), (70, 90, 250))


def draw_image(rng, size, most=3):
    """An image of noise with 1 to `most` shapes: (PIL image, [(kind, polygon (k, 2))]), which do not touch.

    size: width, height in pixels.
    """
    width, height = size
    image = Image.fromarray(rng.integers(0, 90, (height, width, 3), dtype=np.uint8))
    draw, shapes, boxes = ImageDraw.Draw(image), [], []
    for _ in range(int(rng.integers(1, most + 1))):
        side = int(rng.integers(min(size) // 4, min(size) // 2))
        x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        if any(
            x < b[0] + b[2] + 2
            and b[0] < x + side + 2
            and y < b[1] + b[2] + 2
            and b[1] < y + side + 2
            for b in boxes
        ):
            continue
        kind = int(rng.integers(3))
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        polygon = (
            np.stack([0.5 + 0.5 * np.cos(angles), 0.5 + 0.5 * np.sin(angles)], 1),
            np.array([[0, 0], [1, 0], [1, 1], [0, 1]]),
            np.array([[0.5, 0], [1, 1], [0, 1]]),
        )[kind]
        polygon = polygon * side + np.array([x, y])
        colour = tuple(int(c) for c in np.array(COLOURS[kind]) + rng.integers(-25, 26, 3))
        draw.polygon([tuple(corner) for corner in polygon], fill=colour)
        shapes.append((kind, polygon))
        boxes.append((x, y, side))
    return image, shapes


def box_of(polygon):
    """x1, y1, x2, y2."""
    return [*polygon.min(0).tolist(), *polygon.max(0).tolist()]


def write_voc(folder, counts, size=(72, 64), seed=0, difficult=()):
    """A VOCdevkit; counts: images by split, such as {"2007_trainval": 20}.

    difficult: (split, image, object) by number. Returns {split: [(name, [(kind, box counted from 1)])]}.
    """
    rng, written = np.random.default_rng(seed), {}
    for split, count in counts.items():
        year, name = split.split("_")
        root = folder / f"VOC{year}"
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / part).mkdir(parents=True, exist_ok=True)
        written[split] = []
        for number in range(count):
            image, shapes = draw_image(rng, size)
            stem = f"{year}_{name}_{number:05}"
            image.save(root / "JPEGImages" / f"{stem}.jpg", quality=95)
            objects = []
            for place, (kind, polygon) in enumerate(shapes):
                x1, y1, x2, y2 = (round(x) for x in box_of(polygon))
                is_difficult = int((split, number, place) in difficult)
                corners = (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2))
                box = "".join(f"<{corner}>{x}</{corner}>" for corner, x in corners)
                objects.append(
                    f"<object><name>{VOC_NAMES[kind]}</name><difficult>{is_difficult}</difficult>"
                    f"<bndbox>{box}</bndbox></object>"
                )
            text = f"<annotation>{''.join(objects)}</annotation>"
            (root / "Annotations" / f"{stem}.xml").write_text(text)
            boxes = [[round(x) for x in box_of(polygon)] for _, polygon in shapes]
            kinds = [kind for kind, _ in shapes]
            written[split].append((stem, list(zip(kinds, boxes, strict=True))))
        names = "".join(f"{stem}\n" for stem, _ in written[split])
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(names)
    return written


def write_coco(folder, counts, size=(72, 64), seed=0, crowd=()):
    """A folder of COCO; counts: images by split, such as {"train2017": 20}. The last image has no object.

    crowd: (split, image, object) by number, which become crowds given by runs of pixels. Returns the
    contents of the files by split.
    """
    rng, written = np.random.default_rng(seed), {}
    (folder / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        (folder / split).mkdir()
        images, annotations = [], []
        for number in range(count):
            image, shapes = draw_image(rng, size)
            file, image_id = f"{number:012}.jpg", 1000 + 7 * number
            image.save(folder / split / file, quality=95)
            width, height = size
            images.append({"id": image_id, "file_name": file, "width": width, "height": height})
            if number == count - 1:
                shapes = []
            for place, (kind, polygon) in enumerate(shapes):
                x1, y1, x2, y2 = box_of(polygon)
                is_crowd = (split, number, place) in crowd
                segment = [polygon.ravel().tolist()]
                if is_crowd:
                    mask = np.zeros((height, width), bool)
                    mask[round(y1) : round(y2), round(x1) : round(x2)] = True
                    segment = {"size": [height, width], "counts": runs_of(mask)}
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": list(COCO_CATEGORIES)[kind],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": int(is_crowd),
                        "segmentation": segment,
                    }
                )
        categories = [{"id": number, "name": name} for number, name in COCO_CATEGORIES.items()]
        contents = {"images": images, "annotations": annotations, "categories": categories}
        written[split] = contents
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(contents))
    return written


def runs_of(mask):
    """Lengths of runs of zeros and ones, in turn, by columns: COCO's plain runs of pixels."""
    pixels = mask.ravel(order="F").astype(int)
    changes = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff(np.concatenate([[0], changes, [len(pixels)]])).tolist()
    return runs if pixels[0] == 0 else [0, *runs]
