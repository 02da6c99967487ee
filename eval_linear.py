"""Linear classification of frozen features: the usual measure of a network trained without labels.

Published protocols, chosen by --protocol; a flag on the command line wins over each:
  swav  arXiv:2006.09882, appendix A.3: batches of 256, learning rate 0.3, weight decay 1e-6; of a
        ResNet the pooled features, or with --global_pooling false windows of its last map
  dino  arXiv:2104.14294, section 3.2: 128 images per process, 0.001 x batch / 256, no weight decay,
        bicubic validation images; tokens of the last 4 blocks of a ViT, of the last one of vit_base
  deepcluster, deepercluster  arXiv:1807.05520, 1905.01278: with --conv, the pooled map of one
        convolution of AlexNet or VGG16, learning rate lr / sqrt(1 + lr wd t) at iteration t
  places205, inat18  SwAV, appendix A.5: batches of 256, 28 or 84 epochs, learning rate 0.01, a tenth
        every 8 or 24 epochs, weight decay 1e-4; the data as they are distributed
All: SGD, 100 epochs (deepcluster 90), crops and flips, 256/224 px centre crops to validate.
--solver lbfgs instead: multinomial logistic regression (thesis of M. Caron, Table 5.5), see below.

  python eval_linear.py --pretrained runs/swav             a run: its args.json says the rest
  python eval_linear.py --pretrained runs/dino --lrs 0.0003 0.001 0.003 0.01
  torchrun --nproc_per_node 8 eval_linear.py --pretrained swav_800ep.pth.tar --data_path /imagenet
  python eval_linear.py --pretrained runs/deepcluster --conv 5 --tencrops --cross_valid 5
  python eval_linear.py --arch vit_small --pretrained dino.pth --evaluate --linear_weights linear.pth
  python eval_linear.py --pretrained dino.pth --solver lbfgs --label_fractions 0.01 0.1 1
Starting the same command again continues where it stopped. Everything that training writes lies in
--dump_path/linear/, only the results beside it, in eval_linear.json: a run keeps its checkpoint.

Deviations from the authors' code: any number of classes and images; without --batch_size a protocol
but dino's has 256 images over all processes; validation features are computed once, the last, smaller
batch is left out; --use_bn is over all processes; folds take all images, in turns; what does not fit
stops the run.
Kept: SwAV's red standard deviation 0.228 in its protocol; the best epoch by validation is reported.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import logging
import math
from pathlib import Path

import torch

from src import dist
from src.data.datasets import open_dataset
from src.evaluate import flags as eval_flags
from src.evaluate import linear_flags
from src.evaluate.conv_features import KINDS, conv_input
from src.evaluate.linear_classifiers import (
    LinearClassifiers,
    ManySGD,
    accuracies,
    epoch_lr,
    inverse_sqrt_lr,
    losses,
)
from src.evaluate.linear_features import CachedBatches, FrozenFeatures, linear_input
from src.evaluate.linear_files import Probe, saved_classifiers
from src.evaluate.linear_flags import (
    DINO_BATCH,
    PROTOCOLS,
    REFERENCE_BATCH,
    TRANSFER,
    check_solver,
    chosen_folds,
    fill_in_batch,
    labelled_sets,
    log_plan,
    share_of_labels,
    weight_decay,
)
from src.evaluate.linear_results import (
    log_epoch,
    log_progress,
    report,
    report_folds,
    report_logistic,
)
from src.evaluate.logistic import unit_rows
from src.evaluate.logistic_search import accuracy, open_search, stored_images
from src.evaluate.splits import (
    check_labelled,
    count_classes,
    hold_out,
    open_splits,
    split_folds,
)
from src.evaluate.stored_features import labelled_digest, stored_features
from src.evaluate.ten_crops import VIEWS
from src.evaluate.voc import TESTED_ON
from src.labels.features import share
from src.nets.pooling import shape_of_features
from src.nets.pretrained import IMAGENET_RED, MODEL_FLAGS, SWAV_RED
from src.nets.weights import fingerprint
from src.run import checkpoint, flags, image_flags
from src.run.lock import hold_folder
from src.run.log import RunLog, Stopwatch, describe_run, setup_logging
from src.run.stop import StopSignal, finish, leave

logger = logging.getLogger(__name__)

# What features depend on, and what the classifiers do besides.
FEATURES = (
    *(*MODEL_FLAGS, "n_last_blocks", "avgpool_patchtokens", "global_pooling", "conv"),
    *("conv_pooling", "size", "mean", "std", "interpolation", "in_chans"),
)
TRAINING = (
    *("epochs", "wd", "momentum", "nesterov", "scheduler_type", "decay_epochs", "gamma"),
    *("final_lr", "use_bn", "cache_features", "no_flip", "tencrops", "split", "seed"),
)
NAMED = (
    *("protocol", "pretrained", "checkpoint_key"),
    *("data_path", "train_path", "val_path", "data_root", "label_column"),
)
STOP_CHECK = 10  # iterations between agreeing on a signal, when there are several processes


# ============ one epoch ============
def train_one_epoch(probe, batches, lrs, epoch, start, iters_per_epoch, stop, log, args):
    """Train all classifiers for one epoch, from iteration `start`; returns the iterations done.

    batches: (epoch, start, stopwatch) -> features (B, D) and labels (B,) of this process, see
    src.evaluate.linear_features. lrs: iteration, over all epochs -> learning rate of each classifier. Fewer
    than all iterations are done when a signal asked to stop.
    """
    world_size, stopwatch = dist.world_size(), Stopwatch()
    total, device = args.batch_size * world_size, probe.classifiers.linear.weight.device
    probe.classifiers.train()
    current_lrs = None
    for it, (features, labels) in enumerate(batches(epoch, start, stopwatch), start):
        lrs_here = lrs(epoch * iters_per_epoch + it)
        if lrs_here != current_lrs:  # a tensor is made only where they change
            current_lrs, step_sizes = lrs_here, torch.tensor(lrs_here, device=device)  # (L,)
        loss = losses(probe.classifiers(features), labels) / total  # (L,)
        loss.sum().backward()
        probe.optimizer.step(step_sizes)

        done = it + 1
        stopping = (world_size == 1 or done % STOP_CHECK == 0) and stop.agreed()
        if stopping or done % args.log_freq == 0 or done == iters_per_epoch:
            loss = dist.all_reduce_sum(loss.detach()).tolist()
            rates = stopwatch.rates(total, (args.epochs - epoch) * iters_per_epoch - done)
            log_progress(
                log,
                epoch=epoch,
                epochs=args.epochs,
                it=it,
                iters_per_epoch=iters_per_epoch,
                lrs=current_lrs,
                loss=loss,
                rates=rates,
                folder=probe.folder,
            )
        if stopping:
            return done
    return iters_per_epoch


def learning_rates(lrs, iters_per_epoch, args):
    """Iteration, over all epochs -> the learning rates of the classifiers, of --scheduler_type."""
    if args.scheduler_type == "inverse_sqrt":
        return lambda t: [inverse_sqrt_lr(lr, args.wd, t) for lr in lrs]
    decay = (args.gamma, args.decay_epochs) if args.scheduler_type == "step" else None
    return lambda t: [
        epoch_lr(lr, t // iters_per_epoch, epochs=args.epochs, final_lr=args.final_lr, decay=decay)
        for lr in lrs
    ]


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns 0, or 128 + the signal when a signal stopped it."""
    args = parse_args(argv)
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    check_args(args)
    num_folds, folds = chosen_folds(args.cross_valid, args.kfold)
    splits = open_parts(args, num_folds)  # fold -> training and validation images
    train, val = splits(folds[0])
    num_classes = count_classes(args.num_labels, train, val)
    network = eval_flags.open_network(args)
    if args.solver == "lbfgs":
        return evaluate_logistic(network, train, val, num_classes, args)
    model = network.model
    forward = classifier_input(model, args)
    shape = shape_of_features(forward, args.in_chans, args.size, args.arch, "--size")
    dim = math.prod(shape)  # what does not fit is found before anything is started
    args.mean, args.std = network.normalisation(train, red_of_protocol(args))
    settings = {**feature_settings(args), "weights": fingerprint(model, network.head)}
    named = {name: getattr(args, name) for name in NAMED}
    out, folder = Path(args.dump_path), Path(args.dump_path) / "linear"
    if args.evaluate:
        saved = saved_classifiers(
            args.linear_weights, folder, settings, dim=dim, num_classes=num_classes
        )
    else:
        fill_in_batch(args, launch.world_size, min(len(splits(fold)[0]) for fold in folds))
    checkpoint.check_writable(out if args.evaluate else folder)

    process = dist.init(args.device, args.dist_timeout)
    hold_folder(out, "eval_linear")
    precision = dist.resolve_precision(args.precision, process.device)
    model.to(process.device)
    frozen = FrozenFeatures(
        forward,
        dim,
        size=args.size,
        normalisation=(args.mean, args.std),
        interpolation=args.interpolation,
        process=process,
        precision=precision,
        workers=args.workers,
        loader_timeout=args.loader_timeout,
    )

    # ============ an evaluation alone ============
    if args.evaluate:
        evaluate(saved, frozen, val, settings=settings | named, args=args)
        return finish()

    # ============ classifiers ============
    channels = (dim if args.global_pooling else model.num_features) if args.use_bn else 0
    settings |= {name: getattr(args, name) for name in TRAINING}
    stop, paths = StopSignal(), []
    for fold in folds:
        if paths and stop.agreed():
            return leave(stop)
        settings["fold"] = None if fold is None else [fold, num_folds]
        probe = train_classifiers(
            frozen,
            splits(fold),
            num_classes=num_classes,
            bn_channels=channels,
            folder=folder if fold is None else folder / f"fold{fold}",
            settings=settings,
            stop=stop,
            args=args,
        )
        if probe is None:
            return leave(stop)
        paths.append(out / ("eval_linear.json" if fold is None else f"eval_linear_fold{fold}.json"))
        report(
            probe.settings["lrs"],
            probe.history,
            settings=probe.settings | named,
            path=paths[-1],
            untrained=not args.pretrained,
        )
    if len(folds) > 1:
        report_folds(paths, out / "eval_linear.json")
    return finish(stop)


