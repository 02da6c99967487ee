"""Object detection with a pre-trained trunk, all layers fine-tuned, on PASCAL VOC 2007 + 2012 and COCO.

SwAV, arXiv:2006.09882, Tables 2 and 6 to 8, appendices A.5 and B.4, after MoCo, arXiv:1911.05722. Detectors
are torchvision's, on the trunk of anything that --pretrained takes; what lies in --data_path says which:
  VOC   faster_rcnn_c4: 24,000 iterations of 16 images, learning rate 0.1 (from a third, in 1,000), a tenth
        after 18,000 and 22,000; shorter sides of 480 to 800 px, 800 in the test; on test of 2007
  COCO  mask_rcnn_fpn: 90,000 iterations (1x), 0.02, a tenth after 60,000 and 80,000; 640 to 800 px
A flag on the command line wins. MoCo's own values on VOC: --lr 0.02 --warmup_iters 100 --warmup_factor 0.001.

  python eval_detection.py --pretrained runs/swav --data_path VOCdevkit
  torchrun --nproc_per_node 8 eval_detection.py --pretrained swav_800ep_pretrain.pth.tar --data_path VOCdevkit
  torchrun --nproc_per_node 8 eval_detection.py --pretrained swav_800ep_pretrain.pth.tar --data_path coco
Starting the same command again continues where it stopped, in --dump_path/detection/<detector>; results are
one line of JSON in --dump_path/eval_detection_<detector>.json, what was detected lies beside the training.

Deviations from Detectron2, by which the papers trained: torchvision aligns regions without the half pixel and
has the smooth L1 loss with beta 1/9; batches are not grouped by width and height; batch norm statistics are
not computed anew before the test; equal scores are one threshold of VOC's average precision. Kept: difficult
objects of VOC are trained on, batch norms and biases as there (norms have no weight decay). Its AP50 on VOC
2007 is that of 11 points; ap50 here is the area under the curve, and ap50_11points stands beside it.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import json
import logging
from functools import partial
from pathlib import Path

from src import dist
from src.evaluate import detection_sets
from src.evaluate import flags as eval_flags
from src.evaluate.detection_ap import COCO_FIGURES, coco_precision, voc_precision
from src.evaluate.detection_training import (
    detect,
    detector_groups,
    folder_of,
    learning_rate,
    train,
    training_batches,
)
from src.evaluate.masks import import_pycocotools
from src.evaluate.voc_training import Training
from src.nets.pretrained import MODEL_FLAGS
from src.nets.weights import fingerprint
from src.run import checkpoint, flags, image_flags
from src.run.lock import hold_folder
from src.run.log import RunLog, describe_run, setup_logging, write_whole
from src.run.stop import StopSignal, finish, leave

logger = logging.getLogger(__name__)

PROTOCOLS = {
    "voc": {
        "detector": "faster_rcnn_c4", "train_split": detection_sets.VOC_SPLITS[0],
        "test_split": detection_sets.VOC_SPLITS[1], "min_size": list(range(480, 801, 32)),
        "nit": 24000, "steps": [18000, 22000], "lr": 0.1, "warmup_factor": 0.333,
    },
    "coco": {
        "detector": "mask_rcnn_fpn", "train_split": detection_sets.COCO_SPLITS[0],
        "test_split": detection_sets.COCO_SPLITS[1], "min_size": list(range(640, 801, 32)),
        "nit": 90000, "steps": [60000, 80000], "lr": 0.02, "warmup_factor": 0.001,
    },
}  # fmt: skip
DETECTORS = ("faster_rcnn_c4", "faster_rcnn_fpn", "mask_rcnn_fpn")
BATCH = 16  # images, over all processes
# What the result depends on, besides the number of iterations.
SETTINGS = (
    *MODEL_FLAGS, "in_chans", "mean", "std", "detector", "train_split", "min_size", "max_size",
    "proposals", "sync_bn", "steps", "gamma", "lr", "warmup_iters", "warmup_factor", "wd", "seed",
)  # fmt: skip
NAMED = ("pretrained", "checkpoint_key", "data_path", "test_split", "test_size", "nit")
FIGURES = {
    "voc": [f"{x}{y}" for y in ("", "_11points") for x in ("ap", "ap50", "ap75")],
    "coco": [*COCO_FIGURES, *(f"mask_{x}" for x in COCO_FIGURES)],
}


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Train and test a detector; returns 0, or 128 + the signal when a signal stopped it."""
    from src.evaluate.detection_networks import build_detector  # here: --help needs no torchvision

    args, kind = parse_args(argv)
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    check_args(args, kind)
    with_masks = args.detector == "mask_rcnn_fpn"
    data, tested = open_parts(args, with_masks)
    images = detection_sets.TrainingImages(data, args.min_size, args.max_size, args.seed)
    check_batch(args, launch.world_size, len(images))
    network = eval_flags.open_network(args)
    args.mean, args.std = network.normalisation(data.images)
    total = args.batch_size * launch.world_size
    settings = {
        **{name: getattr(args, name) for name in SETTINGS},
        "weights": fingerprint(network.model, network.head),
        "batch": total,
        "content": data.digest(),
    }
    module = build_detector(
        network,
        args.detector,
        len(data.classes),
        mean=args.mean,
        std=args.std,
        seed=args.seed,
        proposals=args.proposals,
    )
    out, folder = Path(args.dump_path), folder_of(args.dump_path, args.detector)
    checkpoint.check_writable(folder)

    process = dist.init(args.device, args.dist_timeout)
    settings["precision"] = dist.resolve_precision(args.precision, process.device)
    hold_folder(folder, "eval_detection")
    state = Training(
        module,
        args.wd,
        process=process,
        precision=settings["precision"],
        folder=folder,
        settings=settings,
        sync_bn=args.sync_bn,
        groups=detector_groups,
    )
    start = state.resume()
    if start > args.nit:
        raise ValueError(
            f"--nit {args.nit}: {folder} is trained for {start} iterations already: give --nit {start} to "
            "test it, or another --dump_path"
        )
    setup_logging(folder, process.rank == 0)
    if process.rank == 0:  # not before: what may not go on leaves the folder as it was
        describe_run(eval_flags.with_network(args, network), folder)
    log_plan(args, data, images, tested, network.origin, total)

    # ============ training ============
    stop = StopSignal()
    if start < args.nit:
        log = RunLog(folder if process.rank == 0 else None, tensorboard=False)
        if fit(args, state, images, start, total, stop, log) < args.nit:
            return leave(stop)
        log.close()
    else:
        logger.info(f"{folder} is trained for its {start} iterations already")

    # ============ evaluation ============
    with stop.at_once():  # all is saved
        detections = detect(
            state.module,
            tested,
            short_side=args.test_size,
            longest=args.max_size,
            process=process,
            precision=state.precision,
            workers=args.workers,
            loader_timeout=args.loader_timeout,
        )
        result = dist.on_main(lambda: measure(tested, detections, with_masks))
    if process.rank == 0:
        write_whole(folder / "detections.json", json.dumps(detections) + "\n")
        named = settings | {name: getattr(args, name) for name in NAMED}
        row = {"network": network.origin, "detector": args.detector, "data": tested.images.name}
        report(result, row, FIGURES[kind], named, out / f"eval_detection_{args.detector}.json")
        if not args.pretrained:
            logger.warning("WARNING: no --pretrained: detection was learnt FROM SCRATCH")
    return finish(stop)


