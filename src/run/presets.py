"""Presets: the defaults that a kind of data asks for, and how --preset auto chooses one.

imagenet is what the parsers say themselves, the published values. The others were found by trials on
two CPU cores; photos is made for the number of images and the machine. What methods share is here; each
script adds its own. A flag on the command line wins over all.
"""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import dist
from ..data.datasets import NAMES, ImageDataset
from ..data.images import BrokenImage, UnfitImage
from ..data.loading import num_cores

PRESET_OF = {**dict.fromkeys(NAMES, "cifar"), "digits": "tiny"}
MADE_FOR_IMAGES = ("photos", "continue")  # presets that are functions of the situation
MANY_IMAGES = 300_000  # from here on the published values are tried and fit
SMALL_SIDE = 40  # pixels; images up to it are like CIFAR's
SAMPLE = 32  # images whose sizes are looked at
# Images in all that photos shows, on a CPU to a network of its own, and to another, ten times as slow.
SHOWN_ON_CPU, SHOWN_TO_GIVEN, SHOWN_ON_GPU = 60_000, 6_000, 3_000_000
# Megapixels of a JPEG that one core decodes while it trains on an image, with the network of photos.
DECODED_AS_LONG = 0.8
COPY_SIDE, COPY_MEGAPIXELS = 512, 0.35  # shorter side in pixels, and size, of a photograph of 4:3
NARROW = 0.25  # --width of photos on a CPU
FOR_EVER = 10**10  # iterations, of --freeze_prototypes_niters
TYPICAL_IMAGES = 10_000  # what --preset photos --help is for

# Side in pixels and share of the image's area of the crops, for one or two resolutions.
# imagenet: SwAV, arXiv:2006.09882, appendix A.2. Images of cifar are 32 px, those of digits 8 px.
CROPS = {
    "imagenet": {"size": [224, 96], "min_scale": [0.14, 0.05], "max_scale": [1.0, 0.14]},
    "photos": {"size": [128, 64], "min_scale": [0.2, 0.05], "max_scale": [1.0, 0.2]},
    "cifar": {"size": [32, 16], "min_scale": [0.3, 0.1], "max_scale": [1.0, 0.4]},
    "tiny": {"size": [16, 8], "min_scale": [0.4, 0.2], "max_scale": [1.0, 0.5]},
}
SIDES_ON_CPU = [64, 32]  # pixels, of photos; no flag, but what --size_crops is then by default

SMALL = {
    "nmb_crops": [2, 2],
    "stem": "small",
    "feat_dim": 64,
    "blur": [0.0],
    "optimizer": "sgd",
    "base_lr": 0.5,
    "final_lr": 0.0005,
    "wd": 5e-4,
    "warmup_epochs": 0,
    "batch_size": 128,
    "log_freq": 20,
}
SHARED = {
    "imagenet": {},
    "cifar": {
        **SMALL,
        "arch": "resnet18",
        "hidden_mlp": 512,
        "base_lr": 0.2,
        "final_lr": 0.0002,
        "epochs": 100,
        "knn_freq": 10,
        "workers": 2,
    },
    "tiny": {
        **SMALL,
        "arch": "resnet10",
        "width": 0.25,
        "hidden_mlp": 128,
        "no_flip": True,  # a mirrored digit is another sign
        "color_jitter": [0.4, 0.4, 0.0, 0.0],
        "grayscale": 0.0,
        "epochs": 60,
        "knn_freq": 20,
        "workers": 0,
    },
}


