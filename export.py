"""A trained network for other libraries: its trunk, without its head, in their formats.

torchvision   state dict that torchvision.models.<arch>(weights=None) takes, but for its classifier
timm          state dict for timm.create_model(name, num_classes=0); the log says which name
safetensors   the trunk by its own names, with arch, image_size, mean and std in the metadata
torch_export  program for torch.export.load: any batch, and any size of images where the network can
onnx          the same for onnxruntime, with which it is checked where that is installed
detectron2    pickle for MODEL.WEIGHTS of R50-C4 and R50-FPN configurations and the like
detectron2_fpn   the same with FPN's whole names, which begin with backbone.bottom_up.
detr          state dict with the names of the backbone of facebookresearch/detr

  python export.py --pretrained runs/mine --format torchvision
  python export.py --pretrained runs/mine --format torchvision --output resnet.pth
  python export.py --pretrained runs/dino --format timm safetensors onnx
  python export.py --pretrained swav_800ep.pth.tar --format detectron2 detr --dump_path swav

Several files are called <arch>_<format>, and lie in the run's folder, in export/. export.json beside
them says how images are normalised, what the network is called there, and what a file lacks. All are
of float32. Programs give the features of the network to 1e-5 of the largest, or are not written.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import importlib.util
import io
import json
import logging
import pickle
from pathlib import Path

import torch

from src.data.datasets import images_like
from src.errors import CheckpointError, RunError, cause
from src.evaluate import flags as eval_flags
from src.nets import export_names, export_programs
from src.nets.pretrained import run_folder
from src.nets.weights import fingerprint
from src.run import checkpoint, flags
from src.run.lock import hold_folder, release_folders
from src.run.log import setup_logging, write_whole

logger = logging.getLogger(__name__)

# What a file's name ends in, by format.
ENDINGS = {
    "torchvision": "_torchvision.pth",
    "timm": "_timm.pth",
    "safetensors": ".safetensors",
    "torch_export": ".pt2",
    "onnx": ".onnx",
    "detectron2": "_detectron2.pkl",
    "detectron2_fpn": "_detectron2_fpn.pkl",
    "detr": "_detr.pth",
}
PROGRAMS = ("torch_export", "onnx")
# Packages that a format cannot be written without.
PACKAGES = {"safetensors": ["safetensors"], "onnx": ["onnx", "onnxscript"]}


# ============ formats ============
def rename(network, kind, zero_classifier):
    """The trunk by the names of a library; ValueError where the library has no such network."""
    if kind == "torchvision":
        return export_names.to_torchvision(network, zero_classifier)
    if kind == "timm":
        return export_names.to_timm(network)
    if kind == "detr":
        return export_names.to_detr(network)
    prefix = "backbone.bottom_up." if kind == "detectron2_fpn" else ""
    return export_names.to_detectron2(network, prefix)


def file_of_names(kind, renamed, statistics):
    """(content of the file, what is to be said of it) of a trunk by the names of a library."""
    file, weights = io.BytesIO(), renamed.weights
    said = {"model": renamed.model, "model_options": renamed.options, "missing": renamed.missing}
    if renamed.features is not None:
        said["features_of_model"] = renamed.features[1]  # beside num_features, those of the network
    if kind.startswith("detectron2"):
        arrays = {name: x.numpy() for name, x in weights.items()}
        author = "export.py"  # any name but Caffe2 means names of Detectron2
        contents = {"model": arrays, "__author__": author, "matching_heuristics": True}
        pickle.dump(contents, file)
        pixels = {
            f"MODEL.PIXEL_{name.upper()}": [round(255 * x, 4) for x in statistics[name]]
            for name in ("mean", "std")
        }
        said["settings"] = {**renamed.settings, **pixels, "INPUT.FORMAT": "RGB"}
    else:
        torch.save({"model": weights} if kind == "detr" else weights, file)
    return file.getvalue(), said


def file_of_safetensors(network, statistics):
    """(content of the file, what is to be said of it) of a trunk by its own names."""
    from safetensors.torch import save

    metadata = {name: json.dumps(value) for name, value in statistics.items()}
    metadata |= {"arch": network.arch, "format": "pt"}
    return save(export_names.own_tensors(network.model), metadata), {"model": network.arch}


def file_of_program(kind, network, traced):
    """(content of the file, what is to be said of it) of a program, after it was checked."""
    program, any_size = traced
    image_size = network.image_size
    sizes = export_programs.two_sizes(image_size) if any_size else [(image_size, image_size)]
    if kind == "torch_export":
        contents, run = export_programs.program_bytes(program), program.module()
    else:
        contents = export_programs.to_onnx(program, any_size)
        run = export_programs.onnx_features(contents)
    sides = ["height", "width"] if any_size else [image_size, image_size]
    said = {"images": ["batch", network.in_chans, *sides]}
    if run is None:
        logger.warning("onnx: not checked: pip install onnxruntime")
        return contents, {**said, "difference": None}
    try:
        difference = export_programs.check(run, network.model, network.in_chans, sizes)
    except RunError as error:
        if not any_size:
            raise
        logger.info(f"{kind}: not for images of any size: {error}")
        traced = trace(network, try_any_size=False)
        return file_of_program(kind, network, traced)
    checked = " and ".join(f"{height} x {width}" for height, width in sizes)
    logger.info(f"{kind}: checked at 1 and 3 images of {checked} px, differs by {difference:.1e}")
    return contents, {**said, "difference": difference}


def trace(network, try_any_size=True):
    """(program of the trunk, whether it takes images of any size)."""
    return export_programs.trace(
        network.model, network.in_chans, network.image_size, try_any_size=try_any_size
    )


# ============ files ============
def add_record(path, name, record):
    """Put what is to be said of a file into export.json; what it says of other files there stays."""
    try:
        records = json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({cause(error)}): move it away") from error
    records = {file: said for file, said in records.items() if (path.parent / file).exists()}
    write_whole(path, (json.dumps({**records, name: record}, indent=1) + "\n").encode())


def statistics_of(network):
    """What images of a network are to be like: their side in pixels, mean and std of each channel."""
    images = images_like(network.run_args.get("data_path"), network.in_chans)
    mean, std = (list(x) for x in network.normalisation(images))
    return {"image_size": network.image_size, "mean": mean, "std": std}


def log_file(kind, path, contents, said):
    """Say what was written, how large it is, and what it is for."""
    logger.info(f"{kind}: {path}, {len(contents) / 2**20:.1f} MB")
    if "images" in said:
        sizes = "any size" if "height" in said["images"] else f"{said['images'][2]} px only"
        logger.info(f"{kind}: takes any number of images of {sizes}")
        return
    options = "".join(f", {name}={value}" for name, value in said.get("model_options", {}).items())
    logger.info(f"{kind}: for {said['model']}{options}")
    if "features_of_model" in said:
        logger.info(
            f"{kind}: it has {said['features_of_model']} features: first the {said['num_features']} of the "
            "network, which is narrower, then zeros"
        )
    if said.get("missing"):
        names = said["missing"]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        logger.info(f"{kind}: without {', '.join(names[:4])}{more}, which the trunk has not")


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Export; returns 0."""
    args = parse_args(argv)
    setup_logging(None, True)
    check_args(args)
    network = eval_flags.open_network(args)
    network.model.to(memory_format=torch.contiguous_format)
    statistics = statistics_of(network)
    # What a library has not is refused before anything is written.
    renamed = {
        kind: rename(network, kind, args.zero_classifier)
        for kind in args.format
        if kind not in (*PROGRAMS, "safetensors")
    }
    folder = Path(args.output).parent if args.output else Path(args.dump_path)
    checkpoint.check_writable(folder)
    hold_folder(folder, "export")
    traced = None
    if set(PROGRAMS) & set(args.format):
        traced = trace(network)
    common = {
        "pretrained": args.pretrained,
        "arch": network.arch,
        "weights": fingerprint(network.model),
        "in_chans": network.in_chans,
        "num_features": network.model.num_features,
        **statistics,
    }
    for kind in args.format:
        if kind in renamed:
            contents, said = file_of_names(kind, renamed[kind], statistics)
        elif kind == "safetensors":
            contents, said = file_of_safetensors(network, statistics)
        else:
            contents, said = file_of_program(kind, network, traced)
        path = Path(args.output) if args.output else folder / f"{network.arch}{ENDINGS[kind]}"
        write_whole(path, contents)
        record = {"format": kind, **common, **said}
        add_record(folder / "export.json", path.name, record)
        log_file(kind, path, contents, record)
    mean, std = ([round(x, 4) for x in statistics[name]] for name in ("mean", "std"))
    logger.info(f"images: {network.image_size} px, values from 0 to 1, mean {mean}, std {std}")
    logger.info(f"features: {network.model.num_features}; all this is in {folder / 'export.json'}")
    release_folders()
    return 0


