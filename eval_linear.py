"""Linear classification of frozen features: the usual measure of a network trained without labels.

Two published protocols, chosen by --protocol; a flag on the command line wins over either:
  swav  arXiv:2006.09882, appendix A.3: batches of 256, learning rate 0.3, weight decay 1e-6; of a
        ResNet the pooled features, or with --global_pooling false windows of its last map
  dino  arXiv:2104.14294, section 3.2: 128 images per process, 0.001 x batch / 256, no weight decay,
        bicubic validation images; the class tokens of the last 4 blocks of a vision transformer,
        for vit_base that of the last block and the mean of its patch tokens
Both: 100 epochs of SGD, cosine, random resized crops and flips, 256/224 px centre crops to validate.

  python eval_linear.py --pretrained runs/swav             a run: its args.json says the rest
  python eval_linear.py --pretrained runs/dino --lrs 0.0003 0.001 0.003 0.01
  torchrun --nproc_per_node 8 eval_linear.py --pretrained swav_800ep.pth.tar --data_path /imagenet
  python eval_linear.py --arch vit_small --pretrained dino.pth --evaluate --linear_weights linear.pth
Starting the same command again continues where it stopped. Everything that training writes lies in
--dump_path/linear/, only the results beside it, in eval_linear.json: a run keeps its checkpoint.

Deviations from the authors' code: any number of classes and images; without --batch_size the swav
protocol has 256 images over all processes (theirs: 32 per process, for 8); features of validation
images are computed once; the last, smaller batch of an epoch is left out; --use_bn works on pooled
features too, on the statistics of all processes; weights that are missing or do not fit stop the run.
Kept: SwAV's red standard deviation 0.228 in its protocol; the best epoch by validation is reported.
"""

import argparse
import logging
import math
import signal
from pathlib import Path

import torch

from src import checkpoint, cli, distributed, eval_args
from src.datasets import open_dataset
from src.evaluation import (
    MODEL_FLAGS,
    build_network,
    check_labelled,
    is_dino,
    is_transformer,
    open_labelled_splits,
    statistics,
)
from src.features import extract_features
from src.linear_features import CachedBatches, ImageBatches, hold_out, linear_input
from src.linear_probe import (
    LinearClassifiers,
    ManySGD,
    Probe,
    accuracies,
    epoch_lr,
    fingerprint,
    losses,
    saved_classifiers,
)
from src.linear_results import log_epoch, report
from src.logger import RunLog, Stopwatch, describe_run, duration, setup_logging
from src.signals import StopSignal, requeue_slurm_job

logger = logging.getLogger(__name__)

PROTOCOLS = {
    "swav": {"lr": 0.3, "wd": 1e-6, "interpolation": "bilinear"},
    "dino": {"lr": 0.001, "wd": 0.0, "interpolation": "bicubic"},
}
REFERENCE_BATCH = 256  # images that --lr is for: swav as it is, dino in proportion
DINO_BATCH = 128  # images per process
# For small images: seconds rather than hours. Features are computed once, without augmentation.
SMALL = {"cache_features": True}
PRESETS = {
    "imagenet": {},
    "cifar": {**SMALL, "workers": 2},
    "tiny": {**SMALL, "no_flip": True, "workers": 0},
}
SMALL_DINO = {"lr": 0.1}  # fewer iterations need a larger one than DINO's
# What features depend on, and what the classifiers do besides.
FEATURES = (*MODEL_FLAGS, "n_last_blocks", "avgpool_patchtokens", "global_pooling", "size", "mean")
FEATURES += ("std", "interpolation", "in_chans")
TRAINING = ("epochs", "wd", "nesterov", "scheduler_type", "decay_epochs", "gamma", "final_lr")
TRAINING += ("use_bn", "cache_features", "no_flip", "seed")
NAMED = ("protocol", "pretrained", "checkpoint_key", "data_path", "train_path", "val_path")
STOP_CHECK = 10  # iterations between agreeing on a signal, when there are several processes


