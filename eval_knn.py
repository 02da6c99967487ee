"""Weighted k-NN classification of frozen features: no training, one number in minutes.

Wu et al. 2018, arXiv:1805.01978, section 3.4: a validation image takes the class with the largest
sum of exp(cosine / tau) over its k nearest training images (src/evaluate/knn.py). Features come from one
centre crop of each image and are L2-normalised.

  python eval_knn.py                                       digits, an untrained network, seconds
  python eval_knn.py --pretrained runs/swav                a run: its args.json says the rest
  python eval_knn.py --pretrained runs/swav --labels_per_class 5 --raw_pixels --untrained
  torchrun --nproc_per_node 8 eval_knn.py --pretrained swav_800ep.pth.tar --data_path /imagenet
  python eval_knn.py --pretrained dino.pth --data_path my_images       a ViT is known by its file
  python eval_knn.py --arch vgg16 --pretrained vgg16.pth --data_path my_images

Where nothing splits the images into train/ and val/, every tenth is classified by the others.
With --labels_per_class n, n images of each class keep their label, in --draws draws. The figure to
quote is that at k = n: of more neighbours than a class has labels, some must vote for others.

Deviations from the authors' code (DINO's eval_knn.py): any number of images and classes; training
features stay on the process that computed them; one search for all k; weights that are missing or do
not fit stop the run; --arch is found in the file, else resnet50 (theirs: vit_small); red standard
deviation 0.229 as theirs for transformers and runs of DINO, else SwAV's 0.228. Kept: top-5 needs no
vote; among classes without one the lowest index comes first.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import functools
import json
import logging
import time
from pathlib import Path

import torch.nn.functional as F

from src import dist
from src.evaluate import flags as eval_flags
from src.evaluate.feature_files import check_dump, dump_features, load_features
from src.evaluate.knn import few_label_accuracy, knn_accuracy
from src.evaluate.splits import open_labelled_splits, split_features
from src.labels.features import extract_features, raw_pixels
from src.nets.pretrained import MODEL_FLAGS
from src.pictures.neighbours import draw_neighbours
from src.run import checkpoint, flags, image_flags
from src.run.lock import hold_folder
from src.run.log import setup_logging
from src.run.stop import finish

logger = logging.getLogger(__name__)

# What features depend on, kept with them by --dump_features.
SETTINGS = (
    *("pretrained", "checkpoint_key", "feature", *MODEL_FLAGS),
    *("data_path", "train_path", "val_path", "data_root", "label_column"),
    *("in_chans", "mean", "std", "size", "interpolation"),
)
UNTRAINED = "untrained network"


# ============ evaluation ============
def evaluate(name, split, args):
    """Rows of the table for one kind of features: with all labels, then with --labels_per_class.

    split: training features (N, D) and labels (N,), validation features (M, D) and labels (M,).
    """
    train, train_labels, val, val_labels = split
    train, val = F.normalize(train, dim=1), F.normalize(val, dim=1)
    accuracies = knn_accuracy(
        train,
        train_labels,
        val,
        val_labels,
        ks=args.nb_knn,
        temperature=args.temperature,
        backend=args.knn_backend,
    )
    rows = [
        {"features": name, "labels": "all", "k": k, "top1": top1, "top5": top5}
        for k, (top1, top5) in accuracies.items()
    ]
    for per_class in filter(None, args.labels_per_class):
        few = few_label_accuracy(
            train,
            train_labels,
            val,
            val_labels,
            per_class=per_class,
            draws=args.draws,
            seed=args.seed,
            ks=args.nb_knn,
            temperature=args.temperature,
            backend=args.knn_backend,
        )
        rows += [
            {"features": name, "labels": per_class, "k": k, "top1": mean, "std": std}
            for k, (mean, std) in few.items()
        ]
    return rows


def log_table(rows):
    """Accuracies in percent; mean and standard deviation where labels are drawn."""
    width = max(len(row["features"]) for row in rows)
    logger.info(f"{'features':{width}}  labels       k  top-1            top-5")
    for row in rows:
        labels = row["labels"] if row["labels"] == "all" else f"{row['labels']} a class"
        top1 = f"{row['top1']:6.2f}" + (f" +- {row['std']:.2f}" if "std" in row else "")
        top5 = f"{row['top5']:6.2f}" if "top5" in row else ""
        line = f"{row['features']:{width}}  {labels:10} {row['k']:3}  {top1:15} {top5}"
        logger.info(line.rstrip())


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns 0."""
    args, _ = eval_flags.parse_args(get_parser(), argv, "eval_knn")
    setup_logging(None, dist.read_environment().rank == 0)
    check_args(args)
    settings = {name: getattr(args, name) for name in SETTINGS}
    if not args.load_features:
        train, val = open_labelled_splits(
            args.data_path,
            train_path=args.train_path,
            val_path=args.val_path,
            in_chans=args.in_chans,
            **image_flags.opening_options(args),
        )
        network = eval_flags.open_network(args, args.feature)
    if args.dump_features:
        check_dump(args.dump_features, settings)
    checkpoint.check_writable(args.dump_path)

    process = dist.init(args.device, args.dist_timeout)
    hold_folder(args.dump_path, "eval_knn")
    search_device = process.device if args.use_cuda and process.device.type != "mps" else "cpu"
    rows, start = [], time.perf_counter()

    def features_of(network):
        model = network.model.to(process.device)

        def extract(dataset):
            options = eval_flags.extraction_options(args, network, dataset, process.device)
            return extract_features(model, dataset, **options)

        return split_features(extract, train, val)

    pixels_of = functools.partial(
        raw_pixels,
        batch_size=args.batch_size,
        num_workers=args.workers,
        loader_timeout=args.loader_timeout,
    )

    def add_rows(name, split):
        rows.extend(evaluate(name, [x.to(search_device) for x in split], args))

    # ============ features of the network ============
    if args.load_features:
        given = {name: settings[name] for name in SETTINGS if name in args.given}
        split = []
        for part in ("train", "val"):
            features, labels, settings = load_features(args.load_features, part, given)
            split += [features, labels]
        logger.info(f"features of {args.load_features}: {settings}")
    else:
        split = features_of(network)
    if args.dump_features:
        train_features, train_labels, val_features, val_labels = split
        dump_features(args.dump_features, "train", train_features, train_labels, settings)
        dump_features(args.dump_features, "val", val_features, val_labels, settings)
    add_rows(settings["feature"] if settings["pretrained"] else UNTRAINED, split)
    if args.neighbour_sheet:
        draw_neighbours(split, train, val, args.dump_path, f"{args.feature} of {network.origin}")

    # ============ baselines ============
    if args.untrained and args.pretrained:
        add_rows(UNTRAINED, features_of(network.untrained()))
    if args.raw_pixels:
        add_rows("raw pixels", split_features(pixels_of, train, val))

    seconds = time.perf_counter() - start
    if process.rank == 0:
        path = Path(args.dump_path) / "eval_knn.json"
        result = {"settings": settings, "temperature": args.temperature, "seconds": seconds}
        path.write_text(json.dumps({**result, "results": rows}, indent=1) + "\n")
        log_table(rows)
        if not settings["pretrained"]:
            logger.warning("WARNING: no --pretrained: the network is UNTRAINED, a mere baseline")
        logger.info(f"{seconds:.1f} s, written to {path}")
    return finish()