def open_parts(args, with_masks):
    """The images to train on and those to test on, with the same classes."""
    options = {"in_chans": args.in_chans, **image_flags.reading_options(args)}
    data = detection_sets.open_detection(
        args.data_path, args.train_split, with_masks=with_masks, **options
    )
    tested = detection_sets.open_detection(
        args.data_path,
        [args.test_split],
        with_masks=with_masks,
        split_flag="--test_split",
        keep_contents=True,
        **options,
    )
    if (data.classes, data.categories) != (tested.classes, tested.categories):
        raise ValueError(
            f"--test_split {args.test_split} has other categories than --train_split "
            f"{' '.join(args.train_split)}"
        )
    if not data.with_objects():
        raise ValueError(
            f"--train_split {' '.join(args.train_split)}: no object is left to train on: there is none, or "
            "only crowds and boxes outside of their images"
        )
    if not tested.has_counted():
        raise ValueError(
            f"--test_split {args.test_split}: it has no object that counts, and an average precision is of "
            "some: there is none, or only difficult ones, crowds and boxes outside of their images"
        )
    return data, tested


def fit(args, state, images, start, total, stop, log):
    """Train from iteration `start` on by the flags; returns the iterations done."""
    batches = training_batches(
        images, args.batch_size, state.process, args.seed, args.workers, args.loader_timeout
    )
    lr_of = partial(
        learning_rate,
        args.lr,
        steps=args.steps,
        gamma=args.gamma,
        warmup_iters=args.warmup_iters,
        warmup_factor=args.warmup_factor,
    )
    return train(
        state,
        batches,
        lr_of,
        start=start,
        iterations=args.nit,
        batch=total,
        log_freq=args.log_freq,
        checkpoint_iters=args.checkpoint_iters,
        stop=stop,
        log=log,
    )


