"""Copy detection: whether features find the photograph that a distorted copy was made of.

Copydays (Douze et al. 2009) as DINO evaluates it, arXiv:2104.14294, Table 4: squares of --imsize px,
the class token and the generalised mean (GeM) of the patches, whitened by PCA on other images, cosines
with all originals and distractors. Networks without a class token have GeM alone.

  python eval_copy_detection.py --pretrained dino_vitbase8.pth --data_path copydays \\
      --whitening_path yfcc_20k --distractors_path yfcc_10k
  python eval_copy_detection.py --pretrained runs/mine --data_path copydays       without either
  python eval_copy_detection.py --pretrained torchvision:resnet50 --imsize 224 --data_path copydays
torchrun splits the images over processes. Features lie in copies/ in --dump_path; the same command goes
on where it stopped.

Reported for each kind of copies that is there (strong, the published one; jpegqual/N, crops/N): mAP of the
first 20 images found, as published; mAP of the whole ranking; and the micro-average precision of all pairs
of a copy and an image in one ranking, where one threshold is to do for all.

Deviations from the authors' code: any network; kinds that are not there are left out, where theirs stops;
distractors and images for the whitening may be any data set (docs/data.md), folders in folders too; images
that cannot be read are left out of both, and a copy or an original must be mended. Kept: the whitening
subtracts the mean, and takes its directions from the second moment about 0; what GeM averages is at
least 1e-6.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import functools
import json
import logging
from pathlib import Path

import torch
import torch.nn.functional as F

from src import dist
from src.cluster.pca import fit_whitening, whiten
from src.data.datasets import open_dataset
from src.errors import Stopped
from src.evaluate import flags as eval_flags
from src.evaluate.copydays import ORIGINAL, open_copydays
from src.evaluate.ranking import (
    micro_average_precision,
    rank,
    ranks_of_positives,
    retrieval_scores,
    trapezoid_ap,
)
from src.evaluate.whole_images import FeatureFolder, to_square
from src.labels.features import share
from src.nets.backbones import is_vit
from src.nets.pooling import forward_of_feature, shape_of_features
from src.nets.pretrained import MODEL_FLAGS
from src.nets.weights import fingerprint
from src.run import checkpoint, flags, image_flags
from src.run.lock import hold_folder
from src.run.log import setup_logging, write_whole
from src.run.stop import StopSignal, finish, leave

logger = logging.getLogger(__name__)

FOUND = 20  # images of a ranking that count, as published
FEATURES = ("auto", "cls_gem", "gem", "cls", "mean", "backbone")
# What features depend on, besides the images and the weights.
SETTINGS = (*MODEL_FLAGS, "in_chans", "feature", "gem_p", "imsize")
NAMED = ("pretrained", "checkpoint_key", "data_path", "whitening_path", "distractors_path")


# ============ features ============
def open_others(path, flag, args):
    """The images of --whitening_path or --distractors_path; None without one."""
    if not path:
        return None
    return open_dataset(
        path, in_chans=args.in_chans, flag=flag, **image_flags.reading_options(args)
    )


def check_readable(rows, dataset):
    """Raise ValueError for an image of Copydays that cannot be read."""
    unread = rows[:, 0].isnan()
    if unread.any():
        broken = dataset.file_name(int(unread.nonzero()[0]))
        raise ValueError(f"--data_path: {broken} cannot be read: mend the file")


def without_unreadable(rows, flag):
    """Features (n, D) of the images that could be read."""
    unread = rows[:, 0].isnan()
    if not unread.any():
        return rows  # mapped, and not copied
    logger.warning(f"WARNING: {int(unread.sum())} images of {flag} cannot be read, left out")
    return rows[~unread]


# ============ whitening ============
def learn_whitening(rows, device):
    """PCA of the features (n, D) of --whitening_path, to all their entries; all processes call it.

    The directions are those of the second moment, as published; eigenvalues are at least 1e-5 of the
    largest.
    """
    rows = without_unreadable(rows, "--whitening_path")
    own = share(len(rows))
    features = rows[own.start : own.stop]
    return fit_whitening(features, rows.shape[1], device=device, centred=False)


# ============ evaluation ============
def evaluate(database, queries, copies, whitening):
    """Scores in percent by kind of copies; by the main process.

    database (N, D): features of the originals, and of distractors behind them. queries: (Q, D) by kind.
    """
    if whitening is not None:
        database = whiten(database, whitening)
    database = F.normalize(database, dim=1)
    results = {}
    for kind, features in queries.items():
        features = whiten(features, whitening) if whitening is not None else features
        similarity = F.normalize(features, dim=1) @ database.T  # (Q, N)
        order, relevance = rank(similarity), copies[kind].relevance
        results[kind] = {
            "map": 100 * mean_of_first(order, relevance),
            "map_of_all": 100 * retrieval_scores(order, relevance)["map"],
            "micro_ap": 100 * micro_average_precision(similarity, relevance),
            "queries": len(order),
        }
    return results


def mean_of_first(order, relevance):
    """Mean average precision of the first FOUND images of each ranking (Q, N), a share."""
    aps = [
        trapezoid_ap(ranks_of_positives(row[:FOUND], relevant), relevant.count())
        for row, relevant in zip(order, relevance, strict=True)
    ]
    return sum(aps) / len(aps)


def report(results, settings, path):
    """Log the results and write them to `path` as JSON."""
    write_whole(path, json.dumps({"results": results, "settings": settings}, indent=1) + "\n")
    for kind, scores in results.items():
        logger.info(
            f"{kind:12} {scores['queries']:4} copies  mAP {scores['map']:.2f} (whole ranking "
            f"{scores['map_of_all']:.2f})  micro-AP {scores['micro_ap']:.2f}"
        )
    if not settings["pretrained"]:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, a mere baseline")
    logger.info(f"written to {path}")


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns 0, or 128 + the signal when a signal stopped it."""
    args = parse_args(argv)
    setup_logging(None, dist.read_environment().rank == 0)
    check_args(args)
    originals, copies = open_copydays(
        args.data_path, args.in_chans, **image_flags.reading_options(args)
    )
    whitening_images = open_others(args.whitening_path, "--whitening_path", args)
    distractors = open_others(args.distractors_path, "--distractors_path", args)
    network = eval_flags.open_network(args)
    if args.feature == "auto":
        args.feature = "cls_gem" if is_vit(network.arch) else "gem"
    forward = forward_of_feature(network, args.feature, args.gem_p)
    width = shape_of_features(forward, args.in_chans, args.imsize, network.arch, "--imsize")
    folder = Path(args.dump_path) / "copies"
    checkpoint.check_writable(folder)

    process = dist.init(args.device if args.use_cuda else "cpu", args.dist_timeout)
    hold_folder(folder, "eval_copy_detection")
    stop = StopSignal()
    network.model.to(process.device)
    mean, std = network.normalisation(originals)
    precision = dist.resolve_precision(args.precision, process.device)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"arch": network.arch, "weights": fingerprint(network.model)}
    settings |= {"mean": mean, "std": std, "precision": precision}
    files = FeatureFolder(
        folder,
        settings,
        stop,
        mean=mean,
        std=std,
        device=process.device,
        batch_size=args.batch_size,
        num_workers=args.workers,
        loader_timeout=args.loader_timeout,
        precision=precision,
    )
    log_plan(args, network, originals, copies, distractors, whitening_images)

    # ============ features ============
    resize = functools.partial(to_square, side=args.imsize)

    def extract(name, dataset):
        rows = files.rows(name, dataset, resize, forward, width, data=dataset.name)
        return rows.read()

    try:
        queries = {
            kind: extract(kind.replace("/", "_"), part.images) for kind, part in copies.items()
        }
        database = [extract(ORIGINAL, originals)]
        for kind, rows in queries.items():
            check_readable(rows, copies[kind].images)
        check_readable(database[0], originals)
        if distractors is not None:
            rows = extract("distractors", distractors)
            database.append(without_unreadable(rows, "--distractors_path"))
        whitening = None
        if whitening_images is not None:
            rows = extract("whitening", whitening_images)
            whitening = learn_whitening(rows, process.device)
    except Stopped:
        return leave(stop)

    # ============ copy detection ============
    results = dist.on_main(lambda: evaluate(torch.cat(database), queries, copies, whitening))
    if dist.is_main():
        settings |= {name: getattr(args, name) for name in NAMED}
        report(results, settings, Path(args.dump_path) / "eval_copy_detection.json")
    return finish(stop)


