"""Semi-supervised learning: a pre-trained network is fine-tuned on few labelled images.

SwAV, arXiv:2006.09882, appendix A.4 and Table 1: the whole network under a new linear classifier, on
1 % or 10 % of ImageNet's labels; appendix B.5 and Table 10: on 13 or 128 images of each class.
20 epochs, batches of 256, SGD with momentum 0.9 and no weight decay; a learning rate for the network
and one for the classifier, both multiplied by 0.2 after epochs 12 and 16: 0.02 and 5 for 1 %, 0.01 and
0.2 for 10 %. Random resized crops and flips, 256/224 px centre crops to validate.

  python eval_semisup.py --pretrained runs/swav --labels_per_class 5
  torchrun --nproc_per_node 8 eval_semisup.py --pretrained swav_800ep.pth.tar --data_path /imagenet \\
      --labels_perc 1 --label_list 1percent.txt      the list that SimCLR's authors distribute
  torchrun --nproc_per_node 8 eval_semisup.py --pretrained none --data_path /imagenet   from scratch
Without --label_list as many images of each class are drawn by --seed; all images of a class that has
fewer. Starting the same command again continues where it stopped. What training writes lies in
--dump_path/semisup/<labels>, the results beside it, in eval_semisup_<labels>.json, one line.

Deviations from the authors' code: the list is read from a file, never downloaded, and without one the
images are drawn, all classes alike; without --batch_size a batch has 256 images over all processes;
the last, smaller batch of an epoch is left out; any number of classes and images; what does not fit
stops the run. Kept: the best epoch by validation is reported, beside the last one.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import logging
from pathlib import Path

from src import dist
from src.data.augment import Augment
from src.evaluate import finetuning_flags
from src.evaluate import flags as eval_flags
from src.evaluate.finetune_images import TrainingImages
from src.evaluate.finetuning import (
    FineTunedNetwork,
    FineTuning,
    Plan,
    fit,
    report,
    trunk_and_classifier,
)
from src.evaluate.finetuning_flags import FEW_LABELS
from src.evaluate.linear_features import ONLY_FLIP
from src.evaluate.splits import count_classes
from src.evaluate.stored_features import labelled_digest
from src.nets.pretrained import MODEL_FLAGS
from src.nets.weights import fingerprint
from src.optim import step_lr
from src.run import checkpoint, flags, image_flags
from src.run.lock import hold_folder
from src.run.log import RunLog, describe_run, setup_logging
from src.run.stop import StopSignal, finish, leave

logger = logging.getLogger(__name__)

BATCHES = {"imagenet": 256, "cifar": 64, "tiny": 25}  # images over all processes, by preset
# Learning rates of the network and of the classifier, by how many images of a class are labelled.
RATES = {"few": {"lr": 0.02, "lr_last_layer": 5.0}, "many": {"lr": 0.01, "lr_last_layer": 0.2}}
# For small images, and labels by the dozen, with which the rate of 1 % for the classifier diverges.
SMALL = {"lr": 0.02, "lr_last_layer": 0.05}
PRESETS = {
    "imagenet": {},
    "cifar": {**SMALL, "min_scale": 0.3, "workers": 2},
    "tiny": {**SMALL, "min_scale": 0.4, "no_flip": True, "workers": 0},
}
# What the result depends on.
SETTINGS = (
    *(
        *MODEL_FLAGS,
        "in_chans",
        "size",
        "mean",
        "std",
        "interpolation",
        "min_scale",
        "no_flip",
        "seed",
    ),
    *("epochs", "lr", "lr_last_layer", "wd", "decay_epochs", "gamma", "val_freq"),
)
NAMED = ("pretrained", "checkpoint_key", "data_path", "train_path", "val_path", "label_list")


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Fine-tune and evaluate; returns 0, or 128 + the signal when a signal stopped it."""
    args = parse_args(argv)
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    check_args(args)
    every, val = finetuning_flags.open_parts(args)
    train, labels, digest = finetuning_flags.labelled_part(args, every)
    num_classes = count_classes(None, every, val)
    fill_in_rates(args, len(train), num_classes)
    finetuning_flags.fill_in_batch(args, launch.world_size, len(train), BATCHES[args.preset])
    network = eval_flags.open_network(args)
    args.mean, args.std = network.normalisation(every)
    total = args.batch_size * launch.world_size
    settings = {
        **{name: getattr(args, name) for name in SETTINGS},
        "weights": fingerprint(network.model, network.head),
        "labels": labels,
        "labelled": digest,
        "batch": total,
        "images": [len(train), len(val), num_classes],
        "content": [labelled_digest(train), labelled_digest(val)],
    }
    module = FineTunedNetwork(network.model, num_classes, args.seed)
    finetuning_flags.check_network(module, args, [args.size])
    out, folder = Path(args.dump_path), Path(args.dump_path) / "semisup" / labels
    checkpoint.check_writable(folder)

    process = dist.init(args.device, args.dist_timeout)
    hold_folder(folder, "eval_semisup")
    precision = dist.resolve_precision(args.precision, process.device)

    # ============ model and optimizer ============
    state = FineTuning(
        module,
        lambda network: trunk_and_classifier(network, args.lr, args.lr_last_layer),
        optimizer="sgd",
        weight_decay=args.wd,
        process=process,
        precision=precision,
        folder=folder,
        settings=settings,
    )
    start = state.resume()
    setup_logging(folder, process.rank == 0)
    if process.rank == 0:  # not before: what may not go on leaves the folder as it was
        described = eval_flags.with_network(args, network)
        describe_run({**described, "size_crops": [args.size]}, folder)
    plan = make_plan(args, len(train) // total, total)
    log_plan(args, train, val, plan, network.origin, labels, num_classes)

    # ============ data ============
    batches = TrainingImages(
        train,
        {
            "num_crops": [1],
            "size_crops": [args.size],
            "min_scale_crops": [args.min_scale],
            "max_scale_crops": [1.0],
            "interpolation": args.interpolation,
        },
        Augment(args.mean, args.std, **ONLY_FLIP, flip_prob=0.0 if args.no_flip else 0.5),
        num_classes=num_classes,
        batch_size=args.batch_size,
        process=process,
        seed=args.seed,
        workers=args.workers,
        loader_timeout=args.loader_timeout,
    )

    # ============ training ============
    stop = StopSignal()
    log = RunLog(folder if process.rank == 0 else None, tensorboard=False)
    extraction = finetuning_flags.extraction_options(args, process, precision)
    is_done = fit(
        state,
        batches,
        plan,
        start=start,
        evaluate=lambda: state.evaluate(val, extraction),
        stop=stop,
        log=log,
    )
    if not is_done:
        return leave(stop)
    log.close()
    named = {name: getattr(args, name) for name in NAMED}
    row = {"network": network.origin, "labels": f"{labels} ({len(train):,} images)"}
    report(state.history, row, settings | named, out / f"eval_semisup_{labels}.json")
    return finish(stop)


def make_plan(args, iters_per_epoch, total):
    """The steps of A.4: all rates are multiplied by --gamma after each of --decay_epochs."""
    return Plan(
        epochs=args.epochs,
        iters_per_epoch=iters_per_epoch,
        batch=total,
        lr_factor=lambda t: step_lr(1.0, t // iters_per_epoch, args.decay_epochs, args.gamma),
        seed=args.seed,
        log_freq=args.log_freq,
        val_freq=args.val_freq,
        checkpoint_iters=args.checkpoint_iters,
    )


def log_plan(args, train, val, plan, origin, labels, num_classes):
    """Say what will be computed, before it is."""
    for line in (
        f"network     {origin}",
        f"data        {train.name}: {len(train):,} images with labels ({labels}), {len(val):,} to "
        f"validate, {num_classes} classes",
        f"batch       {plan.batch} images; {plan.iters_per_epoch:,} iterations an epoch, "
        f"{plan.epochs} epochs",
        f"optimizer   sgd, learning rate {args.lr:g}, of the classifier {args.lr_last_layer:g}, times "
        f"{args.gamma:g} after epochs {', '.join(map(str, args.decay_epochs))}",
    ):
        logger.info(line)
    reference = BATCHES[args.preset]
    if plan.batch != reference and "lr" not in args.given:
        logger.info(f"note: the learning rates are for batches of {reference} images")


# ============ arguments ============
def parse_args(argv):
    """The arguments; what is not on the command line is of the run that is evaluated, or the preset."""
    args, _ = eval_flags.parse_args(get_parser(), argv, "eval_semisup")
    for name, value in PRESETS[args.preset].items():
        if name not in args.given:
            setattr(args, name, value)
    return args


def fill_in_rates(args, num_labelled, num_classes):
    """The learning rates of 1 % or of 10 %, where the command line says none."""
    rates = RATES["few" if num_labelled <= FEW_LABELS * num_classes else "many"]
    for name, value in rates.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive = flags.at_least_zero, flags.positive

    add = parser.add_argument_group("method").add_argument
    add("--labels_perc", type=finetuning_flags.percent, default="10",
        help="labelled images, of all in percent: as many of each class, drawn by --seed")
    add("--labels_per_class", type=positive(int), default=None,
        help="labelled images of each class instead, such as 13 or 128")
    add("--label_list", default=None,
        help="a text with the name of a labelled image in each line instead, such as SimCLR's "
        "1percent.txt")

    eval_flags.add_network_args(parser)
    add = eval_flags.add_image_args(parser)
    add("--interpolation", default="bilinear", choices=["bilinear", "bicubic"],
        help="of the resize of crops and validation images")
    add("--min_scale", type=flags.probability, default=0.08,
        help="smallest area of a training crop, as a share of the image")
    image_flags.add_flip_args(add)

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=20, help="passes over the labelled images")
    add("--batch_size", type=positive(int), default=None,
        help="images per process (default: 256 over all processes)")
    add("--lr", type=at_least_zero(float), default=None,
        help="learning rate of the network (default: 0.01, for at most 40 images a class 0.02)")
    add("--lr_last_layer", type=positive(float), default=None,
        help="learning rate of the classifier (default: 0.2, for at most 40 images a class 5)")
    add("--decay_epochs", type=positive(int), nargs="+", default=[12, 16],
        help="epochs after which the learning rates are multiplied by --gamma")
    add("--gamma", type=positive(float), default=0.2, help="that factor")
    add("--wd", type=at_least_zero(float), default=0.0, help="weight decay")
    finetuning_flags.add_loop_args(parser)
    return parser
    # fmt: on


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    dist.resolve_device(args.device)
    eval_flags.check_images(args)
    if args.min_scale == 0:
        raise ValueError("--min_scale 0 must be above 0: the published value is 0.08")
    if args.label_list and args.labels_per_class is not None:
        raise ValueError("--label_list and --labels_per_class exclude each other: leave one out")


if __name__ == "__main__":
    flags.run(main)
