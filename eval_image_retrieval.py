"""Image retrieval: how well nearest neighbours of frozen features find the same building.

ROxford and RParis, Medium and Hard (Radenovic et al. 2018, arXiv:1803.11285), as DINO evaluates them,
arXiv:2104.14294, Table 3; and the first Oxford and Paris sets, as DeepCluster does, arXiv:1807.05520.
Two published set-ups, chosen by --protocol; auto is the first for the revisited sets, else the second:
  dino         whole images that fit into --imsize px; the features of the network, --multiscale true those
               of three sizes in the mean; cosines
  deepcluster  R-MAC (src/evaluate/rmac.py): the longer side is --S px, maxima over regions at --L levels,
               whitened to --n_pca entries by PCA on the images of the other set; queries cut to their box

  python eval_image_retrieval.py --pretrained dino.pth --data_path revisited --dataset roxford5k
  python eval_image_retrieval.py --pretrained dino.pth --data_path revisited --dataset rparis6k \\
      --imsize 512 --multiscale true
  python eval_image_retrieval.py --model vgg16.pth.tar --dataset oxford --whitening_path paris/jpg
torchrun splits the images over processes. Features lie in --temp_dir; the same command goes on where it
stopped, and one with other --aqe or --dbe takes them over.

Deviations from the authors' code. Both: the ground truth, a pickle, is read without executing it; equal
cosines are ranked by index; an image that cannot be read comes last. DINO's: several scales are brought
to length 1 by image; without weights nothing is downloaded. DeepCluster's: all stages in one command,
unless --stage says otherwise; average precisions are computed here (--eval_binary runs the program of the
data's authors too); what --multires, --aqe and --dbe say is done, and not only read; regions without
activation are left out, where theirs are NaN.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import functools
import json
import logging
import subprocess
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from src import dist
from src.data.datasets import open_dataset
from src.errors import Stopped
from src.evaluate import flags as eval_flags
from src.evaluate import rmac
from src.evaluate.ranking import KAPPAS, expand_database, expand_queries, rank, retrieval_scores
from src.evaluate.retrieval_sets import OTHER, REVISITED, open_buildings, open_revisited
from src.evaluate.whole_images import FeatureFolder, fit_inside, longer_side
from src.labels.features import share
from src.labels.row_file import load_tensors, write_tensors
from src.nets.pooling import (
    SCALES,
    TRIAL,
    forward_of_feature,
    forward_of_map,
    multi_scale,
    shape_of_features,
)
from src.nets.pretrained import MODEL_FLAGS
from src.nets.weights import fingerprint
from src.run import checkpoint, flags, image_flags
from src.run.lock import hold_folder
from src.run.log import setup_logging, write_whole
from src.run.presets import default_folder
from src.run.stop import StopSignal, finish, leave

logger = logging.getLogger(__name__)

STAGES = ("extract_train", "train_pca", "db_features", "q_features", "eval")
RESOLUTIONS = (
    550,
    800,
    1050,
)  # of --multires, px of the longer side: Gordo et al., arXiv:1610.07940
FEATURES = ("backbone", "cls", "mean", "gem", "cls_gem")
OF_DINO = ("multiscale", "imsize", "feature", "gem_p")
OF_DEEPCLUSTER = ("S", "L", "n_pca", "multires", "whitening_path")
# What the result depends on, besides the images and the weights.
SETTINGS = (*MODEL_FLAGS, "in_chans", "protocol", *OF_DINO, *OF_DEEPCLUSTER)
NAMED = ("pretrained", "checkpoint_key", "data_path", "dataset", "dataset_name", "aqe", "dbe")


# ============ what is computed of an image ============
def forward_and_shape(network, args):
    """Images -> features of --protocol dino, or the last map of deepcluster; and the shape of one image's.

    Raises ValueError where images as small as the flags ask for are too small for the network.
    """
    arch = network.arch
    if args.protocol == "deepcluster":
        last_map = forward_of_map(network)
        side = TRIAL if args.S < 1 else min(args.S, TRIAL)  # a larger one would only take longer
        return last_map, shape_of_features(last_map, args.in_chans, side, arch, "--S")
    forward = forward_of_feature(network, args.feature, args.gem_p)
    shape = shape_of_features(forward, args.in_chans, args.imsize, arch, "--imsize")
    if not args.multiscale:
        return forward, shape
    smallest = int(SCALES[-1] * args.imsize)
    try:
        shape_of_features(forward, args.in_chans, smallest, arch, "--imsize")
    except ValueError as error:
        raise ValueError(
            f"--imsize {args.imsize} is too small for --multiscale true, which makes images of {smallest} px "
            f"of it ({error})"
        ) from None
    return multi_scale(forward), shape


# ============ dino ============
def dino_features(files, forward, width, images, args):
    """Rows of the database (N, D) and the queries (Q, D)."""
    resize = functools.partial(fit_inside, side=args.imsize)
    return {
        name: files.rows(name, dataset, resize, forward, width).read()
        for name, dataset in images.items()
        if includes(args.stage, name)
    }


def includes(stage, name):
    """Whether the features of the database or the queries are asked for by --stage."""
    return STAGES.index(stage) >= STAGES.index({"database": "db_features"}.get(name, "q_features"))


# ============ deepcluster ============
def deepcluster_features(files, last_map, shape, images, targets, args):
    """Rows of the database (N, d) and the queries (Q, d); {} where --stage ends before.

    shape: of the last map of an image, channels first.
    """
    learning = STAGES.index(args.stage) <= STAGES.index("train_pca")
    if learning:
        learn(files, last_map, shape[0], images["database"], args, data=targets.name)
        return {}
    learnt_on = OTHER[targets.name]
    if args.whitening_path:
        others = open_dataset(
            args.whitening_path,
            in_chans=args.in_chans,
            flag="--whitening_path",
            **image_flags.reading_options(args),
        )
        learnt_on = f"{args.whitening_path} {others.digest()}"
        whitening = learn(files, last_map, shape[0], others, args, data=learnt_on)
    else:
        whitening = read_whitening(files, learnt_on)

    def forward(x):
        return rmac.descriptors(last_map(x), args.L, whitening)

    found, width = {}, (len(whitening.components),)
    of_whitening = f"{learnt_on} {rmac.digest(whitening)}"
    for name, dataset in images.items():
        if not includes(args.stage, name):
            continue
        boxes = targets.boxes if name == "queries" else None
        total = 0
        for side in RESOLUTIONS if args.multires else (args.S,):
            resize = functools.partial(longer_side, side=side if side > 0 else None, boxes=boxes)
            rows = files.rows(name, dataset, resize, forward, width, side=side, pca=of_whitening)
            total = total + rows.read()
        found[name] = total
    return found


def learn(files, last_map, dim, dataset, args, data):
    """The whitening of the regions of some images, read or learnt; None where --stage ends before.

    dim: channels of the map. data: what tells these images from others.
    """
    path = whitening_path(files, data)
    learnt_on = path.with_suffix(".txt")  # the digest of its images
    is_there = path.is_file() and learnt_on.is_file()
    if dist.broadcast_object(is_there and learnt_on.read_text() == dataset.digest()):
        logger.info(f"the PCA is in {path} already")
        return rmac.broadcast_whitening(load_tensors(path) if dist.is_main() else None)
    resize = functools.partial(longer_side, side=args.S if args.S > 0 else None)
    width = (rmac.most_regions(args.L), dim)
    forward = functools.partial(padded_regions, last_map=last_map, levels=args.L)
    file = files.rows("regions", dataset, resize, forward, width, data=data)
    if args.stage == "extract_train":
        return None
    own = share(len(dataset))
    device = files.device
    whitening = rmac.learn_whitening(file.read()[own.start : own.stop], args.n_pca, device)
    checkpoint.by_main(lambda: write_tensors(path, rmac.as_tensors(whitening)), "save the PCA")
    checkpoint.by_main(lambda: write_whole(learnt_on, dataset.digest()), "save the PCA")
    logger.info(f"PCA of {len(dataset):,} images to {len(whitening.components)}: {path}")
    file.remove()  # the largest file of all
    return whitening


def padded_regions(x, last_map, levels):
    """Images -> the maxima of their regions, (B, R, D)."""
    return rmac.padded_maxima(last_map(x), levels)


def whitening_path(files, data):
    """The file of a whitening: by what the features depend on, and what it was learnt on."""
    return files.path("pca", data=data).with_suffix(".pth")


def read_whitening(files, other):
    """The whitening that was learnt on the other set."""
    path = whitening_path(files, other)
    if not dist.broadcast_object(path.is_file()):
        raise FileNotFoundError(
            f"there is no PCA of {other} by this network in {files.folder} yet: give --whitening_path, the "
            f"images of {other}, or call this for {other} with --stage train_pca and the same --temp_dir"
        )
    return rmac.broadcast_whitening(load_tensors(path) if dist.is_main() else None)


# ============ evaluation ============
def evaluate(features, targets, args):
    """Scores in percent by evaluation, such as Medium; by the main process."""
    database, queries = (features[name].clone() for name in ("database", "queries"))
    unread = queries.isnan().any(1)
    if unread.any():
        broken = targets.queries[int(unread.nonzero()[0])]
        raise ValueError(f"the query {targets.folder / broken} cannot be read: mend the file")
    unread = database.isnan().any(1)
    if unread.any():
        logger.warning(f"WARNING: {int(unread.sum())} images cannot be read: they come last")
    database[unread] = 0.0
    database, queries = F.normalize(database, dim=1), F.normalize(queries, dim=1)
    if args.dbe:
        database = expand_database(database, args.dbe)
    if args.aqe:
        queries = expand_queries(queries, database, args.aqe)
    similarity = queries @ database.T  # (Q, N)
    similarity[:, unread] = -torch.inf
    order = rank(similarity)
    results = {}
    for name, relevance in targets.relevance.items():
        scores = retrieval_scores(order, relevance)
        results[name] = {
            "map": 100 * scores["map"],
            **{f"mp@{k}": 100 * float(x) for k, x in zip(KAPPAS, scores["precision"], strict=True)},
            "aps": [None if np.isnan(ap) else 100 * ap for ap in scores["aps"].tolist()],
        }
    if args.eval_binary:
        results["all"]["map_eval_binary"] = 100 * score_by_program(order, targets, args)
    return results


def score_by_program(order, targets, args):
    """The mean of what compute_ap, of the authors of the first sets, says of each ranking."""
    names, aps = [Path(image).stem for image in targets.images], []
    folder = temp_folder(args) / "rankings"
    folder.mkdir(exist_ok=True)
    for start, row in zip(targets.query_files, order, strict=True):
        file = folder / f"{Path(start).name}.rnk"
        file.write_text("".join(f"{names[index]}\n" for index in row))
        command = [str(Path(args.eval_binary).absolute()), start, str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            aps.append(float(done.stdout.split()[0]))
        except (IndexError, ValueError):
            raise ValueError(
                f"--eval_binary {args.eval_binary} says no average precision of {start}: "
                f"{(done.stderr or done.stdout).strip()[:200]!r}"
            ) from None
    return sum(aps) / len(aps)


def report(results, settings, path):
    """Log the results and write them to `path` as JSON."""
    write_whole(path, json.dumps({"results": results, "settings": settings}, indent=1) + "\n")
    for name, scores in results.items():
        precisions = "  ".join(f"mP@{k} {scores[f'mp@{k}']:.2f}" for k in KAPPAS)
        logger.info(f"{name:8} mAP {scores['map']:.2f}  {precisions}")
        if "map_eval_binary" in scores:
            logger.info(f"         mAP {scores['map_eval_binary']:.2f} by --eval_binary")
    if not settings["pretrained"]:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, a mere baseline")
    logger.info(f"written to {path}")


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns 0, or 128 + the signal when a signal stopped it."""
    args = parse_args(argv)
    setup_logging(None, dist.read_environment().rank == 0)
    check_args(args)
    if args.dataset in REVISITED:
        targets = open_revisited(args.data_path, args.dataset)
    else:
        targets = open_buildings(args.dataset, args.dataset_name)
    reading = image_flags.reading_options(args)
    images = {
        name: targets.open_images(getattr(targets, paths), name, args.in_chans, **reading)
        for name, paths in (("database", "images"), ("queries", "queries"))
    }
    network = eval_flags.open_network(args)
    forward, shape = forward_and_shape(network, args)
    folder = temp_folder(args)
    for written_to in (args.dump_path, folder):
        checkpoint.check_writable(written_to)

    process = dist.init(args.device if args.use_cuda else "cpu", args.dist_timeout)
    hold_folder(folder, "eval_image_retrieval")
    stop = StopSignal()
    mean, std = network.normalisation(images["database"])
    precision = dist.resolve_precision(args.precision, process.device)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"arch": network.arch, "weights": fingerprint(network.model)}
    settings |= {"mean": mean, "std": std, "precision": precision}
    # Neither the PCA nor the features at a resolution depend on these.
    of_pca = {
        name: value
        for name, value in settings.items()
        if name not in ("whitening_path", "multires")
    }
    files = FeatureFolder(
        folder,
        of_pca,
        stop,
        mean=mean,
        std=std,
        device=process.device,
        num_workers=args.workers,
        loader_timeout=args.loader_timeout,
        precision=precision,
    )
    logger.info(
        f"{targets.name}: {len(targets.queries)} queries, {len(targets.images):,} images, protocol "
        f"{args.protocol}, {network.origin}"
    )

    network.model.to(process.device)
    try:
        if args.protocol == "dino":
            features = dino_features(files, forward, shape, images, args)
        else:
            features = deepcluster_features(files, forward, shape, images, targets, args)
    except Stopped:
        return leave(stop)
    if args.stage != "eval":
        logger.info(f"--stage {args.stage} is done; what it has made is in {folder}")
        return finish(stop)
    results = dist.on_main(lambda: evaluate(features, targets, args))
    if dist.is_main():
        settings |= {name: getattr(args, name) for name in NAMED}
        report(
            results, settings, Path(args.dump_path) / f"eval_image_retrieval_{targets.name}.json"
        )
    return finish(stop)