# ============ arguments ============
def parse_args(argv):
    """The arguments; the command line wins over the run or the file, this over the defaults."""
    parser = get_parser()
    explicit = flags.explicit_flags(parser, argv)
    args = eval_flags.with_defaults(parser, explicit)
    if not args.pretrained:
        raise ValueError("--pretrained is needed: an untrained network is not worth exporting")
    _, said = eval_flags.network_defaults(args, explicit)
    if eval_flags.is_run(args.pretrained):
        said["dump_path"] = str(run_folder(args.pretrained) / "export")
    return eval_flags.with_defaults(parser, explicit, said)


def get_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser, positive = flags.Parser(__doc__), flags.positive

    add = parser.add_argument_group("files").add_argument
    add("--format", nargs="+", choices=list(ENDINGS), default=[], help="one or several formats")
    add("--output", default=None, help="name of the file, of a single format")
    add("--dump_path", "--output_dir", default="export",
        help="folder of the files (default: export/ in the run's folder, or here)")
    add("--zero_classifier", action="store_true",
        help="torchvision: have zeros in the place of the classifier that the trunk lacks")

    add = parser.add_argument_group("images").add_argument
    add("--size", type=positive(int), default=None,
        help="side in pixels of the images (default: of the run's largest crops, else 224)")
    add("--in_chans", type=positive(int), default=3, help="channels of the images")
    add("--mean", type=float, nargs="+", default=None, help="of each channel; default: the run's")
    add("--std", type=float, nargs="+", default=None, help="of each channel; default: the run's")
    eval_flags.add_network_args(parser)
    return parser
    # fmt: on


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together, and for packages that are not there."""
    if not args.format:
        raise ValueError(f"--format is needed: one or several of {', '.join(ENDINGS)}")
    args.format = list(dict.fromkeys(args.format))
    if args.output and len(args.format) > 1:
        raise ValueError(
            f"--output {args.output} is one file, and --format names {len(args.format)}: use --dump_path"
        )
    if args.output and (Path(args.output).is_dir() or Path(args.output).name == "export.json"):
        raise ValueError(f"--output {args.output} must be the name of a file of weights")
    if args.zero_classifier and "torchvision" not in args.format:
        raise ValueError("--zero_classifier is for --format torchvision: leave it out")
    for kind in args.format:
        packages = PACKAGES.get(kind, [])
        if any(importlib.util.find_spec(package) is None for package in packages):
            raise ValueError(
                f"--format {kind} needs the {'package' if len(packages) == 1 else 'packages'} "
                f"{' and '.join(packages)}: pip install {' '.join(packages)}"
            )
    eval_flags.check_images(args)


if __name__ == "__main__":
    flags.run(main)