def red_of_protocol(args):
    """The standard deviation of red by which ImageNet's images are divided, None for the network's own."""
    if args.protocol in TRANSFER:
        return None
    return SWAV_RED if args.protocol == "swav" and args.sobel is None else IMAGENET_RED


def classifier_input(model, args):
    """Images -> what is classified, (B, D), by the flags of the method."""
    if args.conv:
        return conv_input(model, args.conv, args.conv_pooling)
    return linear_input(
        model,
        args.n_last_blocks,
        avgpool=args.avgpool_patchtokens,
        global_pooling=args.global_pooling,
    )


def feature_settings(args):
    """What features depend on, by name, without --conv_pooling where no convolution is pooled."""
    settings = {name: getattr(args, name) for name in FEATURES}
    if args.conv is None:
        del settings["conv_pooling"]
    return settings


def evaluate(saved, frozen, val, *, settings, args):
    """Write the accuracies of saved classifiers, (classifiers, learning rates, epoch)."""
    classifiers, lrs, epoch = saved
    device = frozen.process.device
    features, labels = frozen.of(val, args.batch_size or DINO_BATCH, args.tencrops)
    classifiers.to(device)
    views = VIEWS if args.tencrops else 1
    result = accuracies(classifiers, features, labels, device=device, views=views)
    report(
        lrs,
        [{"epoch": epoch, **result}],
        settings=settings,
        path=Path(args.dump_path) / "eval_linear_evaluate.json",
        untrained=not args.pretrained,
    )