def log_plan(args, network, originals, copies, distractors, whitening_images):
    """Say what will be computed, before it is."""
    kinds = ", ".join(f"{len(part.images)} {kind}" for kind, part in copies.items())
    logger.info(f"network     {network.origin}, {args.feature} of {args.imsize} px squares")
    logger.info(f"copies      {kinds}, of {len(originals)} originals")
    count = 0 if distractors is None else len(distractors)
    logger.info(f"distractors {count:,}" + ("" if count else ": give --distractors_path for some"))
    if whitening_images is None:
        logger.info("whitening   none: give --whitening_path for one, as published")
    else:
        logger.info(f"whitening   on {len(whitening_images):,} images")


# ============ arguments ============
def parse_args(argv):
    """The arguments; what is not on the command line is of the run that is evaluated."""
    args, _ = eval_flags.parse_args(get_parser(), argv, "eval_copy_detection")
    if "data_path" not in args.given:
        args.data_path = ""  # a run's is that of its training
    return args


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser, positive = flags.Parser(__doc__), flags.positive

    add = parser.add_argument_group("method").add_argument
    add("--feature", default="auto", choices=FEATURES,
        help="auto: cls_gem, the class token and the generalised mean of the patches, of vision "
        "transformers, else gem")
    add("--gem_p", type=positive(float), default=4.0, help="exponent of the generalised mean")

    eval_flags.add_network_args(parser)
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="", help="folder of Copydays, with original/ and strong/; must be given")
    add("--whitening_path", default="",
        help="images that the whitening is learnt on, as published 20,000 (default: no whitening)")
    add("--distractors_path", default="",
        help="images among which the originals are to be found, as published 10,000 (default: none)")
    image_flags.add_reading_args(add)
    add("--imsize", type=positive(int), default=320, help="side in pixels of the squares")
    add("--in_chans", type=positive(int), default=3, help="channels of the images")
    add("--mean", type=float, nargs="+", default=None, help="of each channel; default: ImageNet's")
    add("--std", type=float, nargs="+", default=None, help="of each channel; default: ImageNet's")
    add("--batch_size", "--batch_size_per_gpu", type=positive(int), default=16,
        help="images per process")
    add("--use_cuda", type=flags.boolean, default=True, help="false: the same as --device cpu")
    flags.add_runtime_args(parser)
    return parser
    # fmt: on


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    eval_flags.check_images(args)
    if not args.data_path:
        raise ValueError(
            "--data_path must be given: the folder of Copydays, with original/ and strong/ in it"
        )


if __name__ == "__main__":
    flags.run(main)
