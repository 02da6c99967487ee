"""Annotations of Places205 and iNaturalist 2018 as they are distributed: which images, and their classes.

iNaturalist: train2018.json and val2018.json in COCO's format, beside train_val2018/. Places205:
train_places205.csv and val_places205.csv, a path and a number a line without a header, for the images in
data/vision/torralba/deeplearning/images256/.
"""

import json
import os

# Files by split, the folders that they may lie in, and those that their paths may begin in: relative to
# the folder that was unpacked into.
KNOWN = (
    ({"train": "train2018.json", "val": "val2018.json"}, ("",), ("",)),
    (
        {"train": "train_places205.csv", "val": "val_places205.csv"},
        ("", "trainvalsplit_places205"),
        ("data/vision/torralba/deeplearning/images256", "images256", ""),
    ),
)


def find_annotations(folder: str, split: str, flag: str) -> tuple[str, str] | None:
    """The file of annotations of a split in a folder, and the folder that its paths begin in, or None.

    Raises FileNotFoundError, naming `flag`, for a folder that has those of another split alone.
    """
    for names, places, roots in KNOWN:
        for place in places:
            paths = {name: os.path.join(folder, place, file) for name, file in names.items()}
            there = [name for name, path in paths.items() if os.path.isfile(path)]
            if not there:
                continue
            if split not in there:
                wanted = names.get(split, f"annotations of {split}")
                raise FileNotFoundError(
                    f"{flag} {folder} has {names[there[0]]}, but no {wanted} beside it"
                )
            root = next(r for r in roots if not r or os.path.isdir(os.path.join(folder, r)))
            return paths[split], os.path.join(folder, root)
    return None


def read_coco(path: str, flag: str) -> dict[str, list[str]]:
    """Columns `path` and, where each image has one annotation, `label`, of a JSON in COCO's format.

    Classes are called by the names of the categories, or by their numbers where two have the same name.
    Raises ValueError, naming `flag`.
    """
    try:
        with open(path, encoding="utf-8") as file:
            contents = json.load(file)
        names = {image["id"]: image["file_name"] for image in contents["images"]}
        categories = {x["id"]: str(x["name"]) for x in contents.get("categories", [])}
        labels = {x["image_id"]: x["category_id"] for x in contents.get("annotations", [])}
        num_annotations = len(contents.get("annotations", []))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{flag} {path} is no list of images in COCO's format, with images, annotations and "
            f"categories: {type(error).__name__} {error}"
        ) from None
    if labels.keys() != names.keys() or num_annotations != len(labels):
        return {"path": list(names.values())}
    by_name = len(set(categories.values())) == len(categories) and categories.keys() >= set(
        labels.values()
    )
    called = categories if by_name else {number: str(number) for number in labels.values()}
    return {"path": list(names.values()), "label": [called[labels[image]] for image in names]}