def measure(tested, detections, with_masks):
    """Average precisions, by the rule of the data set."""
    if tested.kind == "voc":
        return voc_precision(tested, detections)
    return coco_precision(tested.contents, detections, with_masks)


def report(result, row, figures, settings, path):
    """Log average precisions, by class and as a table, and write them to `path` as one line of JSON."""
    for name, value in result["by_class"].items():
        logger.info(f"{name:16} " + ("no object" if value is None else f"{value:6.2f}"))
    columns = row | {
        name.replace("_11points", ", 11 points")
        .replace("_", " ")
        .replace("ap", "AP"): f"{value:.2f}"
        for name, value in result.items()
        if name in figures and value is not None
    }
    for cells in (columns, ["---"] * len(columns), columns.values()):
        logger.info(f"| {' | '.join(cells)} |")
    write_whole(path, json.dumps({**result, "settings": settings}) + "\n")
    means = {name: round(result[name], 2) for name in figures if result.get(name) is not None}
    logger.info(
        json.dumps({"evaluation": path.stem, "pretrained": settings["pretrained"], **means})
    )
    logger.info(f"written to {path}")


def log_plan(args, data, images, tested, origin, total):
    """Say what will be computed, before it is."""
    sides = f"{min(args.min_size)} to {max(args.min_size)} px"
    for line in (
        f"detector    {args.detector} on {origin}, all layers trained",
        f"data        {data.images.name}: {len(images):,} of {len(data):,} images have objects, of "
        f"{len(data.classes)} classes; tested on {tested.images.name}, {len(tested):,} images",
        f"images      shorter sides of {sides}, {args.test_size} px in the test; at most {args.max_size} px",
        f"batch       {total} images; {args.nit:,} iterations, {args.nit * total / len(images):.1f} epochs",
        f"optimizer   SGD, learning rate {args.lr:g} after {args.warmup_iters:,} iterations, times "
        f"{args.gamma:g} after {', '.join(f'{step:,}' for step in args.steps)}, weight decay {args.wd:g}",
    ):
        logger.info(line)