def evaluate_logistic(network, train, val, num_classes, args):
    """Logistic regression of each set of labelled images; returns as main."""
    args.batch_size = args.batch_size or DINO_BATCH
    sets = labelled_sets(args, train)
    forward = classifier_input(network.model, args)
    width = math.prod(shape_of_features(forward, args.in_chans, args.size, args.arch, "--size"))
    args.mean, args.std = network.normalisation(train)
    out, folder = Path(args.dump_path), Path(args.dump_path) / "logistic"
    checkpoint.check_writable(folder)
    process = dist.init(args.device, args.dist_timeout)
    hold_folder(out, "eval_linear")
    setup_logging(folder, process.rank == 0)
    stop = StopSignal()
    network.model.to(process.device)
    settings = {**feature_settings(args), "weights": fingerprint(network.model, network.head)}
    extraction = eval_flags.extraction_options(args, network, train, process.device)

    def features_of(images, name, indices=None):
        return stored_features(
            folder, name, forward, images, width, settings, stop, indices=indices, **extraction
        )

    # ============ features ============
    name, union = stored_images(folder, sets, len(train))
    matrix = features_of(train, name, union)
    val_matrix = None if matrix is None else features_of(val, "val")
    if val_matrix is None:
        return leave(stop)
    own = share(len(val))
    val_rows = unit_rows(val_matrix[own.start : own.stop], process.device)

    # ============ fits ============
    rows = []
    for label, indices in sets.items():
        search = open_search(
            label,
            indices,
            matrix=matrix,
            union=union,
            labels=train.labels,
            num_classes=num_classes,
            folder=folder,
            settings={
                **settings,
                "images": labelled_digest(train, indices),
                "classes": num_classes,
            },
            device=process.device,
            penalties=args.penalties,
            intercept=args.intercept,
            seed=args.seed,
        )
        found = search.run(stop)
        if found is None:
            return leave(stop)
        weights = found.pop("weights")
        result = accuracy(val_rows, val.labels[own.start : own.stop], weights, args.intercept)
        rows.append({"labels": label, "images": len(indices), **result, **found})
    named = {name: getattr(args, name) for name in NAMED if name != "protocol"}
    named["precision"] = extraction["precision"]
    report_logistic(rows, settings | named, out / "eval_logistic.json", not args.pretrained)
    return finish(stop)


