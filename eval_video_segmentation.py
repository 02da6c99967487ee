"""Video object segmentation on DAVIS 2017: the first mask is carried on by frozen features, untrained.

DINO, arXiv:2104.14294, section 4.2.2 and Table 5, after Jabri et al., arXiv:2006.14613: a patch of a
frame takes the labels of the patches most like it, exp(cosine / 0.1), the best 5 of those at most 12
patches away in the first frame and the last 7 (src/evaluate/label_propagation.py). Region similarity J
and contour accuracy F are those of the benchmark, arXiv:1704.00675 (src/evaluate/segmentation_measures.py).

  python eval_video_segmentation.py --pretrained runs/dino --data_path DAVIS    a run, its patches
  python eval_video_segmentation.py --pretrained_weights dino_deitsmall8_pretrain.pth --data_path DAVIS
  python eval_video_segmentation.py --pretrained swav_800ep.pth.tar --arch resnet50 --data_path DAVIS
  torchrun --nproc_per_node 8 eval_video_segmentation.py --pretrained dino.pth --data_path DAVIS

Masks are written to --dump_path/davis/<video>/00000.png, ..., as the benchmark's own code
reads them, the figures to --dump_path/eval_video_segmentation.json. Starting the same command again
goes on with the videos that are not done. A stride of the features is the patch size of a vision
transformer, or 32 px of a ResNet.

Deviations from the authors' code: any network of ours; J and F are computed here; --bs is the number of
frames whose features are computed at once (theirs does not read it); cosines are computed for some rows
of patches at a time, with the rows in reach, where theirs holds all pairs; of exactly equal cosines
exactly --topk count; a map that is the same everywhere becomes 0, not NaN; the longer side is cut to
multiples of 64 px, as theirs, only from 480 px on. Kept: that cut, which makes 480 x 854 to 480 x 832;
red standard deviation 0.228; maps of labels are stretched to 0 to 1 before the largest is taken.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from src import dist
from src.data.datasets import images_like
from src.data.loading import Loader
from src.evaluate import davis
from src.evaluate import flags as eval_flags
from src.evaluate.label_propagation import most_likely, propagate_video
from src.evaluate.progress import Progress
from src.evaluate.segmentation_measures import VOID, measure_frame, summarise
from src.nets.pooling import forward_of_feature, stride_of_positions
from src.nets.pretrained import MODEL_FLAGS, SWAV_RED
from src.nets.weights import fingerprint
from src.pictures.video_masks import draw_videos
from src.run import checkpoint, flags
from src.run.lock import hold_folder
from src.run.log import setup_logging, write_whole
from src.run.stop import StopSignal, finish, leave

logger = logging.getLogger(__name__)

# What masks depend on.
SETTINGS = (
    *(*MODEL_FLAGS, "in_chans", "mean", "std", "short_side", "split"),
    *("n_last_frames", "size_mask_neighborhood", "topk", "temperature"),
)
NAMED = ("pretrained", "checkpoint_key", "data_path")
FIGURES = {
    "jf_mean": "J&F",
    **{"j_mean": "J mean", "j_recall": "J recall", "j_decay": "J decay"},
    **{"f_mean": "F mean", "f_recall": "F recall", "f_decay": "F decay"},
}


# ============ one video ============
class Tracker:
    """What carries the mask of a video's first frame through it: the network, and how it is used.

    forward: normalised frames (B, C, H, W) -> features of a grid of positions by rows, (B, N, D).
    """

    def __init__(self, forward, stride, process, precision, args):
        self.forward, self.stride, self.args = forward, stride, args
        self.process, self.precision = process, precision

    def masks(self, video, first):
        """Labels (H, W) uint8 of the frames after the first, one after the other, from `first` (H, W)."""
        args = self.args
        size = davis.size_of_frame(*first.shape, args.short_side, self.stride)
        grid = tuple(side // self.stride for side in size)
        small = torch.from_numpy(davis.shrink_labels(first, grid)).long()
        small[small == VOID] = 0
        labels = F.one_hot(small.flatten(), davis.count_objects(first) + 1).float()  # (N, K)
        propagated = propagate_video(
            self.features(video, size),
            labels.to(self.process.device),
            grid,
            n_last_frames=args.n_last_frames,
            radius=args.size_mask_neighborhood,
            topk=args.topk,
            temperature=args.temperature,
        )
        for soft in propagated:
            mask = most_likely(soft, grid, self.stride).cpu().numpy()
            yield davis.shrink_labels(mask, first.shape)

    def features(self, video, size):
        """Features (N, D) of the frames of a video, one after the other, resized to `size`."""
        args, device = self.args, self.process.device
        loader = Loader(
            davis.Frames(video.frames, args.in_chans, size),
            batch_size=args.bs,
            num_workers=min(args.workers, -(-len(video.frames) // args.bs)),
            device_type=device.type,
            timeout=args.loader_timeout,
            collate=list,
        )
        mean, std = (
            torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (args.mean, args.std)
        )
        done = 0
        for frames in loader:
            for path, frame in zip(video.frames[done : done + len(frames)], frames, strict=True):
                if frame is None:
                    raise ValueError(f"--data_path: {path} cannot be read as an image")
            done += len(frames)
            images = (torch.stack(frames).to(device).float() / 255 - mean) / std
            with dist.autocast(device, self.precision):
                features = self.forward(images).float()  # (B, N, D)
            if features.shape[1] * self.stride**2 != size[0] * size[1]:
                raise ValueError(
                    f"--arch {args.arch} makes {features.shape[1]} positions of frames of {size[0]} x "
                    f"{size[1]} px, not one for {self.stride} x {self.stride} px: use another --short_side"
                )
            if not features.isfinite().all():
                raise ValueError(
                    f"--pretrained {args.pretrained} makes features that are not finite"
                )
            yield from features


def segment(video, tracker, folder, stop, progress):
    """Write the masks of a video to `folder`; J and F of its objects by frame, None when stopped.

    Where frames of the benchmark have no masks, J and F are of no frame. The first frame, which is given,
    and the last one are not measured, as in the benchmark.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = davis.read_mask(video.masks[0])
    num_objects, measures = davis.count_objects(first), []
    davis.write_mask(folder / f"{video.frames[0].stem}.png", first)
    has_truth = None not in video.masks
    for place, labels in enumerate(tracker.masks(video, first), 1):
        if stop.requested:
            return None
        davis.write_mask(folder / f"{video.frames[place].stem}.png", labels)
        if has_truth and place < len(video.frames) - 1:
            truth = davis.read_mask(video.masks[place])
            if truth.shape != labels.shape:
                raise ValueError(
                    f"--data_path: {video.masks[place]} is of {truth.shape} px, the first mask of its "
                    f"video of {labels.shape} px"
                )
            measures.append(measure_frame(labels, truth, num_objects))
        progress.count(video.name)
    by_frame = np.array(measures).reshape(len(measures), num_objects, 2)
    by_object = by_frame.transpose(1, 2, 0).tolist()
    return {
        "frames": len(video.frames),
        "objects": [{"j": j, "f": f} for j, f in by_object] if measures else [],
    }