# ============ arguments ============
def parse_args(argv):
    """The arguments; what is not on the command line is of the run that is evaluated, or the protocol."""
    args, _ = eval_flags.parse_args(get_parser(), argv, "eval_image_retrieval")
    if "data_path" not in args.given:
        args.data_path = ""  # a run's is that of its training
    if "dump_path" not in args.given and not eval_flags.is_run(args.pretrained):
        args.dump_path = default_folder("eval_image_retrieval", args.dataset)
    if args.protocol == "auto":
        args.protocol = "dino" if args.dataset in REVISITED else "deepcluster"
    return args


def temp_folder(args):
    """The folder of features."""
    return Path(args.temp_dir or Path(args.dump_path) / "retrieval")


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser, positive, boolean = flags.Parser(__doc__), flags.positive, flags.boolean
    at_least_zero = flags.at_least_zero

    add = parser.add_argument_group("method").add_argument
    add("--protocol", default="auto", choices=["auto", "dino", "deepcluster"],
        help="auto: dino for roxford5k and rparis6k, deepcluster for the first sets")
    add("--aqe", type=at_least_zero(int), default=None,
        help="images that a query is expanded by, in the mean, before it is asked again")
    add("--dbe", type=at_least_zero(int), default=None,
        help="neighbours that each image of the database is expanded by, in a weighted mean")
    add = parser.add_argument_group("dino").add_argument
    add("--imsize", type=positive(int), default=224, help="side in pixels that whole images fit into")
    add("--multiscale", type=boolean, default=False,
        help="true: the mean of the features at sizes of 1, 0.71 and 0.5")
    add("--feature", default="backbone", choices=FEATURES,
        help="backbone: the pooled output of the trunk or the class token; mean, gem: average, or "
        "generalised mean, of positions; cls_gem: the class token and gem")
    add("--gem_p", type=positive(float), default=3.0, help="exponent of --feature gem and cls_gem")
    add = parser.add_argument_group("deepcluster").add_argument
    add("--S", type=int, default=1024, help="longer side of images in pixels; -1: as they are")
    add("--L", type=positive(int), default=3, help="levels of the grid of regions")
    add("--n_pca", type=positive(int), default=512, help="entries after the PCA")
    add("--multires", action="store_true",
        help="the sum of the descriptors at longer sides of 550, 800 and 1050 px; PCA at --S")
    add("--whitening_path", default="",
        help="images that the PCA is learnt on, those of the other set (default: what --stage train_pca "
        "for the other set has left in --temp_dir)")
    add("--stage", default="eval", choices=STAGES,
        help="the last stage to do; extract_train and train_pca learn the PCA on the images of --dataset")
    add("--temp_dir", default="", help="folder of features and PCA (default: retrieval/ in --dump_path)")
    add("--eval_binary", default="",
        help="compute_ap, the program of the authors of the first sets, to run beside our own")

    eval_flags.add_network_args(parser)
    add = parser.add_argument_group("data").add_argument
    add("--model", dest="pretrained", default=argparse.SUPPRESS, help="the same as --pretrained")
    add("--data_path", default="", help="folder that holds roxford5k/ and rparis6k/")
    add("--dataset", default="roxford5k",
        help="roxford5k, rparis6k, or the folder of a first set, with jpg/ and lab/")
    add("--dataset_name", default="Oxford", choices=["Oxford", "Paris"],
        help="which first set it is")
    image_flags.add_reading_args(add)
    add("--in_chans", type=positive(int), default=3, help="channels of the images")
    add("--mean", type=float, nargs="+", default=None, help="of each channel; default: ImageNet's")
    add("--std", type=float, nargs="+", default=None, help="of each channel; default: ImageNet's")
    add("--use_cuda", type=boolean, default=True, help="false: the same as --device cpu")
    flags.add_runtime_args(parser)
    return parser
    # fmt: on


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    eval_flags.check_images(args)
    others = {"dino": OF_DEEPCLUSTER, "deepcluster": OF_DINO}[args.protocol]
    for name in others:
        if name in args.given:
            raise ValueError(
                f"--{name} is not of --protocol {args.protocol}: leave it out, or give the other protocol"
            )
    if args.dataset in REVISITED and not args.data_path:
        raise ValueError(
            f"--data_path must be given: the folder that holds {args.dataset}/, with gnd_{args.dataset}.pkl "
            "and the images in jpg/"
        )
    if args.dataset in REVISITED and args.eval_binary:
        raise ValueError(
            "--eval_binary is for the first Oxford and Paris sets: leave it out for roxford5k and rparis6k"
        )
    if args.eval_binary and not Path(args.eval_binary).is_file():
        raise FileNotFoundError(f"--eval_binary {args.eval_binary} does not exist")
    if args.protocol == "dino" and args.stage in ("extract_train", "train_pca"):
        raise ValueError(
            f"--stage {args.stage} is for --protocol deepcluster: --protocol dino learns nothing"
        )
    if args.whitening_path and args.stage in ("extract_train", "train_pca"):
        raise ValueError(
            f"--stage {args.stage} learns a PCA of the images of --dataset, and --whitening_path names other "
            "ones: leave one of them out"
        )
    if args.S < 1 and args.S != -1:
        raise ValueError(f"--S {args.S} must be a number of pixels, or -1 for images as they are")


if __name__ == "__main__":
    flags.run(main)