def train_classifiers(frozen, split, *, num_classes, bn_channels, folder, settings, stop, args):
    """Train on one split, or go on with it: the Probe, None when a signal asked to stop.

    split: training and validation images. bn_channels: of the batch norm, 0 for none.
    """
    (train, val), process = split, frozen.process
    total = args.batch_size * process.world_size
    iters_per_epoch = len(train) // total  # the last, smaller batch is left out
    factor = total / REFERENCE_BATCH if args.protocol == "dino" else 1.0
    lrs = [lr * factor for lr in args.lrs or [args.lr]]
    counts = [len(train), len(val), num_classes]
    settings = {**settings, "lrs": lrs, "batch": total, "images": counts}
    classifiers = LinearClassifiers(
        len(lrs), frozen.dim, num_classes, bn_channels=bn_channels, seed=args.seed
    )
    classifiers.to(process.device)
    optimizer = ManySGD(classifiers, args.wd, nesterov=args.nesterov, momentum=args.momentum)
    probe = Probe(classifiers, optimizer, folder=folder, settings=settings)
    first_epoch, samples_done = probe.resume((args.epoch, args.start_iter * total))
    folder.mkdir(parents=True, exist_ok=True)
    setup_logging(folder, process.rank == 0)
    if process.rank == 0:  # not before: what may not go on leaves the folder as it was
        describe_run(vars(args), folder)
    log_plan(
        args,
        train,
        val,
        num_classes=num_classes,
        dim=frozen.dim,
        total=total,
        lrs=lrs,
        process=process,
    )

    # ============ data ============
    start = samples_done // total
    if first_epoch == args.epochs:
        logger.info(f"{folder} is trained for its {args.epochs} epochs already")
        return probe
    with stop.at_once():  # all is saved
        val_features, val_labels = frozen.of(val, args.batch_size, args.tencrops)
        if args.cache_features:
            features, _ = frozen.of(train, args.batch_size)
            batches = CachedBatches(
                features, train, batch_size=args.batch_size, process=process, seed=args.seed
            )
        else:
            batches = frozen.batches(
                train,
                args.batch_size,
                seed=args.seed,
                flip=not args.no_flip,
                unscaled=args.protocol == "deepcluster",
            )

    # ============ epochs ============
    log = RunLog(folder if process.rank == 0 else None, tensorboard=False)
    schedule = learning_rates(lrs, iters_per_epoch, args)
    for epoch in range(first_epoch, args.epochs):
        done = train_one_epoch(
            probe,
            batches,
            schedule,
            epoch=epoch,
            start=start,
            iters_per_epoch=iters_per_epoch,
            stop=stop,
            log=log,
            args=args,
        )
        last, start = epoch + 1 == args.epochs, 0
        if done < iters_per_epoch:
            probe.save(epoch, done * total)
            return None
        if last or (epoch + 1) % args.val_freq == 0:
            views = VIEWS if args.tencrops else 1
            result = accuracies(
                classifiers, val_features, val_labels, device=process.device, views=views
            )
            probe.history.append({"epoch": epoch + 1, **result})
            log_epoch(log, epoch, iters_per_epoch=iters_per_epoch, lrs=lrs, history=probe.history)
        probe.save(epoch + 1, 0)
        if not last and stop.agreed():
            return None
    log.close()
    return probe


