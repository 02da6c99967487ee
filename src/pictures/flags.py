"""What the pictures of visualize.py share: flags, where their defaults come from, what these open."""

import argparse
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .. import dist
from ..data.datasets import IMAGENET, ImageDataset, usual_std
from ..evaluate import flags as eval_flags
from ..labels.features import extract_features
from ..nets.pretrained import Pretrained, run_folder
from ..run import checkpoint, flags, image_flags
from ..run.flags import at_least_zero, positive
from ..run.lock import hold_folder
from .frames import open_frames
from .neighbours import open_queries
from .sheets import spread

logger = logging.getLogger(__name__)

# Untrained networks for small images, which are enlarged for them.
NETWORKS = dict.fromkeys(
    ("tiny", "cifar"), {"arch": "vit_tiny", "patch_size": 8, "image_size": [96, 96]}
)


@dataclass(frozen=True)
class Command:
    """A picture of visualize.py.

    draw        draws it; its docstring is the --help
    add_flags   gives them to a parser
    defaults    (the arguments without a run, what the command line says) -> what the run, the file of
                weights or the preset says
    check       raises ValueError on arguments that do not fit together
    """

    draw: Callable[[argparse.Namespace], None]
    add_flags: Callable[[argparse.ArgumentParser], None]
    defaults: Callable[[argparse.Namespace, dict], dict]
    check: Callable[[argparse.Namespace], None]

    def parse(
        self, parser: argparse.ArgumentParser, picture: str, argv: Sequence[str]
    ) -> argparse.Namespace:
        """The arguments; the command line wins over the run, this over the preset, that over the defaults.

        parser: with the flags of this picture; picture: its name.
        """
        explicit = flags.explicit_flags(parser, list(argv)) | {"picture": picture}
        said = self.defaults(eval_flags.with_defaults(parser, explicit), explicit)
        return eval_flags.with_defaults(parser, explicit, said)


# ============ flags ============
# fmt: off
def add_data_flags(parser: argparse.ArgumentParser, add: Callable) -> None:
    """The device, with the `add` of an earlier group, and the images."""
    add("--device", default="auto",
        help="auto, cpu, cuda, cuda:1, mps; auto: a GPU if there is one")
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="digits",
        help="digits, cifar10, ..., a folder of images, a list of files, or tar shards")
    image_flags.add_list_args(add)
    image_flags.add_reading_args(add)
    add("--in_chans", type=positive(int), default=3, help="channels of the images")
    add("--mean", type=float, nargs="+", default=None, help="of each channel; default: the data's")
    add("--std", type=float, nargs="+", default=None, help="of each channel; default: the data's")


def add_feature_flags(add: Callable) -> None:
    """Which features of images are taken, as evaluations take them."""
    add("--feature", default="backbone", choices=["backbone", "embedding"],
        help="the pooled output of the trunk, or that of the projection head")
    add("--interpolation", default="bicubic", choices=["bilinear", "bicubic"], help="of the resize")


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """The network, the images and the runtime."""
    eval_flags.add_network_args(parser)
    add = eval_flags.add_image_args(parser)
    add("--split", default="train", choices=["train", "val"], help="which images of the data")
    add("--batch_size", type=positive(int), default=128, help="images at once")
    flags.add_runtime_args(parser, one_process=True)


def add_shared_flags(parser: argparse.ArgumentParser) -> Callable:
    """Weights, folder and seed; returns the group's add_argument."""
    add = parser.add_argument_group("weights and files").add_argument
    add("--pretrained", "--pretrained_weights", default="",
        help="a run's folder, a checkpoint of it, or a released file")
    add("--dump_path", "--output_dir", default=".",
        help="folder of the pictures; by default that of the run, if there is one")
    add("--seed", type=at_least_zero(int), default=31, help="seed of every random draw")
    return add
# fmt: on


def network_defaults(args: argparse.Namespace, explicit: dict) -> dict:
    """The network and the images, from the run, the file or the preset."""
    _, said = eval_flags.network_defaults(args, explicit)
    folder = run_folder(args.pretrained) if eval_flags.is_run(args.pretrained) else Path()
    return {**said, "dump_path": str(folder / "plots" / args.picture)}


def check_image_size(args: argparse.Namespace) -> None:
    """Raise ValueError on flags of the images that do not fit together."""
    eval_flags.check_images(args)
    if len(args.image_size) > 2:
        raise ValueError(
            f"--image_size has {len(args.image_size)} values: give height and width, or one"
        )


def no_defaults(args: argparse.Namespace, explicit: dict) -> dict:
    """Nothing: the command line says all."""
    return {}


# ============ what they open ============
def open_images(
    args: argparse.Namespace,
) -> tuple[Iterator[tuple[str, Tensor]], int | None, tuple[Sequence, Sequence], dict[str, str]]:
    """(frames, their number or None, (mean, std), file names) of --image_path, or of --data_path.

    file names: of --data_path, by the name of the frame.
    """
    file_names = {}
    if args.image_path:
        frames, count = open_frames(args.image_path, args.in_chans)
        mean, std = IMAGENET[0], usual_std(IMAGENET[1])
        if args.in_chans != 3:
            mean, std = ([sum(x) / 3] * args.in_chans for x in (mean, std))
        limit = args.num_images * args.every if args.num_images else None
        frames = itertools.islice(frames, 0, limit, args.every)
        if count:
            count = min(math.ceil(count / args.every), args.num_images or count)
    else:
        dataset = image_flags.open_images(args)
        indices = spread(len(dataset), args.num_images or 4)
        names = {index: f"image_{index:06}" for index in indices}
        frames = ((names[index], dataset.load(index)) for index in indices)
        file_names = {names[i]: Path(dataset.file_name(i)).name for i in indices}
        count, mean, std = len(indices), dataset.mean, usual_std(dataset.std)
    return frames, count, (args.mean or mean, args.std or std), file_names


def queries_of(
    args: argparse.Namespace, dataset: ImageDataset | None = None
) -> tuple[ImageDataset, Sequence[int]]:
    """(images, indices into them): all of --queries, or else --num_images of the data, evenly spread.

    dataset: the data, where it is open already.
    """
    if args.queries:
        queries = open_queries(args.queries, args.in_chans)
        return queries, range(len(queries))
    if dataset is None:
        dataset = eval_flags.open_split(args)
    return dataset, spread(len(dataset), args.num_images)


def features_of_images(
    args: argparse.Namespace, dataset: ImageDataset
) -> tuple[Pretrained, Tensor]:
    """(network, features (N, D) of the images of a dataset); locks the folder."""
    network = eval_flags.open_network(args, args.feature)
    checkpoint.check_writable(args.dump_path)
    hold_folder(args.dump_path, f"visualize_{args.picture}")
    if not args.pretrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, its features are too")
    network.model.to(dist.resolve_device(args.device))
    features, _ = extract_features(
        network.model, dataset, **feature_options(args, network, dataset)
    )
    return network, features


def feature_options(args: argparse.Namespace, network: Pretrained, dataset: ImageDataset) -> dict:
    """How features are computed, the same for the data and for queries; see extraction_options."""
    device = dist.resolve_device(args.device)
    if args.use_fp16 is False:
        args.precision = "fp32"
    return eval_flags.extraction_options(args, network, dataset, device)
