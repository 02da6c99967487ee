"""Classification of PASCAL VOC 2007: by fine-tuning, or by linear SVMs of frozen features.

20 binary classifications of each image. DeepCluster, arXiv:1807.05520, section 4.3, and DeeperCluster,
arXiv:1905.01278, fine-tune: mean average precision of ten random crops, in two set-ups
  --fc6_8 true   FC6-8: the convolutions are frozen; linear layers are trained, from scratch
  --fc6_8 false  ALL: the same with all layers trained
and by two protocols; a flag on the command line wins over what --protocol says:
  deepcluster    80,000 iterations, halving the learning rate every 5,000; square crops of 0.1 to 0.5
                 of the image's area
  deepercluster  150,000, every 10,000; crops of 0.08 to 1, width / height 3/4 to 4/3 (vgg16)
Both: batches of 16, learning rate 0.003, momentum 0.9, weight decay 1e-6, gradients clipped to 10.
  svm            SwAV, arXiv:2006.09882, appendix A.5, as VISSL: pooled features of centre crops, a
                 linear SVM for each class, its cost by 3-fold cross-validation; of trainval, on test

  python eval_voc07.py --pretrained runs/deepcluster --data_path VOCdevkit/VOC2007 --split trainval
  python eval_voc07.py --pretrained vgg16.pth.tar --vocdir VOCdevkit/VOC2007 --fc6_8 0
  python eval_voc07.py --pretrained runs/swav --data_path VOCdevkit/VOC2007 --protocol svm
--split train is tested on val, trainval on test. The same command again continues where it stopped, from
--dump_path/voc07/<fc6_8, all or svm>; results: --dump_path/eval_voc07_<fc6_8, all or svm>.json.

Deviations from the authors' code: an epoch has its own order and leaves out its last, smaller batch;
equal scores are one threshold of the average precision, which is not computed on the training images;
ALL keeps the pre-trained convolutions, as the papers have it; of ResNets FC6-8 trains one linear layer;
the seed is 31 for both; SVMs are solved to their minimum, and see 2,048 numbers of a ResNet-50's centre
crop, VISSL's 8,192 of the image resized to 224 x 224 without a crop, its last map pooled to 2 x 2.
Kept: batch norms use the statistics of the pre-training; SVMs are trained with difficult objects as
negatives and tested without them.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import json
import logging
import math
from pathlib import Path

import torch

from src import dist
from src.data.multicrop import generator
from src.errors import RunError
from src.evaluate import flags as eval_flags
from src.evaluate.average_precision import mean_average_precision
from src.evaluate.stored_features import stored_features
from src.evaluate.svm_classes import COSTS, fit_classes, unit_rows
from src.evaluate.ten_crops import VIEWS, RandomTenCrops, TenCrops, ten_crop_forward
from src.evaluate.voc import CLASSES, TESTED_ON, multilabel_loss, open_voc
from src.evaluate.voc_classifier import VOCClassifier
from src.evaluate.voc_training import Training, training_images
from src.labels.features import extract_features, share
from src.nets.pooling import forward_of_feature, shape_of_features
from src.nets.pretrained import IMAGENET_RED, MODEL_FLAGS
from src.nets.weights import fingerprint
from src.run import checkpoint, flags, image_flags
from src.run.lock import hold_folder
from src.run.log import RunLog, Stopwatch, describe_run, duration, setup_logging
from src.run.stop import StopSignal, finish, leave

logger = logging.getLogger(__name__)

PROTOCOLS = {
    "deepcluster": {"nit": 80000, "stepsize": 5000, "min_scale": 0.1, "max_scale": 0.5},
    "deepercluster": {"nit": 150000, "stepsize": 10000, "min_scale": 0.08, "max_scale": 1.0},
    "svm": {"interpolation": "bilinear", "costs": COSTS, "batch_size": 128, "split": "trainval"},
}
RATIO = {"deepcluster": (1.0, 1.0), "deepercluster": (3 / 4, 4 / 3)}  # width / height of crops
BATCH = 16  # images, over all processes
MAX_NORM = 10.0  # of the gradient
# What the result depends on, besides the number of iterations.
SETTINGS = (
    *(*MODEL_FLAGS, "in_chans", "size", "mean", "std", "protocol", "fc6_8", "split", "seed"),
    *("train_batchnorm", "stepsize", "lr", "wd", "min_scale", "max_scale"),
)
SVM_SETTINGS = (*MODEL_FLAGS, "in_chans", "size", "interpolation")  # what the features depend on
# Flags of fine-tuning alone, and of --protocol svm alone.
OF_TUNING = (
    *("fc6_8", "train_batchnorm", "eval_random_crops", "min_scale", "max_scale"),
    *("nit", "stepsize", "lr", "wd", "log_freq", "checkpoint_iters"),
)
OF_SVM = ("costs", "interpolation")
NAMED = ("pretrained", "checkpoint_key", "data_path", "nit", "eval_random_crops")
TEST_IMAGES = 4  # whose ten crops are one batch
STOP_CHECK = 10  # iterations between agreeing on a signal, when there are several processes


# ============ training ============
def train(state, loader, labels, start, args, stop, log):
    """Train from iteration `start` on; returns the iterations done, fewer when a signal stopped it.

    loader: of src.evaluate.voc_training.training_images. labels (N, 20): 1, 0, or 255, which the loss
    leaves out.
    """
    world_size, stopwatch = dist.world_size(), Stopwatch()
    network, optimizer, scaler = state.network, state.optimizer, state.scaler
    process = state.process
    trained = [p for p in state.module.parameters() if p.requires_grad]
    network.train()
    for it, (images, indices) in enumerate(stopwatch.watch(loader(start, args.nit)), start):
        torch.manual_seed(generator(args.seed, it, process.rank).initial_seed())  # dropout
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, it, args.stepsize)

        # ============ multi-label loss ============
        with dist.autocast(process.device, state.precision):
            scores = network(images)  # (B, 20)
        targets = labels[indices].to(process.device)  # (B, 20)
        loss = multilabel_loss(scores.float(), targets).mean()

        # ============ backward and optim step ============
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

        # ============ log, save, stop ============
        done = it + 1
        stopping = (world_size == 1 or done % STOP_CHECK == 0) and stop.agreed()
        if stopping or done % args.log_freq == 0 or done == args.nit:
            rates = stopwatch.rates(args.batch_size * world_size, args.nit - done)
            lr = optimizer.param_groups[0]["lr"]
            log_progress(
                log,
                it=it,
                loss=loss,
                lr=lr,
                gradient_norm=norm.item(),
                rates=rates,
                folder=state.folder,
                args=args,
            )
        if stopping or done % args.checkpoint_iters == 0 or done == args.nit:
            state.save(done)
        if stopping:
            return done
    return args.nit


def learning_rate(lr, iteration, stepsize):
    """lr, halved every `stepsize` iterations."""
    return lr * 0.5 ** (iteration // stepsize)


def log_progress(log, *, it, loss, lr, gradient_norm, rates, folder, args):
    """Write a log line; RunError where the loss is not finite, what is saved stays as it is."""
    loss = (dist.all_reduce_sum(loss.detach()) / dist.world_size()).item()
    if not math.isfinite(loss):
        newest = folder / checkpoint.NEWEST
        raise RunError(
            f"the loss is not finite; {newest} holds the last good state, if one was saved; lower --lr"
        )
    line = {"iteration": it, "loss": loss, "lr": lr, "gradient_norm": gradient_norm}
    log.write(it, {**line, **rates})
    logger.info(
        f"it {it + 1}/{args.nit} loss {loss:.4f} lr {lr:.4g} grad {gradient_norm:.3g} | "
        f"{rates['images_per_second']:.0f} img/s data {100 * rates['data_share']:.0f}% "
        f"eta {duration(rates['eta_seconds'])}"
    )


# ============ evaluation ============
def evaluate(state, dataset, args):
    """Average precisions of the mean scores of ten crops of each image, random or fixed ones."""
    if args.eval_random_crops:
        crops = RandomTenCrops(
            dataset,
            args.size,
            scale=(args.min_scale, args.max_scale),
            ratio=RATIO[args.protocol],
            seed=args.seed,
        )
    else:
        crops = TenCrops(dataset, args.size)
    state.module.eval()
    forward = ten_crop_forward(state.module)
    scores, indices = extract_features(
        lambda images: forward(images).mean(1),  # (B, 20)
        crops,
        args.size,
        mean=args.mean * VIEWS,
        std=args.std * VIEWS,
        device=state.process.device,
        batch_size=TEST_IMAGES,
        num_workers=args.workers,
        loader_timeout=args.loader_timeout,
        precision=state.precision,
        resize=args.size,
    )
    return mean_average_precision(scores, dataset.labels[indices])


def evaluate_svm(args, network, dataset, tested):
    """Train and test a linear SVM for each class; returns as main."""
    forward = forward_of_feature(network, "backbone")
    (width,) = shape_of_features(forward, args.in_chans, args.size, network.arch, "--size")
    out, folder = Path(args.dump_path), Path(args.dump_path) / "voc07" / "svm"
    checkpoint.check_writable(folder)
    process = dist.init(args.device, args.dist_timeout)
    hold_folder(folder, "eval_voc07")
    setup_logging(folder, process.rank == 0)
    stop = StopSignal()
    network.model.to(process.device)

    # ============ features ============
    matrices = []
    for images, split in ((dataset, args.split), (tested, TESTED_ON[args.split])):
        extraction = eval_flags.extraction_options(args, network, images, process.device)
        settings = {
            **{name: getattr(args, name) for name in SVM_SETTINGS},
            **{name: extraction[name] for name in ("mean", "std")},
            "weights": fingerprint(network.model),
        }
        matrices.append(
            stored_features(folder, split, forward, images, width, settings, stop, **extraction)
        )
        if matrices[-1] is None:
            return leave(stop)
    train_features, test_features = matrices

    # ============ SVMs ============
    positive = (dataset.labels == 1).to(process.device)  # (N, 20)
    folder = folder / args.split
    folder.mkdir(exist_ok=True)
    fitted = fit_classes(
        unit_rows(train_features, process.device), positive, args.costs, folder, stop
    )
    if fitted is None:
        return leave(stop)

    # ============ evaluation ============
    own = share(len(tested))
    rows = unit_rows(test_features[own.start : own.stop], torch.device("cpu"))
    scores = rows @ fitted["weights"][:-1] + fitted["weights"][-1]  # (n, 20)
    result = mean_average_precision(scores, tested.labels[own.start : own.stop])
    result["costs"] = dict(zip(CLASSES, fitted["costs"].tolist(), strict=True))
    result["cross_validated"] = dict(zip(CLASSES, fitted["ap"].tolist(), strict=True))
    named = {name: getattr(args, name) for name in ("pretrained", "checkpoint_key", "data_path")}
    settings |= {**named, "protocol": "svm", "split": args.split, "costs": sorted(args.costs)}
    settings["precision"] = extraction["precision"]
    report(result, settings, out / "eval_voc07_svm.json", not args.pretrained)
    return finish(stop)


def report(result, settings, path, untrained):
    """Log the results and write them to `path` as JSON; one process does."""
    if not dist.is_main():
        return
    by_class = {
        name: dict(zip(CLASSES, result[name], strict=True)) for name in ("ap", "ap_11points")
    }
    path.write_text(json.dumps({**result, **by_class, "settings": settings}, indent=1) + "\n")
    for name, value in by_class["ap"].items():
        cost = f"  cost {result['costs'][name]:g}" if "costs" in result else ""
        logger.info(f"{name:12} " + ("no image" if value is None else f"{value:6.2f}") + cost)
    area, points, interpolated = (result[f"map{x}"] for x in ("", "_11points", "_interpolated"))
    logger.info(f"mAP {area:.2f} (11-point {points:.2f}, interpolated area {interpolated:.2f})")
    means = {name: round(value, 2) for name, value in result.items() if name.startswith("map")}
    logger.info(
        json.dumps({"evaluation": path.stem, "pretrained": settings["pretrained"], **means})
    )
    if untrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, a mere baseline")
    logger.info(f"written to {path}")


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Fine-tune, or fit SVMs, and evaluate; returns 0, or 128 + the signal when a signal stopped it."""
    args = parse_args(argv)
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    check_args(args)
    reading = image_flags.reading_options(args)
    dataset = open_voc(args.data_path, args.split, args.in_chans, **reading)
    tested = open_voc(args.data_path, TESTED_ON[args.split], args.in_chans, **reading)
    if args.protocol == "svm":
        return evaluate_svm(args, eval_flags.open_network(args), dataset, tested)
    check_batch(args, launch.world_size, len(dataset))
    network = eval_flags.open_network(args)
    args.mean, args.std = network.normalisation(dataset, IMAGENET_RED)
    total = args.batch_size * launch.world_size
    settings = {
        **{name: getattr(args, name) for name in SETTINGS},
        "weights": fingerprint(network.model, network.head),
        "batch": total,
        "images": len(dataset),
    }
    named = {name: getattr(args, name) for name in NAMED}
    model = VOCClassifier(
        network.model,
        len(CLASSES),
        only_classifier=args.fc6_8,
        train_batchnorm=args.train_batchnorm,
        generator=generator(args.seed),
    )
    with torch.no_grad():  # what does not fit is found before anything is started
        model.eval()(torch.zeros(1, args.in_chans, args.size, args.size))
    name = "fc6_8" if args.fc6_8 else "all"
    out, folder = Path(args.dump_path), Path(args.dump_path) / "voc07" / name
    checkpoint.check_writable(folder)

    process = dist.init(args.device, args.dist_timeout)
    hold_folder(folder, "eval_voc07")
    precision = dist.resolve_precision(args.precision, process.device)

    # ============ model and optimizer ============
    state = Training(
        model,
        args.wd,
        process=process,
        precision=precision,
        folder=folder,
        settings=settings,
    )
    start = state.resume()
    setup_logging(folder, process.rank == 0)
    if process.rank == 0:  # not before: what may not go on leaves the folder as it was
        describe_run(eval_flags.with_network(args, network), folder)
    log_plan(args, dataset, tested, total, state)

    # ============ training ============
    stop = StopSignal()
    if start < args.nit:
        loader = training_images(
            dataset,
            args.size,
            scale=(args.min_scale, args.max_scale),
            ratio=RATIO[args.protocol],
            normalisation=(args.mean, args.std),
            batch_size=args.batch_size,
            process=process,
            seed=args.seed,
            workers=args.workers,
            loader_timeout=args.loader_timeout,
        )
        log = RunLog(folder if process.rank == 0 else None, tensorboard=False)
        if train(state, loader, dataset.labels, start, args, stop, log) < args.nit:
            return leave(stop)
        log.close()
    else:
        logger.info(f"{folder} is trained for its {start} iterations already")

    # ============ evaluation ============
    with stop.at_once():  # all is saved
        result = evaluate(state, tested, args)
    report(result, settings | named, out / f"eval_voc07_{name}.json", not args.pretrained)
    return finish(stop)