@dataclass(frozen=True)
class Situation:
    """What a preset is made for: the images, and the machine of this process."""

    num_images: int
    side: int  # median of the shorter sides of a sample, in pixels
    megapixels: float  # median of a sample
    on_gpu: bool
    cores: int  # of the CPU, that this process may use
    world_size: int = 1
    has_network: bool = False  # of --arch or --init_from, larger than that of photos on a CPU

    def __str__(self):
        device = "on a GPU" if self.on_gpu else "on a CPU"
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        several = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f"{self.num_images:,} images of about {self.side} px, {device} with {cores}{several}"

    def clusters(self, most: int = 3000) -> int:
        """A tenth of the images, between 10 and `most`: prototypes or clusters of a small set."""
        return max(10, min(most, self.num_images // 10))

    def global_batch(self) -> int:
        """Images of a batch over all processes: an eighth of them, at most 64 on a CPU and 256 on a GPU."""
        most = 256 if self.on_gpu else 64
        per_process = min(most, max(8, self.num_images // 8)) // self.world_size
        return max(1, per_process) * self.world_size

    def crop_sides(self) -> list[int]:
        """Sides of the global and the local crops of photographs, in pixels."""
        return CROPS["photos"]["size"] if self.on_gpu else SIDES_ON_CPU

    def epochs(self) -> int:
        """As many as show 60,000 images on a CPU, minutes of two cores, or 3 million on a GPU; 5 to 400.

        A tenth of it on a CPU where a larger network is asked for. Fewer by the share of the time in which a
        CPU decodes them.
        """
        on_cpu = SHOWN_TO_GIVEN if self.has_network else SHOWN_ON_CPU
        shown = SHOWN_ON_GPU if self.on_gpu else on_cpu * (1 - self.decoding())
        return max(5, min(400, round(shown / self.num_images)))

    def has_small_network(self) -> bool:
        """Whether the network is the one that photos has on a CPU."""
        return not (self.on_gpu or self.has_network)

    def with_network(self, network: dict | None, is_arch_said: bool) -> "Situation":
        """This one where --arch is said, or there are weights of a `network` (network_of_weights)."""
        is_large = network is not None and network.get("width", 1.0) > NARROW
        is_large = is_large and network.get("arch") != "vit_micro"  # that of main_dino.py
        return replace(self, has_network=is_arch_said or is_large)

    def hint(self) -> str | None:
        """What would make a run much faster, for people; None where nothing would."""
        if self.on_gpu or self.decoding() < 0.5 or self.side <= COPY_SIDE:
            return None
        of_copy = replace(self, megapixels=COPY_MEGAPIXELS)
        times = (1 - of_copy.decoding()) / (1 - self.decoding())
        return (
            f"images of {self.megapixels:.1f} megapixels: {self.decoding():.0%} of the time goes into "
            "decoding them; --reduced_decoding shortens that for JPEGs, and a copy of the images with "
            f"shorter sides of {COPY_SIDE} px trains about {times:.1f} times as fast"
        )

    def decoding(self) -> float:
        """The share of a CPU's time that goes into decoding: a half with images of DECODED_AS_LONG."""
        as_long = DECODED_AS_LONG * (SHOWN_ON_CPU / SHOWN_TO_GIVEN if self.has_network else 1)
        return self.megapixels / (self.megapixels + as_long)


def look(dataset: ImageDataset, device: str, world_size: int) -> Situation:
    """The situation of a run. device: of --device.

    Images that cannot be read are left to the training, which counts and names them. Raises RunError where
    the storage does not answer.
    """
    sample = torch.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset))).long().unique()
    sizes = []
    for index in sample.tolist():
        with contextlib.suppress(BrokenImage, UnfitImage, FileNotFoundError):
            sizes.append(dataset.read(index).shape[1:])
    sides = sorted(min(size) for size in sizes) or [0]
    areas = sorted(size.numel() for size in sizes) or [0]
    return Situation(
        num_images=len(dataset),
        side=sides[len(sides) // 2],
        megapixels=areas[len(areas) // 2] / 1e6,
        on_gpu=dist.resolve_device(device).type != "cpu",
        cores=num_cores(),
        world_size=world_size,
    )


def typical(device: str) -> Situation:
    """A situation for --help, which opens no images."""
    on_gpu = dist.resolve_device(device).type != "cpu"
    return Situation(TYPICAL_IMAGES, side=256, megapixels=0.1, on_gpu=on_gpu, cores=num_cores())


def preset_of(data_path: str) -> str:
    """The preset of a named set; imagenet for other data, of which no more is known."""
    return PRESET_OF.get(data_path, "imagenet")


def preset_for(situation: Situation) -> str:
    """The preset of data without a name: by the number and the size of the images."""
    if situation.num_images >= MANY_IMAGES:
        return "imagenet"
    return "cifar" if situation.side <= SMALL_SIDE else "photos"


def defaults_of(
    preset: str,
    presets: dict[str, dict | Callable],
    situation: Situation | None,
    published: dict,
    network: dict | None = None,
) -> dict:
    """The defaults of a preset by flag.

    presets: what the method adds, by preset: a dict, or a function of the situation, which photos and
    continue need. published: the defaults of all flags of the script. network: network_of_weights of
    --init_from, None without it. Raises ValueError where continue has none.
    """
    made_for_images = preset in MADE_FOR_IMAGES
    shared = photos(situation) if made_for_images else SHARED[preset]
    added = presets["photos" if made_for_images else preset]
    if callable(added):
        added = added(situation)
    kept = {name: x for name, x in shared.items() if name in published or name == "crop_sides"}
    values = {**kept, **added}
    if preset == "continue" and network is None:
        raise ValueError("--preset continue goes on from trained weights: name them by --init_from")
    if network:
        if "arch" in network and "width" in values:
            values["width"] = published["width"]  # the preset's belongs to the preset's network
        values |= {name: value for name, value in network.items() if name in published}
    if preset == "continue":
        values |= continuation({**published, **values})
    return values


def network_of_weights(init_from: str) -> dict:
    """The flags of the network in a run or a file of weights; {} in a copy that cannot tell them.

    Raises as src.nets.pretrained.describe.
    """
    try:
        from ..evaluate.flags import network_of  # here, as runs without weights read no file
    except ImportError:  # a copy without evaluations: the network is said by flags
        return {}
    return network_of(init_from)


def continuation(values: dict) -> dict:
    """What is other than with photos where a run goes on from trained weights, by flag.

    A tenth of the learning rate, and a slow teacher; first_spans has what else. values: of all flags without
    this.
    """
    changed = {}
    for name in ("base_lr", "final_lr", "lr"):
        if name in values:
            changed[name] = values[name] / 10
    changed["momentum_teacher"] = 0.9995
    return {name: value for name, value in changed.items() if name in values}


def first_spans(values: dict, epochs: int, iterations: int) -> dict:
    """For how long a run from trained weights warms up, and its new head stays as it is, by flag.

    values: of all flags; only those that are among them, and prototypes that are not trained at all, as
    DeepCluster-v2's, stay so. epochs: of the run, of so many iterations.
    """
    spans = {
        "warmup_epochs": max(min(1, epochs - 1), epochs // 10),
        "freeze_last_layer": epochs // 5,  # epochs
        "freeze_prototypes_niters": epochs // 5 * iterations,
    }
    return {name: span for name, span in spans.items() if values.get(name, FOR_EVER) < FOR_EVER}


def stored_choice(folder: str) -> tuple[str | None, dict]:
    """(preset of the run that a folder holds, the defaults that were made for it); (None, {}) without one.

    A run goes on with what was chosen when it began.
    """
    try:
        args = json.loads((Path(folder) / "args.json").read_text())
        return args.get("preset"), args.get("chosen") or {}
    except (OSError, ValueError, AttributeError):
        return None, {}


def default_folder(method: str, data_path: str) -> str:
    """The folder of a run without --dump_path: runs/<method>_<data>."""
    path = Path(data_path).expanduser()
    name = path.name or path.resolve().name  # of "."
    name = re.sub(r"\W+", "_", name.split(".")[0] or name).strip("_")
    return f"runs/{method}_{name or 'images'}"


def photos(situation: Situation) -> dict:
    """Defaults for some hundreds to some hundred thousand photographs: all that is not the method's."""
    batch = situation.global_batch()
    is_narrow = situation.has_small_network()
    return {
        "arch": "resnet50" if situation.on_gpu else "resnet18",
        "width": NARROW if is_narrow else 1.0,
        "color_jitter": [0.4, 0.4, 0.4, 0.1] if is_narrow else [0.8, 0.8, 0.8, 0.2],
        "nmb_crops": [2, 4],
        "crop_sides": situation.crop_sides(),
        "hidden_mlp": 2048 if situation.on_gpu else 512,
        "optimizer": "sgd",
        "base_lr": 0.2 * batch / 128,
        "final_lr": 0.0002 * batch / 128,
        "wd": 5e-4 if not situation.on_gpu else 1e-4,
        "warmup_epochs": 0,
        "batch_size": batch // situation.world_size,
        "epochs": situation.epochs(),
        "workers": min(10, situation.cores) if situation.on_gpu else max(1, situation.cores // 2),
        "knn_freq": max(1, situation.epochs() // 5),
        "log_freq": 10 if not situation.on_gpu else 50,
    }