def open_parts(args, num_folds):
    """A function: fold, or None -> training and validation images."""
    opening = image_flags.opening_options(args)
    if args.evaluate and args.val_path and not args.train_path:  # it is enough to evaluate alone
        val = open_dataset(args.val_path, "val", args.in_chans, flag="--val_path", **opening)
        check_labelled(val, "--val_path")
        return lambda fold: (val, val)
    train, val = open_splits(
        args.data_path,
        train_path=args.train_path,
        val_path=args.val_path,
        in_chans=args.in_chans,
        split=args.split,
        **opening,
    )
    if num_folds is not None:
        return split_folds(train, num_folds)
    return lambda fold: (train, val) if val is not None else hold_out(train)


# ============ arguments ============
def parse_args(argv):
    """The arguments; what is not on the command line is of the run that is evaluated, or the protocol."""
    args, _ = linear_flags.parse_args(get_parser(), argv)
    return args


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive = flags.at_least_zero, flags.positive

    add = parser.add_argument_group("method").add_argument
    add("--solver", default="sgd", choices=["sgd", "lbfgs"],
        help="sgd: of --protocol; lbfgs: logistic regression to its minimum, of features of norm 1 without "
        "augmentation")
    add("--label_fractions", type=share_of_labels, nargs="+", default=None,
        help="of --solver lbfgs: shares of the labels, such as 0.01 0.1 1, as many of each class by --seed "
        "(default: 1)")
    add("--label_lists", nargs="+", default=None,
        help="of --solver lbfgs: published lists of labelled images, texts with a file name in each line")
    add("--penalties", type=positive(float), nargs="+", default=None,
        help="of --solver lbfgs: lambda n of lambda / 2 |W|^2, or 1 / C; of several the best for a fifth of "
        "the labelled images, held out (default: 10 3 1 0.3 ... 0.001)")
    add("--intercept", action=argparse.BooleanOptionalAction, default=False,
        help="of --solver lbfgs, not penalised; published without")
    add("--protocol", default="auto", choices=["auto", *PROTOCOLS],
        help="auto: dino for vision transformers, for runs of main_dino.py and with --checkpoint_key "
        "teacher; with --conv deepcluster for alexnet, else deepercluster; else swav")
    add("--conv", type=positive(int), default=None,
        help="the convolution whose map is classified, of alexnet (1 to 5) or vgg16 (1 to 13)")
    add("--conv_pooling", default="average", choices=KINDS,
        help="of that map; average as in the thesis (before Table 3.3) and the authors' code")
    add("--n_last_blocks", type=positive(int), default=None,
        help="blocks of a vision transformer whose class tokens are used (default: 4; vit_base 1)")
    add("--avgpool_patchtokens", type=flags.boolean, default=None,
        help="also the mean of the patch tokens (default: false; vit_base true)")
    add("--global_pooling", type=flags.boolean, default=True,
        help="of a ResNet's last map; false: windows of 6 x 6 cells, 8192 features of a ResNet-50")
    add("--use_bn", type=flags.boolean, default=False, help="a batch norm before the classifier")
    add("--cache_features", action=argparse.BooleanOptionalAction, default=False,
        help="compute the features once, from centre crops: no augmentation (small sets: default)")
    image_flags.add_flip_args(add)
    add("--num_labels", type=positive(int), default=None,
        help="the largest number of classes to accept; they are counted in the data")
    add("--split", default="train", choices=TESTED_ON,
        help="to train on; trainval: train/ and val/, validated on test/, or so of a VOC 2007 folder")
    add("--cross_valid", type=at_least_zero(int), default=None,
        help="folds of the training images: each is left out once and validated on")
    add("--kfold", type=at_least_zero(int), default=None,
        help="only this fold, from 0; of the two the larger is the number of folds")
    add("--tencrops", action="store_true",
        help="validate on the corners, the centre and their mirror images: the mean of softmax")
    add("--evaluate", action="store_true", help="train nothing: evaluate what was trained")
    add("--linear_weights", default=None, help="with --evaluate: a published linear classifier")

    eval_flags.add_network_args(parser)
    add = eval_flags.add_image_args(parser)
    add("--interpolation", default=None, choices=["bilinear", "bicubic"],
        help="of the resize of validation images (default: dino bicubic, else bilinear)")
    add("--model", dest="pretrained", default=argparse.SUPPRESS, help="the same as --pretrained")
    add("--data", dest="data_path", default=argparse.SUPPRESS, help="the same as --data_path")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", "--nepochs", type=positive(int), default=100,
        help="passes over the training images; deepcluster 90")
    add("--epoch", type=at_least_zero(int), default=0, help="where to begin without a checkpoint")
    add("--start_iter", type=at_least_zero(int), default=0, help="iteration of --epoch to begin at")
    add("--batch_size", "--batch_size_per_gpu", type=positive(int), default=None,
        help="images per process (default: dino 128, else 256 over all processes)")
    add("--lr", type=positive(float), default=None,
        help="learning rate, of dino times the global batch / 256 (default: by --protocol: swav 0.3, "
        "dino 0.001, deepcluster 0.01, deepercluster 0.005 to 0.03 by --conv)")
    add("--lrs", type=positive(float), nargs="+", default=None,
        help="several, instead of --lr: a classifier each, all trained in one pass")
    add("--wd", "--weight_decay", type=weight_decay, default=None,
        help="weight decay; -4 is 1e-4 (default: swav 1e-6, dino 0, deepcluster 1e-4, deepercluster "
        "1e-5)")
    add("--momentum", type=flags.probability, default=0.9, help="of SGD")
    add("--nesterov", type=flags.boolean, default=False, help="Nesterov's momentum")
    add("--scheduler_type", default="cosine", choices=["step", "cosine", "inverse_sqrt"],
        help="step and cosine an epoch at a time; inverse_sqrt, of deepcluster and deepercluster: lr / "
        "sqrt(1 + lr wd t)")
    add("--decay_epochs", type=positive(int), nargs="+", default=[60, 80], help="of step")
    add("--gamma", type=positive(float), default=0.1, help="factor of step")
    add("--final_lr", type=at_least_zero(float), default=0, help="learning rate that cosine nears")
    add("--val_freq", type=positive(int), default=1, help="epochs between validations")
    add("--log_freq", type=positive(int), default=50, help="iterations between log lines")
    add("--verbose", action="store_true", help="a log line every 10 iterations")
    flags.add_runtime_args(parser)
    return parser
    # fmt: on


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    dist.resolve_device(args.device)
    eval_flags.check_images(args)
    check_solver(args)
    if args.lrs and "lr" in args.given:
        raise ValueError("--lr and --lrs exclude each other: leave one out")
    if args.linear_weights and not args.evaluate:
        raise ValueError("--linear_weights is for --evaluate: give both, or leave it out")
    if args.evaluate and args.cross_valid is not None:
        raise ValueError("--evaluate and --cross_valid exclude each other: leave one out")
    if args.epoch >= args.epochs:
        raise ValueError(f"--epoch {args.epoch} must be below --epochs {args.epochs}")
    if args.conv and not args.global_pooling:
        raise ValueError("--global_pooling false is of a ResNet: leave it out with --conv")


if __name__ == "__main__":
    flags.run(main)