def log_plan(args, dataset, tested, total, state):
    """Say what will be computed, before it is."""
    count = sum(p.numel() for p in state.module.parameters() if p.requires_grad)
    layers = "FC6-8, trunk frozen" if args.fc6_8 else "ALL layers"
    for line in (
        f"protocol    {args.protocol}, {layers}: {count:,} parameters of {args.arch} are trained",
        f"data        {dataset.name}: {len(dataset):,} images, tested on {len(tested):,}",
        f"batch       {args.batch_size} x {state.process.world_size} processes = {total}; "
        f"{args.nit:,} iterations, learning rate {args.lr:g}, halved every {args.stepsize:,}",
    ):
        logger.info(line)


# ============ arguments ============
def parse_args(argv):
    """The arguments; what is not on the command line is of the run that is evaluated, or the protocol."""
    args, _ = eval_flags.parse_args(get_parser(), argv, "eval_voc07")
    if "data_path" not in args.given:
        args.data_path = ""  # a run's is that of its training
    is_plain = args.arch in ("alexnet", "vgg16")
    if is_plain and args.sobel is None and not args.pretrained:
        args.sobel = False  # ours, with batch norm, rather than torchvision's
    if args.protocol == "auto":
        args.protocol = "deepercluster" if args.arch == "vgg16" else "deepcluster"
    for name, value in PROTOCOLS[args.protocol].items():
        if name not in args.given:
            setattr(args, name, value)
    return args


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive, boolean = flags.at_least_zero, flags.positive, flags.boolean

    add = parser.add_argument_group("method").add_argument
    add("--protocol", default="auto", choices=["auto", *PROTOCOLS],
        help="auto: deepercluster for vgg16, else deepcluster; svm: linear SVMs of frozen features")
    add("--costs", type=positive(float), nargs="+", default=None,
        help="C of --protocol svm, of which each class takes the best by cross-validation (default: "
        "0.01 0.1 1 2 5 10 15 20 50 100 1000)")
    add("--fc6_8", type=boolean, default=True, help="true: FC6-8, only the classifier is trained; "
        "false: ALL layers")
    add("--train_batchnorm", type=boolean, default=False,
        help="with --fc6_8 true also train the scale and shift of batch norms")
    add("--eval_random_crops", type=boolean, default=True,
        help="evaluate on ten random crops; false: corners, centre and their mirror images")

    eval_flags.add_network_args(parser)
    add("--model", dest="pretrained", default=argparse.SUPPRESS, help="the same as --pretrained")
    add = parser.add_argument_group("data").add_argument
    add("--data_path", "--vocdir", default="", help="VOCdevkit/VOC2007; must be given")
    image_flags.add_reading_args(add)
    add("--split", default="train", choices=TESTED_ON,
        help="to train on; tested on val or test (--protocol svm: trainval)")
    add("--size", type=positive(int), default=224, help="side in pixels of the crops")
    add("--in_chans", type=positive(int), default=3, help="channels of the images")
    add("--mean", type=float, nargs="+", default=None, help="of each channel; default: ImageNet's")
    add("--std", type=float, nargs="+", default=None, help="of each channel; default: ImageNet's")
    add("--interpolation", default=None, choices=["bilinear", "bicubic"],
        help="of the resize of --protocol svm (default: bilinear)")
    add("--min_scale", type=positive(float), default=None,
        help="smallest area of a crop, as a share of the image (default: 0.1, deepercluster 0.08)")
    add("--max_scale", type=positive(float), default=None,
        help="largest area of a crop (default: 0.5, deepercluster 1)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--nit", type=positive(int), default=None,
        help="iterations of training (default: 80000, deepercluster 150000)")
    add("--stepsize", type=positive(int), default=None,
        help="iterations between halvings of --lr (default: 5000, deepercluster 10000)")
    add("--batch_size", "--batch_size_per_gpu", type=positive(int), default=None,
        help="images per process (default: 16 over all processes; svm 128)")
    add("--lr", type=positive(float), default=0.003, help="learning rate")
    add("--wd", type=at_least_zero(float), default=1e-6, help="weight decay")
    add("--log_freq", type=positive(int), default=50, help="iterations between log lines")
    add("--checkpoint_iters", type=positive(int), default=1000, help="iterations between saves")
    flags.add_runtime_args(parser)
    return parser
    # fmt: on


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    dist.resolve_device(args.device)
    eval_flags.check_images(args)
    if not args.data_path:
        raise ValueError(
            "--data_path (or --vocdir) must be given: the folder VOCdevkit/VOC2007, with JPEGImages "
            "and ImageSets/Main, of PASCAL VOC 2007"
        )
    is_svm = args.protocol == "svm"
    for name in OF_TUNING if is_svm else OF_SVM:
        if name in args.given:
            kind = "fine-tuning, not for" if is_svm else "nothing but"
            raise ValueError(f"--{name} is for {kind} --protocol svm: leave it out")
    if not is_svm and not args.min_scale <= args.max_scale <= 1:
        raise ValueError(
            f"--min_scale {args.min_scale} and --max_scale {args.max_scale} must satisfy 0 < min <= "
            "max <= 1"
        )


def check_batch(args, world_size, num_images) -> None:
    """The published batch where none is given; ValueError for one larger than the data."""
    if args.batch_size is None:
        args.batch_size = max(1, min(BATCH, num_images) // world_size)
    if args.batch_size * world_size > num_images:
        raise ValueError(
            f"--batch_size {args.batch_size} times {world_size} processes is more than the "
            f"{num_images} training images: use at most {num_images // world_size}"
        )


if __name__ == "__main__":
    flags.run(main)
