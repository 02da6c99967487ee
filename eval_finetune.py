"""Fine-tuning on all labels: how good a start a pre-trained network is, or none, from scratch.

Three recipes, chosen by --protocol; a flag on the command line wins over each:
  deit           for vision transformers: DeiT's (arXiv:2012.12877, Table 9), by which DINO is fine-tuned
                 (arXiv:2104.14294, Table 6): AdamW, cosine, RandAugment, mixup, CutMix, random erasing
  deepercluster  for AlexNet and VGG-16: that of DeeperCluster (arXiv:1905.01278), whose linear layers
                 start anew: SGD, learning rate 0.05, a tenth every 30 epochs, 100 epochs
  resnet         for others: SGD, 0.1 x batch / 256, cosine, weight decay 1e-4, 200 epochs
With several crops of an image, --nmb_crops 2 6, each is classified: the supervised baseline with
multi-crop of SwAV (arXiv:2006.09882, Figure 3), whose 200 epochs are those of resnet.

  python eval_finetune.py --pretrained runs/dino --ema_decay 0.99 --layer_decay 0.75
  torchrun --nproc_per_node 8 eval_finetune.py --pretrained dino.pth --data_path data/flowers-102
  torchrun --nproc_per_node 8 eval_finetune.py --arch resnet50 --from_scratch --data_path /imagenet \\
      --nmb_crops 2 6
Starting the same command again continues where it stopped. What training writes lies in
--dump_path/finetune (from_scratch), the results beside it, in eval_finetune.json, one line.

Deviations from the authors' code: rates change at every iteration; RandAugment is torchvision's, of
strength 27 of 30 without noise (timm's 9 of 10 with noise); a batch has mixup or CutMix, with the
image before; deepercluster has batch norm over all processes; the last, smaller batch is left out;
resnet's values but for the epochs are the usual ones, since the papers print none.
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
from src.evaluate.finetune_images import MAGNITUDES, Strength, TrainingImages
from src.evaluate.finetuning import (
    FineTunedNetwork,
    FineTuning,
    Plan,
    fit,
    groups_by_layer,
    report,
)
from src.evaluate.splits import count_classes
from src.evaluate.stored_features import labelled_digest
from src.nets.backbones import is_transformer
from src.nets.folded_sobel import fold_sobel
from src.nets.pretrained import MODEL_FLAGS
from src.nets.resnet import TIMM
from src.nets.weights import fingerprint
from src.optim import cosine_schedule, step_lr
from src.run import checkpoint, flags, image_flags
from src.run.lock import hold_folder
from src.run.log import RunLog, describe_run, setup_logging
from src.run.presets import CROPS
from src.run.stop import StopSignal, finish, leave

logger = logging.getLogger(__name__)

PROTOCOLS = {
    "deit": {
        "epochs": 300, "batch": 1024, "optimizer": "adamw", "lr": 5e-4, "lr_reference_batch": 512,
        "wd": 0.05, "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5, "smoothing": 0.1,
        "drop_path_rate": 0.1, "randaugment": 2, "mixup": 0.8, "cutmix": 1.0, "reprob": 0.25,
        "repeated_aug": 3, "interpolation": "bicubic",
    },
    "deepercluster": {
        "batch_size": 128, "lr": 0.05, "wd": 1e-5, "scheduler": "step", "lr_reference_batch": 0,
    },
    "resnet": {"epochs": 200, "lr": 0.1, "wd": 1e-4, "warmup_epochs": 5},
}  # fmt: skip
# For small images: minutes rather than days, and nothing that destroys digits.
SMALL = {
    "epochs": 30, "batch": 64, "drop_path_rate": 0.0, "randaugment": 0, "mixup": 0.0, "cutmix": 0.0,
    "reprob": 0.0, "repeated_aug": 1, "warmup_epochs": 1, "lr_reference_batch": 0, "log_freq": 20,
}  # fmt: skip
PRESETS = {
    "imagenet": {},
    "cifar": {**SMALL, "workers": 2},
    "tiny": {**SMALL, "workers": 0, "no_flip": True},
}
SMALL_LR = {"deit": 1e-3, "deepercluster": 0.01, "resnet": 0.05}
ONE_CROP = (0.08, 1.0)  # range of the area of the only crop, or of the largest ones (SwAV, A.7)
# What the result depends on.
SETTINGS = (
    *(
        *MODEL_FLAGS,
        "in_chans",
        "size",
        "mean",
        "std",
        "interpolation",
        "reduced_decoding",
        "seed",
        "sobel2RGB",
        "debug",
    ),
    *("nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops", "no_flip", "color_jitter"),
    *("jitter_prob", "grayscale", "blur", "blur_sigma", "solarize", "randaugment", "magnitude"),
    *("mixup", "cutmix", "reprob", "repeated_aug", "smoothing", "drop_path_rate", "ema_decay"),
    *("layer_decay", "epochs", "optimizer", "lr", "lr_last_layer", "lr_reference_batch", "wd"),
    *("scheduler", "warmup_epochs", "warmup_lr", "min_lr", "decay_epochs", "gamma", "clip_grad"),
    *("val_freq", "from_scratch"),
)
NAMED = ("protocol", "pretrained", "checkpoint_key", "data_path", "train_path", "val_path")


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Fine-tune and evaluate; returns 0, or 128 + the signal when a signal stopped it."""
    args = parse_args(argv)
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    check_args(args)
    train, val = finetuning_flags.open_parts(args)
    train = val if args.debug else train
    num_classes = count_classes(None, train, val)
    if "batch_size" not in args.given and args.batch_size:  # the protocol's
        args.batch_size = min(args.batch_size, max(1, len(train) // launch.world_size))
    finetuning_flags.fill_in_batch(args, launch.world_size, len(train), args.batch)
    total = args.batch_size * launch.world_size
    network = open_network(args)
    args.mean, args.std = network.normalisation(train)
    settings = {
        **{name: getattr(args, name) for name in SETTINGS},
        "weights": fingerprint(network.model, network.head),
        "batch": total,
        "images": [len(train), len(val), num_classes],
        "content": [labelled_digest(train), labelled_digest(val)],
    }
    if args.sobel2RGB:
        fold_sobel(network.model)
    module = FineTunedNetwork(network.model, num_classes, args.seed)
    finetuning_flags.check_network(module, args, args.size_crops)
    name = "from_scratch" if args.from_scratch else "finetune"
    out, folder = Path(args.dump_path), Path(args.dump_path) / name
    checkpoint.check_writable(folder)

    process = dist.init(args.device, args.dist_timeout)
    hold_folder(folder, "eval_finetune")
    precision = dist.resolve_precision(args.precision, process.device)
    extraction = finetuning_flags.extraction_options(args, process, precision)

    # ============ model and optimizer ============
    scale = total / args.lr_reference_batch if args.lr_reference_batch else 1.0
    peak_lr, lr_last_layer = args.lr * scale, (args.lr_last_layer or args.lr) * scale
    state = FineTuning(
        module,
        lambda network: groups_by_layer(
            network,
            peak_lr,
            lr_last_layer,
            layer_decay=args.layer_decay,
            decays_vectors=args.optimizer == "sgd",
        ),
        optimizer=args.optimizer,
        weight_decay=args.wd,
        process=process,
        precision=precision,
        folder=folder,
        settings=settings,
        average_decay=args.ema_decay,
    )
    start = state.resume((args.epoch, args.start_iter * total))
    named = {name: getattr(args, name) for name in NAMED}
    row = {"network": network.origin, "data": f"{train.name} ({len(train):,} images)"}
    if args.evaluate:
        check_trained(folder)
        history = [{"epoch": start[0], **state.evaluate(val, extraction)}]
        report(history, row, settings | named, out / "eval_finetune_evaluate.json")
        return finish()
    setup_logging(folder, process.rank == 0)
    if process.rank == 0:  # not before: what may not go on leaves the folder as it was
        describe_run(eval_flags.with_network(args, network), folder)
    plan = make_plan(args, len(train) // total, total, peak_lr)
    log_plan(args, train, val, plan, network.origin, num_classes, peak_lr)

    # ============ training ============
    stop = StopSignal()
    log = RunLog(folder if process.rank == 0 else None, tensorboard=False)
    is_done = fit(
        state,
        training_images(args, train, num_classes, process),
        plan,
        start=start,
        evaluate=lambda: state.evaluate(val, extraction),
        stop=stop,
        log=log,
    )
    if not is_done:
        return leave(stop)
    log.close()
    suffix = "_from_scratch" if args.from_scratch else ""
    report(state.history, row, settings | named, out / f"eval_finetune{suffix}.json")
    return finish(stop)


def open_network(args):
    """The network to start from; of --from_scratch the same before any training.

    Of a network of timm only building it tells whether it has stochastic depth; without it the rate of the
    protocol is 0, as it is with other networks that cannot have it.
    """
    options = {"drop_path_rate": args.drop_path_rate} if args.drop_path_rate else {}
    network = eval_flags.open_network(args, **options)
    if options and args.arch.startswith(TIMM):
        from src.nets.timm_trunks import has_stochastic_depth  # here, as timm is optional

        if not has_stochastic_depth(network.model):
            refuse_stochastic_depth(args)
            args.drop_path_rate = 0.0
    return network.untrained() if args.from_scratch else network


def refuse_stochastic_depth(args):
    """Raise ValueError where --drop_path_rate is on the command line, of a network that cannot have it."""
    if args.drop_path_rate and "drop_path_rate" in args.given:
        raise ValueError(
            f"--drop_path_rate {args.drop_path_rate} is for vision transformers and networks of timm with "
            f"stochastic depth, which --arch {args.arch} has not: leave it out"
        )


def check_trained(folder):
    """Raise FileNotFoundError where --evaluate finds nothing."""
    if not (folder / checkpoint.NEWEST).is_file():
        raise FileNotFoundError(
            f"--evaluate: {folder} holds no network: fine-tune one by leaving --evaluate out"
        )


def training_images(args, train, num_classes, process):
    """Batches of crops by the flags."""
    return TrainingImages(
        train,
        image_flags.crop_options(args),
        Augment(**image_flags.augment_options(args, train, sum(args.nmb_crops))),
        num_classes=num_classes,
        batch_size=args.batch_size,
        process=process,
        seed=args.seed,
        workers=args.workers,
        loader_timeout=args.loader_timeout,
        strength=Strength(
            randaugment=args.randaugment,
            magnitude=args.magnitude,
            erasing=args.reprob,
            mixup=args.mixup,
            cutmix=args.cutmix,
            repeats=args.repeated_aug,
        ),
    )


def make_plan(args, iters_per_epoch, total, peak_lr):
    """Rates that warm up and fall as a cosine, or by --gamma after each of --decay_epochs."""
    if args.scheduler == "cosine":
        factors = cosine_schedule(
            1.0,
            args.min_lr / peak_lr,
            args.epochs,
            iters_per_epoch,
            warmup_epochs=args.warmup_epochs,
            start_value=args.warmup_lr / peak_lr,
        ).tolist()
        lr_factor = factors.__getitem__
    else:

        def lr_factor(t):
            return step_lr(1.0, t // iters_per_epoch, args.decay_epochs, args.gamma)

    return Plan(
        epochs=args.epochs,
        iters_per_epoch=iters_per_epoch,
        batch=total,
        lr_factor=lr_factor,
        seed=args.seed,
        label_smoothing=args.smoothing,
        max_norm=args.clip_grad,
        log_freq=args.log_freq,
        val_freq=args.val_freq,
        checkpoint_iters=args.checkpoint_iters,
        checkpoint_freq=args.checkpoint_freq,
    )


def log_plan(args, train, val, plan, origin, num_classes, peak_lr):
    """Say what will be computed, before it is."""
    crops = " + ".join(
        f"{n} x {size} px" for n, size in zip(args.nmb_crops, args.size_crops, strict=True)
    )
    average = f", average of the weights {args.ema_decay:g}" if args.ema_decay is not None else ""
    for line in (
        f"protocol    {args.protocol}",
        f"network     {origin}{average}",
        f"data        {train.name}: {len(train):,} images, {len(val):,} to validate, {num_classes} "
        "classes",
        f"crops       {crops}; RandAugment {args.randaugment}, mixup {args.mixup:g}, CutMix "
        f"{args.cutmix:g}, erasing {args.reprob:g}, each image {args.repeated_aug} times",
        f"batch       {plan.batch} images; {plan.iters_per_epoch:,} iterations an epoch, "
        f"{plan.epochs} epochs",
        f"optimizer   {args.optimizer}, {args.scheduler}, peak learning rate {peak_lr:.4g}, layer decay "
        f"{args.layer_decay:g}, weight decay {args.wd:g}",
    ):
        logger.info(line)


# ============ arguments ============
def parse_args(argv):
    """The arguments; what is not on the command line is of the run, the preset or the protocol."""
    args, _ = eval_flags.parse_args(get_parser(), argv, "eval_finetune")
    is_plain = args.arch in ("alexnet", "vgg16")
    if is_plain and args.sobel is None and not args.pretrained:
        args.sobel = False  # ours, with batch norm, rather than torchvision's
    if args.protocol == "auto":
        args.protocol = "deepercluster" if is_plain else "resnet"
        if is_transformer(args.arch) or "vit" in args.arch or "deit" in args.arch:
            args.protocol = "deit"
    defaults = {"batch": 256, **PROTOCOLS[args.protocol], **PRESETS[args.preset]}
    if args.preset != "imagenet":
        defaults["lr"] = SMALL_LR[args.protocol]
        defaults.pop("batch_size", None)
    if args.nmb_crops == [1]:  # else those of the training scripts
        defaults |= {"color_jitter": [0.0], "grayscale": 0.0, "blur": [0.0]}
    for name, value in defaults.items():
        if name not in args.given:
            setattr(args, name, value)
    if "drop_path_rate" not in args.given and not may_have_stochastic_depth(args.arch):
        args.drop_path_rate = 0.0  # of torchvision's vision transformers, say
    if "warmup_epochs" not in args.given:
        args.warmup_epochs = min(args.warmup_epochs, args.epochs // 2)
    fill_in_crops(args)
    return args


def may_have_stochastic_depth(arch):
    """Whether a network of this name may leave out branches in training; of timm's not all can."""
    return is_transformer(arch) or arch.startswith(TIMM)


def fill_in_crops(args):
    """Sizes and areas of crops that are not given: of the largest those of a single crop."""
    count, of_preset = len(args.nmb_crops), CROPS[args.preset]
    if args.size_crops is None:
        args.size_crops = [args.size, *of_preset["size"][1:]][:count]
    if args.preset == "imagenet":
        smallest, largest = ONE_CROP
        if args.min_scale_crops is None:
            args.min_scale_crops = [smallest, *of_preset["min_scale"][1:]][:count]
        if args.max_scale_crops is None:
            args.max_scale_crops = [largest, *of_preset["max_scale"][1:]][:count]
    image_flags.fill_in_crops(args)


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive, boolean = flags.at_least_zero, flags.positive, flags.boolean
    probability = flags.probability

    add = parser.add_argument_group("method").add_argument
    add("--protocol", default="auto", choices=["auto", *PROTOCOLS],
        help="auto: deit for vision transformers, deepercluster for alexnet and vgg16, else resnet")
    add("--from_scratch", action="store_true",
        help="start from the seed, with --pretrained from its network before any training")
    add("--evaluate", type=boolean, nargs="?", const=True, default=False,
        help="train nothing: evaluate what was fine-tuned")
    add("--sobel2RGB", type=boolean, default=False,
        help="make Sobel filters and the first convolution one of colours, which is trained")
    add("--drop_path_rate", type=probability, default=0.0, help="stochastic depth (deit 0.1)")
    add("--layer_decay", type=positive(float), default=1.0,
        help="factor on the learning rate for each block of a vision transformer further down; 1: none")
    add("--ema_decay", type=probability, default=None,
        help="evaluate the average of the weights with this decay, DeiT's is 0.99996 (default: none)")

    eval_flags.add_network_args(parser)
    add = eval_flags.add_path_args(parser)
    image_flags.add_crop_args(add)
    parser.set_defaults(nmb_crops=[1])
    add("--debug", type=boolean, default=False, help="train on the validation images, which are fewer")
    image_flags.add_augment_args(parser)
    add = parser.add_argument_group("strong augmentation, and regularisation").add_argument
    add("--randaugment", type=at_least_zero(int), default=0,
        help="operations of RandAugment on each crop (deit 2)")
    add("--magnitude", type=at_least_zero(int), default=27, help="their strength, from 0 to 30")
    add("--mixup", type=at_least_zero(float), default=0.0, help="alpha of mixup, 0: none (deit 0.8)")
    add("--cutmix", type=at_least_zero(float), default=0.0, help="alpha of CutMix, 0: none (deit 1)")
    add("--reprob", type=probability, default=0.0, help="probability of random erasing (deit 0.25)")
    add("--repeated_aug", type=positive(int), default=1,
        help="how often an epoch repeats an image; of so many times fewer images (deit 3)")
    add("--smoothing", type=probability, default=0.0, help="of labels (deit 0.1)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", "--nepochs", type=positive(int), default=100,
        help="passes over the training images (deit 300, resnet 200)")
    add("--epoch", type=at_least_zero(int), default=0, help="where to begin without a checkpoint")
    add("--start_iter", type=at_least_zero(int), default=0, help="iteration of --epoch to begin at")
    add("--batch_size", type=positive(int), default=None,
        help="images per process (default: deepercluster 128, deit 1024 and resnet 256 over all processes)")
    add("--optimizer", default="sgd", choices=["sgd", "adamw"], help="deit: adamw")
    add("--lr", type=positive(float), default=None,
        help="learning rate (default: deit 0.0005, deepercluster 0.05, resnet 0.1)")
    add("--lr_last_layer", type=positive(float), default=None,
        help="learning rate of the classifier (default: as --lr)")
    add("--lr_reference_batch", type=at_least_zero(int), default=256,
        help="images over all processes that the learning rates are for; they are in proportion to their "
        "number (deit 512); 0: they are not (deepercluster)")
    add("--wd", type=at_least_zero(float), default=None,
        help="weight decay (default: deit 0.05, deepercluster 1e-5, resnet 1e-4)")
    add("--scheduler", default="cosine", choices=["cosine", "step"], help="deepercluster: step")
    add("--warmup_epochs", type=at_least_zero(int), default=0,
        help="epochs of linear warm-up, of cosine (deit and resnet 5; at most half of --epochs)")
    add("--warmup_lr", type=at_least_zero(float), default=0.0, help="where that begins (deit 1e-6)")
    add("--min_lr", type=at_least_zero(float), default=0.0, help="what cosine nears (deit 1e-5)")
    add("--decay_epochs", type=positive(int), nargs="+", default=[30, 60, 90],
        help="epochs after which step multiplies the learning rates by --gamma")
    add("--gamma", type=positive(float), default=0.1, help="that factor")
    add("--clip_grad", type=positive(float), default=None,
        help="largest norm of the gradient (default: any)")
    add("--checkpoint_freq", type=positive(int), default=20,
        help="epochs between the checkpoints that are kept in checkpoints/")
    finetuning_flags.add_loop_args(parser)
    return parser
    # fmt: on


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    dist.resolve_device(args.device)
    eval_flags.check_images(args)
    if args.epoch >= args.epochs:
        raise ValueError(f"--epoch {args.epoch} must be below --epochs {args.epochs}")
    if args.magnitude >= MAGNITUDES:
        raise ValueError(f"--magnitude {args.magnitude} must be at most {MAGNITUDES - 1}")
    if args.randaugment and args.in_chans not in (1, 3):
        raise ValueError(
            f"--randaugment {args.randaugment} needs --in_chans 1 or 3, not {args.in_chans}: use "
            "--randaugment 0"
        )
    unused = ("decay_epochs", "gamma")
    if args.scheduler == "step":
        unused = ("warmup_epochs", "warmup_lr", "min_lr")
    for name in unused:
        if name in args.given:
            raise ValueError(f"--{name} is not for --scheduler {args.scheduler}: leave it out")
    if not may_have_stochastic_depth(args.arch):
        refuse_stochastic_depth(args)
    if args.layer_decay > 1:
        raise ValueError(f"--layer_decay {args.layer_decay} must be at most 1")


if __name__ == "__main__":
    flags.run(main)