# ============ arguments ============
def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser, positive = flags.Parser(__doc__), flags.positive

    add = parser.add_argument_group("method").add_argument
    add("--nb_knn", type=positive(int), nargs="+", default=[10, 20, 100, 200],
        help="k, the neighbours that vote")
    add("--temperature", type=positive(float), default=0.07, help="tau of exp(cosine / tau)")
    add("--labels_per_class", type=flags.at_least_zero(int), nargs="+", default=[0],
        help="also evaluate with so many labelled training images of each class; 0: do not")
    add("--draws", type=positive(int), default=20, help="random choices of --labels_per_class")
    add("--feature", default="backbone", choices=["backbone", "embedding"],
        help="the pooled output of the trunk, or that of the projection head")
    add("--raw_pixels", action="store_true", help="also evaluate the pixels themselves")
    add("--neighbour_sheet", action="store_true", help="draw some images and their neighbours")
    add("--untrained", action="store_true", help="also evaluate the network before its training")
    add("--knn_backend", default="torch", choices=["torch", "faiss"], help="of the exact search")
    add("--use_cuda", type=flags.boolean, default=True,
        help="search on the GPU where there is one; false: on the CPU")

    eval_flags.add_network_args(parser)
    add = eval_flags.add_image_args(parser)
    add("--interpolation", default="bicubic", choices=["bilinear", "bicubic"], help="of the resize")
    add("--batch_size", "--batch_size_per_gpu", type=positive(int), default=128,
        help="images per process")
    add("--dump_features", default=None, help="folder to keep the features in")
    add("--load_features", default=None, help="folder of --dump_features to take features from")
    flags.add_runtime_args(parser)
    return parser
    # fmt: on


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    for name in ("raw_pixels", "untrained", "neighbour_sheet", "dump_features"):
        if args.load_features and getattr(args, name):
            raise ValueError(f"--load_features opens no images: leave out --{name}")
    eval_flags.check_images(args)


if __name__ == "__main__":
    flags.run(main)