# ============ arguments ============
def parse_args(argv):
    """The arguments, and "voc" or "coco", by which those are that neither command line nor run says."""
    args, _ = eval_flags.parse_args(get_parser(), argv, "eval_detection")
    if "data_path" not in args.given:
        raise ValueError(
            "--data_path must be given: VOCdevkit, with VOC2007 and VOC2012, or the folder of COCO, with "
            "annotations, train2017 and val2017"
        )
    kind = detection_sets.kind_of_set(args.data_path)
    for name, value in PROTOCOLS[kind].items():
        if name not in args.given:
            setattr(args, name, value)
    if args.detector != "faster_rcnn_c4" and "lr" not in args.given:
        args.lr = PROTOCOLS["coco"]["lr"]  # whose head of boxes has no batch norm either
    return args, kind


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive = flags.at_least_zero, flags.positive

    add = parser.add_argument_group("method").add_argument
    add("--detector", default=None, choices=DETECTORS,
        help="(default: faster_rcnn_c4 on VOC, mask_rcnn_fpn on COCO)")
    add("--proposals", type=positive(int), default=512,
        help="proposals of an image that the loss is of; fewer need less memory")

    eval_flags.add_network_args(parser)
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="", help="VOCdevkit or the folder of COCO; must be given")
    add("--train_split", nargs="+", default=None,
        help="to train on (default: 2007_trainval 2012_trainval of VOC, train2017 of COCO)")
    add("--test_split", default=None, help="(default: 2007_test of VOC, val2017 of COCO)")
    image_flags.add_reading_args(add)
    add("--min_size", type=positive(int), nargs="+", default=None,
        help="shorter sides in pixels, of which each training image has one (default: 480 512 ... 800, on "
        "COCO from 640)")
    add("--test_size", type=positive(int), default=800, help="shorter side in pixels of test images")
    add("--max_size", type=positive(int), default=1333, help="longer side in pixels, at most")
    add("--in_chans", type=positive(int), default=3, help="channels of the images")
    add("--mean", type=float, nargs="+", default=None, help="of each channel; default: ImageNet's")
    add("--std", type=float, nargs="+", default=None, help="of each channel; default: ImageNet's")

    add = parser.add_argument_group("optimisation").add_argument
    add("--nit", type=positive(int), default=None,
        help="iterations of training (default: 24000 on VOC, 90000 on COCO)")
    add("--steps", type=positive(int), nargs="+", default=None,
        help="iterations after which the learning rate falls (default: 18000 22000, COCO 60000 80000)")
    add("--gamma", type=positive(float), default=0.1, help="factor on it there")
    add("--batch_size", "--batch_size_per_gpu", type=positive(int), default=None,
        help="images per process (default: 16 over all processes)")
    add("--lr", type=positive(float), default=None,
        help="learning rate for 16 images (default: 0.1 for faster_rcnn_c4 on VOC, else 0.02)")
    add("--warmup_iters", type=at_least_zero(int), default=1000,
        help="iterations in which the learning rate rises")
    add("--warmup_factor", type=flags.probability, default=None,
        help="share of it at the start (default: 0.333 on VOC, 0.001 on COCO)")
    add("--wd", type=at_least_zero(float), default=1e-4, help="weight decay")
    add("--sync_bn", default="pytorch", choices=["pytorch", "none"],
        help="batch norm over all processes, or in each")
    add("--log_freq", type=positive(int), default=20, help="iterations between log lines")
    add("--checkpoint_iters", type=positive(int), default=1000, help="iterations between saves")
    flags.add_runtime_args(parser)
    return parser
    # fmt: on


def check_args(args, kind) -> None:
    """Raise ValueError on arguments that do not fit together, or a package that is not there."""
    dist.resolve_device(args.device)
    eval_flags.check_images(args)
    if kind == "voc" and args.detector == "mask_rcnn_fpn":
        raise ValueError(
            "--detector mask_rcnn_fpn needs masks, which VOC's Annotations lack: use faster_rcnn_fpn"
        )
    if kind == "coco":
        import_pycocotools()
    if max(args.min_size + [args.test_size]) > args.max_size:
        raise ValueError(
            f"--max_size {args.max_size} is below --min_size or --test_size: use a larger one"
        )


def check_batch(args, world_size, num_images) -> None:
    """The published batch where none is given; ValueError for one larger than the data."""
    if args.batch_size is None:
        args.batch_size = max(1, min(BATCH, num_images) // world_size)
    if args.batch_size * world_size > num_images:
        raise ValueError(
            f"--batch_size {args.batch_size} x {world_size} processes is more than the {num_images} images "
            "with objects"
        )


if __name__ == "__main__":
    flags.run(main)