# ============ one epoch ============
def train_one_epoch(probe, batches, lrs, epoch, start, iters_per_epoch, stop, log, args):
    """Train all classifiers for one epoch, from iteration `start`; returns the iterations done.

    batches: (epoch, start, stopwatch) -> features (B, D) and labels (B,) of this process, see
    src.linear_features. lrs: of this epoch, one for each classifier. Fewer than all iterations are
    done when a signal asked to stop.
    """
    world_size, stopwatch = distributed.world_size(), Stopwatch()
    total = args.batch_size * world_size
    probe.classifiers.train()
    step_sizes = torch.tensor(lrs, device=probe.classifiers.linear.weight.device)
    for it, (features, labels) in enumerate(batches(epoch, start, stopwatch), start):
        loss = losses(probe.classifiers(features), labels) / total  # (L,)
        loss.sum().backward()
        probe.optimizer.step(step_sizes)

        done = it + 1
        stopping = (world_size == 1 or done % STOP_CHECK == 0) and stop.agreed()
        if stopping or done % args.log_freq == 0 or done == iters_per_epoch:
            loss = distributed.all_reduce_sum(loss.detach()).tolist()
            rates = stopwatch.rates(total, (args.epochs - epoch) * iters_per_epoch - done)
            check_finite(loss, probe.folder)
            log_progress(log, epoch, it, iters_per_epoch, lrs, loss, rates, args)
        if stopping:
            return done
    return iters_per_epoch


def log_progress(log, epoch, it, iters_per_epoch, lrs, loss, rates, args):
    """Write a log line; of several classifiers people see the lowest loss."""
    finite = [x for x in loss if math.isfinite(x)]
    place = {"epoch": epoch, "epoch_float": epoch + (it + 1) / iters_per_epoch}
    iteration = epoch * iters_per_epoch + it
    known = [x if x in finite else None for x in loss]
    line = {**place, "iteration": iteration, "lrs": lrs, "losses": known, **rates}
    log.write(iteration, line)
    logger.info(
        "epoch %d/%d it %d/%d loss %.4f | %.0f img/s data %.0f%% eta %s",
        *(epoch + 1, args.epochs, it + 1, iters_per_epoch, min(finite)),
        *(rates["images_per_second"], 100 * rates["data_share"], duration(rates["eta_seconds"])),
    )


