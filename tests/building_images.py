"""Small sets of buildings in the layouts of Oxford and Paris: what tests of image retrieval share."""

import pickle

import numpy as np
from PIL import Image

# Of 12 images, number i is of building i % 3, of a colour of its own, with noise.
COLOURS = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200)])
NAMES = [f"place_{number:06}" for number in range(12)]


def write_images(folder, names, seed=0):
    """JPEG images of noise, each in the colour of its building, of two shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(seed)
    for number, name in enumerate(names):
        shape = (24, 32) if number % 2 else (30, 24)
        pixels = COLOURS[number % 3] + draws.integers(-50, 50, (*shape, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
            folder / f"{name}.jpg", quality=95
        )


def ground_truth():
    """A query of each building: 3 is easy of building 0, and so on; 9 to 11 are hard, 6 to 8 junk."""
    queries = [
        {
            "bbx": np.array([2.0, 3.0, 20.0, 21.0]),
            "easy": np.array([building, building + 3]),
            "hard": np.array([building + 9]),
            "junk": np.array([building + 6]),
        }
        for building in range(3)
    ]
    queries_of = [f"query_{building}" for building in range(3)]
    return {"gnd": queries, "imlist": NAMES, "qimlist": queries_of}


def write_revisited(folder, name="roxford5k", truth=None):
    """<folder>/<name>/ with the ground truth and jpg/; returns folder."""
    truth = truth or ground_truth()
    write_images(folder / name / "jpg", truth["imlist"])
    write_images(folder / name / "jpg", truth["qimlist"], seed=1)
    (folder / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    return folder


def write_buildings(folder, prefix="oxc1_", seed=0):
    """A folder of the first sets: lab/ and jpg/. place_000000 asks for building 0, and so on."""
    write_images(folder / "jpg", NAMES, seed)
    (folder / "lab").mkdir()
    for building in range(3):
        start = folder / "lab" / f"place_{building + 1}"
        lists = {"good": [0, 3], "ok": [9], "junk": [6]}
        for kind, numbers in lists.items():
            names = [NAMES[building + number] for number in numbers]
            start.with_name(f"{start.name}_{kind}.txt").write_text("\n".join(names) + "\n")
        line = f"{prefix}{NAMES[building]} 2.0 3.0 20.5 21.0\n"
        start.with_name(f"{start.name}_query.txt").write_text(line)
    return folder
