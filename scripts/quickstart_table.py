"""The end of the quickstart: a small table from a run's eval_knn.json, and where the pictures are."""

import json
import sys
from pathlib import Path

NAMES = {"backbone": "SwAV", "untrained backbone": "untrained network", "raw pixels": "raw pixels"}


def main(folder: Path) -> None:
    rows = json.loads((folder / "eval_knn.json").read_text())["results"]
    print("\nk-NN on scikit-learn's digits, top-1 %, 500 images to classify")
    print(f"{'':20}{'5 a class':>12}{'all labels':>12}")
    for name in dict.fromkeys(row["features"] for row in rows):
        rows_of_name = [row for row in rows if row["features"] == name]
        few = next(row["top1"] for row in rows_of_name if row["labels"] == 5 and row["k"] == 5)
        full = next(
            row["top1"] for row in rows_of_name if row["labels"] == "all" and row["k"] == 10
        )
        print(f"{NAMES.get(name, name):20}{few:12.1f}{full:12.1f}")
    print()
    for path in sorted((folder / "plots").glob("*.png")):
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