# ============ main ============
@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Segment and measure; returns 0, or 128 + the signal when a signal stopped it."""
    args = parse_args(argv)
    launch = dist.read_environment()
    setup_logging(None, launch.rank == 0)
    check_args(args)
    videos = davis.open_davis(args.data_path, args.split)
    network = eval_flags.open_network(args)
    model = network.model
    forward = forward_of_feature(network, "patches")
    stride = stride_of_positions(network, forward)
    args.mean, args.std = network.normalisation(images_like(None, args.in_chans), SWAV_RED)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings = {**settings, "weights": fingerprint(model, network.head)}
    out, folder = Path(args.dump_path), Path(args.dump_path) / "davis"
    checkpoint.check_writable(folder)

    process = dist.init(args.device, args.dist_timeout)
    hold_folder(folder, "eval_video_segmentation")
    precision = dist.resolve_precision(args.precision, process.device)
    model.to(process.device)
    tracker = Tracker(forward, stride, process, precision, args)
    stop = StopSignal()

    # ============ the videos that are not done ============
    settings["precision"] = precision
    of_video = {video.name: {**settings, "video": davis.digest(video)} for video in videos}
    missing = [v for v in videos if read_done(folder, v, of_video[v.name]) is None]
    missing = dist.broadcast_object(missing)  # as the main process sees the folder
    log_plan(args, videos, missing, stride, process)
    rounds = -(-len(missing) // process.world_size)
    own = missing[process.rank :: process.world_size]
    progress = Progress(sum(len(video.frames) - 1 for video in own), "frames")
    for place in range(rounds):
        if place < len(own):
            video = own[place]
            measures = segment(video, tracker, folder / video.name, stop, progress)
            if measures is not None:
                contents = {**measures, "settings": of_video[video.name]}
                write_whole(folder / f"{video.name}.json", json.dumps(contents) + "\n")
        if stop.agreed():
            return leave(stop)
    dist.barrier()  # all files are there

    # ============ results ============
    if process.rank == 0:
        done = [read_done(folder, video, of_video[video.name]) for video in videos]
        named = {name: getattr(args, name) for name in NAMED}
        report(videos, done, settings | named, out / "eval_video_segmentation.json")
        files = [(video.name, video.frames, folder / video.name) for video in videos]
        draw_videos(files, folder / "sheet.png", network.origin)
        if not args.pretrained:
            logger.warning("WARNING: no --pretrained: the network is UNTRAINED, a mere baseline")
        logger.info(f"masks written to {folder}; look at {folder / 'sheet.png'}")
    return finish(stop)


def read_done(folder, video, settings):
    """What was measured of a video whose masks are written; None where they are not.

    Raises ValueError where they were made with other settings.
    """
    path = folder / f"{video.name}.json"
    if not path.is_file():
        return None
    done = json.loads(path.read_text())
    for name, value in settings.items():
        if done["settings"].get(name) != value:
            found = f"with {name} {done['settings'].get(name)}, not {value}"
            if name == "video":
                found = f"of another video named {video.name}, or with other frames or masks"
            raise ValueError(
                f"{folder} holds masks {found}: use another --dump_path, or remove that folder to start "
                "afresh"
            )
    return done


def report(videos, done, settings, path):
    """Log a table by video and the figures of the benchmark, and write them to `path` as one line."""
    rows, objects = {}, []
    for video, measures in zip(videos, done, strict=True):
        pairs = [(x["j"], x["f"]) for x in measures["objects"]]
        objects += pairs
        if pairs:
            rows[video.name] = {"objects": len(pairs), **summarise(pairs)}
    if len(rows) < len(videos):
        logger.info(
            f"{len(videos) - len(rows)} of {len(videos)} videos have no objects, or masks of the first frame "
            "only: they are not measured"
        )
    result = {}
    if objects:
        result = summarise(objects)
        width = max(map(len, [*rows, "all objects"]))
        logger.info(f"{'video':{width}} objects " + " ".join(f"{x:>8}" for x in FIGURES.values()))
        for name, row in [*rows.items(), ("all objects", {"objects": len(objects), **result})]:
            values = " ".join(f"{row[figure]:8.1f}" for figure in FIGURES)
            logger.info(f"{name:{width}} {row['objects']:7} {values}")
    contents = {**result, "videos": rows, "settings": settings}
    write_whole(path, json.dumps(contents) + "\n")
    logger.info(f"written to {path}")


def log_plan(args, videos, missing, stride, process):
    """Say what will be computed, before it is."""
    frames = sum(len(video.frames) for video in videos)
    with Image.open(videos[0].frames[0]) as image:
        size = davis.size_of_frame(image.height, image.width, args.short_side, stride)
    reach = args.size_mask_neighborhood
    near = f"at most {reach} away" if reach else "of the whole frame"
    for line in (
        f"data        {len(videos)} videos of {frames:,} frames, {len(missing)} of them to do, on "
        f"{process.world_size} processes",
        f"features    {args.arch}, frames of {size[0]} x {size[1]} px, {size[0] // stride} x "
        f"{size[1] // stride} positions",
        f"labels      of the {args.topk} most like it of the positions {near}, in the first frame and the "
        f"last {args.n_last_frames}",
    ):
        logger.info(line)


# ============ arguments ============
def parse_args(argv):
    """The arguments; what is not on the command line is of the run or the file that is evaluated."""
    args, _ = eval_flags.parse_args(get_parser(), argv, "eval_video_segmentation")
    if "data_path" not in args.given:
        args.data_path = ""  # a run's is that of its training
    return args


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = flags.Parser(__doc__)
    at_least_zero, positive = flags.at_least_zero, flags.positive

    add = parser.add_argument_group("method").add_argument
    add("--n_last_frames", type=at_least_zero(int), default=7,
        help="frames before the current one that labels come from, besides the first")
    add("--size_mask_neighborhood", type=at_least_zero(int), default=12,
        help="positions, rows and columns, that labels come from at most; 0: from all of a frame")
    add("--topk", type=positive(int), default=5, help="positions that a label comes from")
    add("--temperature", type=positive(float), default=0.1, help="tau of exp(cosine / tau)")

    eval_flags.add_network_args(parser)
    parser.set_defaults(arch="vit_small")
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="",
        help="the folder DAVIS, with JPEGImages, Annotations, ImageSets; must be given")
    add("--split", default="val", help="which videos: a file of ImageSets/2017, without .txt")
    add("--short_side", type=positive(int), default=480,
        help="pixels of the shorter side of the frames that the network sees")
    add("--bs", type=positive(int), default=6, help="frames whose features are computed at once")
    add("--in_chans", type=positive(int), default=3, help="channels of the images")
    add("--mean", type=float, nargs="+", default=None, help="of each channel; default: ImageNet's")
    add("--std", type=float, nargs="+", default=None, help="of each channel; default: ImageNet's")
    flags.add_runtime_args(parser)
    return parser
    # fmt: on


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    dist.resolve_device(args.device)
    eval_flags.check_images(args)
    if not args.data_path:
        raise ValueError(
            "--data_path must be given: the folder DAVIS of DAVIS 2017, with JPEGImages, Annotations and "
            "ImageSets"
        )


if __name__ == "__main__":
    flags.run(main)