def check_finite(loss, folder):
    """Stop if no classifier has a finite loss; what is saved stays as it is."""
    if not any(math.isfinite(x) for x in loss):
        raise cli.RunError(
            f"the loss is not finite; {folder / checkpoint.NEWEST} holds the last good state, if one "
            "was saved; lower --lr"
        )


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns 0, or 128 + the signal when a signal stopped it."""
    args, run = parse_args(argv)
    launch = distributed.read_environment()
    setup_logging(None, launch.rank == 0)
    check_args(args)
    train, val = open_splits(args)
    num_classes = count_classes(args, train, val)
    options = {**cli.model_options(args), **cli.vit_options(args, args.size)}
    network = (run, "backbone", args.checkpoint_key, args.seed)
    model = build_network(args.arch, options, args.pretrained, *network)
    pooling = (args.n_last_blocks, args.avgpool_patchtokens, args.global_pooling)
    forward = linear_input(model, *pooling)
    with torch.no_grad():  # what does not fit is found before anything is started
        dim = forward(torch.zeros(1, args.in_chans, args.size, args.size)).flatten(1).shape[1]
    args.mean, args.std = statistics(args, train, args.protocol == "dino")
    settings = {name: getattr(args, name) for name in FEATURES} | {"weights": fingerprint(model)}
    named = {name: getattr(args, name) for name in NAMED}
    out, folder = Path(args.dump_path), Path(args.dump_path) / "linear"
    if args.evaluate:
        saved = saved_classifiers(args.linear_weights, folder, settings, dim, num_classes)
    else:
        fill_in_batch(args, launch.world_size, len(train))
    checkpoint.check_writable(out if args.evaluate else folder)

    process = distributed.init(args.device)
    precision = distributed.resolve_precision(args.precision, process.device)
    model.to(process.device)

    def extract(dataset):
        features, indices = extract_features(
            *(forward, dataset, args.size, args.mean, args.std, process.device),
            batch_size=args.batch_size or DINO_BATCH,
            num_workers=args.workers,
            precision=precision,
            interpolation=args.interpolation,
        )
        return features, dataset.labels[indices]

    # ============ an evaluation alone ============
    if args.evaluate:
        classifiers, lrs, epoch = saved
        result = accuracies(classifiers.to(process.device), *extract(val), process.device)
        path = out / "eval_linear_evaluate.json"
        report(lrs, [{"epoch": epoch, **result}], settings | named, path, not args.pretrained)
        distributed.shutdown()
        return 0

    # ============ classifiers ============
    total = args.batch_size * process.world_size
    iters_per_epoch = len(train) // total  # the last, smaller batch is left out
    factor = total / REFERENCE_BATCH if args.protocol == "dino" else 1.0
    lrs = [lr * factor for lr in args.lrs or [args.lr]]
    settings |= {name: getattr(args, name) for name in TRAINING}
    settings |= {"lrs": lrs, "batch": total, "images": [len(train), len(val), num_classes]}
    channels = (dim if args.global_pooling else model.num_features) if args.use_bn else 0
    classifiers = LinearClassifiers(len(lrs), dim, num_classes, channels, args.seed)
    optimizer = ManySGD(classifiers.to(process.device), args.wd, args.nesterov)
    probe = Probe(classifiers, optimizer, folder, settings)
    first_epoch, samples_done = probe.resume()
    setup_logging(folder, process.rank == 0)
    if process.rank == 0:  # not before: what may not go on leaves the folder as it was
        describe_run(vars(args), folder)
    log_plan(args, train, val, num_classes, dim, total, lrs, process)

    # ============ data ============
    stop, log = StopSignal(), RunLog(folder if process.rank == 0 else None, tensorboard=False)
    start = samples_done // total
    if first_epoch == args.epochs:
        logger.info("%s is trained for its %d epochs already", folder, args.epochs)
    else:
        val_features = extract(val)
        if args.cache_features:
            batches = CachedBatches(extract(train)[0], train, args.batch_size, process, args.seed)
        else:
            images = (train, args.size, (args.mean, args.std), args.batch_size)
            how = (process, precision, args.seed, args.workers, not args.no_flip)
            batches = ImageBatches(forward, *images, *how)

    # ============ epochs ============
    decay = (args.gamma, args.decay_epochs) if args.scheduler_type == "step" else None
    for epoch in range(first_epoch, args.epochs):
        at = [epoch_lr(lr, epoch, args.epochs, args.final_lr, decay) for lr in lrs]
        done = train_one_epoch(probe, batches, at, epoch, start, iters_per_epoch, stop, log, args)
        last, start = epoch + 1 == args.epochs, 0
        if done < iters_per_epoch:
            probe.save(epoch, done * total)
            return stopped(stop)
        if last or (epoch + 1) % args.val_freq == 0:
            result = accuracies(classifiers, *val_features, process.device)
            probe.history.append({"epoch": epoch + 1, **result})
            log_epoch(log, epoch, iters_per_epoch, lrs, probe.history)
        probe.save(epoch + 1, 0)
        if not last and stop.agreed():
            return stopped(stop)
    report(lrs, probe.history, settings | named, out / "eval_linear.json", not args.pretrained)
    stop.restore()
    distributed.shutdown()
    return 0


def stopped(stop):
    """Leave after a signal: all is saved; under Slurm, have the job run again. Returns the status."""
    if distributed.is_main():
        logger.warning("stopped by %s; the same command continues", stop.name)
    requeue_slurm_job(stop)  # before any process leaves: srun then ends the step
    stop.restore()
    distributed.shutdown()
    return 128 + getattr(signal, stop.name)


def open_splits(args):
    """Training and validation images; to evaluate alone, --val_path is enough."""
    if args.evaluate and args.val_path and not args.train_path:
        val = open_dataset(args.val_path, "val", args.in_chans, flag="--val_path")
        check_labelled(val, "--val_path")
        return val, val
    paths = (args.data_path, args.train_path, args.val_path)
    train, val = open_labelled_splits(*paths, args.in_chans)
    return (train, val) if val is not None else hold_out(train)


def count_classes(args, *datasets):
    """The number of classes of the data; ValueError if that is more than --num_labels."""
    counts = [max(len(data.classes or ()), int(data.labels.max()) + 1) for data in datasets]
    if args.num_labels is not None and max(counts) > args.num_labels:
        raise ValueError(
            f"--num_labels {args.num_labels}, and the data has {max(counts)} classes: leave it out, "
            "they are counted"
        )
    return max(counts)


def fill_in_batch(args, world_size, num_images):
    """The batch size of the protocol where none is given; ValueError for one that does not fit."""
    if args.batch_size is None:
        a_process = args.protocol == "dino" and args.preset == "imagenet"
        batch = DINO_BATCH if a_process else max(1, REFERENCE_BATCH // world_size)
        args.batch_size = max(1, min(batch, num_images // world_size))
    if args.batch_size * world_size > num_images:
        raise ValueError(
            f"--batch_size {args.batch_size} times {world_size} processes is more than the "
            f"{num_images} training images: use at most {num_images // world_size}"
        )


def log_plan(args, train, val, num_classes, dim, total, lrs, process):
    """Say what will be computed, before it is."""
    how = "features computed once" if args.cache_features else "random crops and flips"
    for line in (
        f"protocol    {args.protocol}, {how}",
        f"data        {train.name}: {len(train):,} and {len(val):,} images, {num_classes} classes",
        f"batch       {args.batch_size} x {process.world_size} processes = {total}; "
        f"{len(train) // total:,} iterations an epoch, {args.epochs} epochs",
        f"classifiers {', '.join(f'{lr:g}' for lr in lrs)} (learning rates), {args.wd:g} weight "
        f"decay, {dim:,} features of {args.arch}",
    ):
        logger.info(line)
    if args.protocol == "swav" and total != REFERENCE_BATCH and "lr" not in args.given:
        fitting = args.lr * total / REFERENCE_BATCH
        logger.info("note: the learning rate is for 256 images; --lr %g fits %d", fitting, total)


# ============ arguments ============
def parse_args(argv):
    """The arguments, and those of the run that is evaluated ({} if it is not a run).

    Of what is not on the command line, the preset of small images decides before the protocol.
    """
    args, run = eval_args.parse_args(get_parser, argv)
    if args.protocol == "auto":
        dino = is_transformer(args.arch) or is_dino(run)
        dino = dino or args.checkpoint_key in ("student", "teacher")
        args.protocol = "dino" if dino else "swav"
    defaults = PROTOCOLS[args.protocol] | PRESETS[args.preset]
    if args.protocol == "dino" and args.preset != "imagenet":
        defaults |= SMALL_DINO
    for name, value in defaults.items():
        if name not in args.given:
            setattr(args, name, value)
    base = args.arch == "vit_base"
    if args.avgpool_patchtokens is None:
        args.avgpool_patchtokens = base and args.n_last_blocks is None
    if args.n_last_blocks is None:
        args.n_last_blocks = 1 if base else min(4, args.depth or 4)
    return args, run


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = cli.Parser(__doc__)
    at_least_zero, positive = cli.at_least_zero, cli.positive

    add = parser.add_argument_group("method").add_argument
    add("--protocol", default="auto", choices=["auto", *PROTOCOLS],
        help="auto: dino for vision transformers, for runs of main_dino.py and with --checkpoint_key "
        "teacher; else swav")
    add("--n_last_blocks", type=positive(int), default=None,
        help="blocks of a vision transformer whose class tokens are used (default: 4; vit_base 1)")
    add("--avgpool_patchtokens", type=cli.boolean, default=None,
        help="also the mean of the patch tokens (default: false; vit_base true)")
    add("--global_pooling", type=cli.boolean, default=True,
        help="of a ResNet's last map; false: windows of 6 x 6 cells, 8192 features of a ResNet-50")
    add("--use_bn", type=cli.boolean, default=False, help="a batch norm before the classifier")
    add("--cache_features", action=argparse.BooleanOptionalAction, default=False,
        help="compute the features once, from centre crops: no augmentation (small sets: default)")
    add("--no_flip", action="store_true", help="no horizontal flip (default: probability 0.5)")
    add("--num_labels", type=positive(int), default=None,
        help="the largest number of classes to accept; they are counted in the data")
    add("--evaluate", action="store_true", help="train nothing: evaluate what was trained")
    add("--linear_weights", default=None, help="with --evaluate: a published linear classifier")

    eval_args.add_network_args(parser)
    add = eval_args.add_image_args(parser)
    add("--interpolation", default=None, choices=["bilinear", "bicubic"],
        help="of the resize of validation images (default: swav bilinear, dino bicubic)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=100, help="passes over the training images")
    add("--batch_size", "--batch_size_per_gpu", type=positive(int), default=None,
        help="images per process (default: swav 256 over all processes, dino 128)")
    add("--lr", type=positive(float), default=None,
        help="learning rate: swav as it is, dino times the global batch / 256 (default: 0.3, 0.001)")
    add("--lrs", type=positive(float), nargs="+", default=None,
        help="several, instead of --lr: a classifier each, all trained in one pass")
    add("--wd", type=at_least_zero(float), default=None,
        help="weight decay (default: swav 1e-6, dino 0)")
    add("--nesterov", type=cli.boolean, default=False, help="Nesterov's momentum")
    add("--scheduler_type", default="cosine", choices=["step", "cosine"], help="an epoch at a time")
    add("--decay_epochs", type=positive(int), nargs="+", default=[60, 80], help="of step")
    add("--gamma", type=positive(float), default=0.1, help="factor of step")
    add("--final_lr", type=at_least_zero(float), default=0, help="learning rate that cosine nears")
    add("--val_freq", type=positive(int), default=1, help="epochs between validations")
    add("--log_freq", type=positive(int), default=50, help="iterations between log lines")
    cli.add_runtime_args(parser)
    return parser
    # fmt: on


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    distributed.resolve_device(args.device)
    eval_args.check_images(args)
    if args.lrs and "lr" in args.given:
        raise ValueError("--lr and --lrs exclude each other: leave one out")
    if args.linear_weights and not args.evaluate:
        raise ValueError("--linear_weights is for --evaluate: give both, or leave it out")


if __name__ == "__main__":
    cli.run(main)
