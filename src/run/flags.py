"""Command line shared by all scripts: parser, flags of the run time, presets, errors in one sentence."""

import argparse
import logging
import math
import sys
from collections.abc import Callable

from .. import dist
from ..dist.syncbn import sharing_processes
from .flag_types import at_least_zero, boolean, positive, probability
from .presets import SHARED, preset_of

__all__ = ["at_least_zero", "boolean", "positive", "probability"]  # scripts have them from here

logger = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose --help shows defaults and whose errors are one sentence, status 2."""

    def __init__(self, doc: str):
        super().__init__(
            usage="%(prog)s [flags]",
            description=doc,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each flag that has one, the script's docstring as it stands."""

    def _get_help_string(self, action):
        switch = action.default is False and action.nargs == 0
        no_default = action.default in (None, "") or switch or "(default" in (action.help or "")
        return action.help if no_default else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        kind = getattr(action.type, "__name__", "")
        if "int" in kind:
            return "N"
        return "X" if "float" in kind or "probability" in kind else "VALUE"


def add_runtime_args(parser: argparse.ArgumentParser) -> None:
    """Flags of how a run is run, not of what it computes; the same in every script."""
    group = parser.add_argument_group("runtime")
    add = group.add_argument
    add("--dump_path", "--output_dir", "--exp", default=".",
        help="folder of the run: checkpoints, logs, plots")  # fmt: skip
    add("--seed", type=at_least_zero(int), default=31, help="seed of every random draw")
    add("--workers", "--num_workers", type=at_least_zero(int), default=10,
        help="loader processes per training process; 0: load in the process itself")  # fmt: skip
    add(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto: a GPU if there is one"
    )
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
        help="of the network's forward and backward pass; auto: bf16 on a GPU that has it, fp16 with "
        "loss scaling on one that has not, fp32 on a CPU")  # fmt: skip
    add("--use_fp16", type=boolean, default=None,
        help="published spelling: true = --precision auto, false = --precision fp32")  # fmt: skip
    launcher = (["--dist_url", "--dist-url"], ["--world_size", "--world-size"], ["--rank"])
    for flags in (*launcher, ["--local_rank", "--local-rank"], ["--debug_slurm"]):
        add(*flags, default=None, help="accepted and ignored: the launcher's environment says it")


def add_training_args(parser: argparse.ArgumentParser) -> None:
    """Flags of starting, logging and saving, for the scripts that train."""
    add = parser.add_argument_group("learning-rate scaling, weights, batch norm").add_argument
    add("--lr_scaling", default="none", choices=["none", "linear", "sqrt"],
        help="scale all learning rates by the global batch / --lr_reference_batch")  # fmt: skip
    add("--lr_reference_batch", type=positive(int), default=4096, help="images, see --lr_scaling")
    add("--init_from", default=None, help="weights to start from: a checkpoint or released file")
    add("--sync_bn", default="pytorch", choices=["pytorch", "apex", "none"],
        help="batch norm across processes; apex where it is installed, else as pytorch")  # fmt: skip
    add("--syncbn_process_group_size", type=at_least_zero(int), default=8,
        help="processes that share their batch norm; 0: all")  # fmt: skip
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add = parser.add_argument_group("logging and checkpoints").add_argument
    add("--checkpoint_freq", "--saveckp_freq", type=positive(int), default=25,
        help="epochs between the checkpoints that are kept in checkpoints/")  # fmt: skip
    add("--checkpoint_iters", "--checkpoints", type=at_least_zero(int), default=0,
        help="iterations between saves inside an epoch; 0: only at the end of each epoch")  # fmt: skip
    add("--log_freq", type=positive(int), default=50, help="iterations between log lines")
    add("--knn_freq", type=at_least_zero(int), default=0,
        help="epochs between k-NN evaluations on the labels of the data, if any; 0: none")  # fmt: skip
    add("--abort_on_collapse", action="store_true", help="stop when a collapse is diagnosed")
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=True,
        help="write TensorBoard events, where the package tensorboard is installed")  # fmt: skip


def parse_args(
    parser: argparse.ArgumentParser, presets: dict[str, dict], argv: list[str] | None
) -> argparse.Namespace:
    """Parse `argv`; the defaults are those of the preset, a flag on the command line wins.

    parser: with --data_path and --preset; its own defaults are the preset imagenet. presets: changed
    defaults of the method, by preset; those that methods share are in src.run.presets. A default warm-up
    that is longer than --epochs becomes half of them, and check_batch says so.
    """
    known, _ = parser.parse_known_args(argv)
    preset = preset_of(known.data_path) if known.preset == "auto" else known.preset
    defaults = {name: SHARED[preset][name] for name in SHARED[preset] if name in known}
    parser.set_defaults(**{**defaults, **presets[preset]})
    args = parser.parse_args(argv)
    if "warmup_epochs" in args and args.warmup_epochs > args.epochs:
        parser.set_defaults(warmup_epochs=args.epochs // 2)
        args, usual = parser.parse_args(argv), args.warmup_epochs
        if args.warmup_epochs != usual:  # else it was asked for: check_batch refuses it
            args.note = f"the usual {usual} epochs of warm-up are {args.warmup_epochs} in a run of "
            args.note += f"--epochs {args.epochs}; --warmup_epochs says otherwise"
    args.preset = preset
    if args.use_fp16 is not None and args.precision == "auto":
        args.precision = "auto" if args.use_fp16 else "fp32"
    return args


def check_runtime(args: argparse.Namespace, world_size: int) -> None:
    """ValueError for a device that is not there, or groups that do not divide the processes."""
    dist.resolve_device(args.device)
    if args.sync_bn != "none":
        sharing_processes(args.syncbn_process_group_size, world_size)


def check_batch(args: argparse.Namespace, global_batch: int, num_images: int) -> None:
    """ValueError for more images in a batch than there are, or a warm-up longer than the run.

    Logs what parse_args has changed, which is before there is a log, and takes its note out of args.
    """
    if global_batch > num_images:
        raise ValueError(
            f"--batch_size {args.batch_size} makes batches of {global_batch} images, and "
            f"--data_path {args.data_path} has {num_images}: use a smaller one"
        )
    if "warmup_epochs" in args and args.warmup_epochs > args.epochs:
        raise ValueError(
            f"--warmup_epochs {args.warmup_epochs} exceeds --epochs {args.epochs}: use a smaller one"
        )
    if "note" in args:
        logger.info("note: %s", vars(args).pop("note"))


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that one sentence explains."""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main; what the user can mend is one sentence on stderr, and no traceback.

    Exit status 2 for input that is wrong, a file or folder included, 1 for a run that cannot go on.
    The traceback goes to train.log, if the run has got as far as opening it.
    """
    dist.settle_vector_functions()
    try:
        status = main()
    except (ValueError, OSError, RunError) as error:
        logger.debug("stopped by an error", exc_info=True)
        sentence = str(error).strip()
        if sentence.startswith("Caught "):  # in a loader's worker, with its traceback before it
            sentence = sentence.splitlines()[-1].partition(": ")[2]
        sys.stderr.write(f"error: {' '.join(sentence.split())}\n")
        status = 1 if isinstance(error, RunError) else 2
    sys.exit(status or 0)


def add_backbone_args(
    parser: argparse.ArgumentParser, arch: str = "resnet50", others: str = ""
) -> Callable:
    """The network without its head; returns the group's add_argument for what a method adds.

    arch: the default. others: names for the help, which names vision transformers after add_vit_args.
    """
    add = parser.add_argument_group("model").add_argument
    transformers = "--patch_size" in parser._option_string_actions
    others += "vit_tiny vit_small vit_base, xcit_* (by timm), " if transformers else ""
    add("--arch", "-a", default=arch,
        help=f"{others}resnet18 34 50 101 152, resnet50w2 w4 w5, resnext50_32x4d, resnext101_32x8d, "
        "or any torchvision classification model")  # fmt: skip
    add("--stem", default="imagenet", choices=["imagenet", "small"],
        help="imagenet: 7x7 stride 2 and max-pooling; small, for 32 px: 3x3 stride 1")  # fmt: skip
    add("--width", type=positive(float), default=1.0, help="multiplies the width of every layer")
    add("--zero_init_residual", action="store_true", help="start every residual branch at zero")
    return add


def add_vit_args(parser: argparse.ArgumentParser) -> Callable:
    """What only vision transformers have; returns the group's add_argument."""
    add = parser.add_argument_group("vision transformer").add_argument
    add("--patch_size", type=positive(int), default=16, help="side of a patch in pixels: 16, 8, 5")
    add("--img_size", type=positive(int), default=None,
        help="side in pixels that the table of positions is for (default: of the images, or 224)")  # fmt: skip
    add("--num_registers", type=at_least_zero(int), default=0,
        help="register tokens, arXiv:2309.16588")  # fmt: skip
    add("--depth", type=positive(int), default=None, help="number of blocks (default: of the arch)")
    return add


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """The network and SwAV's projection head."""
    add = add_backbone_args(parser)
    add("--hidden_mlp", type=at_least_zero(int), default=2048,
        help="hidden units of the projection head; 0: a linear head")  # fmt: skip
    add("--feat_dim", type=positive(int), default=128, help="D, dimension of the embedding z")
    add("--head_dims", type=positive(int), nargs="+", default=None,
        help="sizes of a free projection MLP, such as 2048 2048 128; instead of the two above")  # fmt: skip
    add("--head_bn", action=argparse.BooleanOptionalAction, default=True,
        help="batch norm in the projection head; the released RN50-w5 has none")  # fmt: skip


def backbone_options(args: argparse.Namespace) -> dict:
    """The arguments of a network that come from the flags of add_backbone_args."""
    names = ("in_chans", "stem", "width", "zero_init_residual")
    return {name: getattr(args, name) for name in names}


def vit_options(args: argparse.Namespace, img_size: int = 224) -> dict:
    """The arguments of src.nets.backbones.build_backbone that come from the flags of add_vit_args.

    img_size: where --img_size does not say it.
    """
    options = {name: getattr(args, name) for name in ("patch_size", "num_registers", "depth")}
    return {**options, "img_size": args.img_size or img_size}


def model_options(args: argparse.Namespace) -> dict:
    """The arguments of src.nets.resnet.build_model that come from the flags of add_model_args.

    Where --sobel says true or false also sobel and sobel_padding, of src.nets.convnets.build_convnet.
    """
    head = {"output_dim": args.feat_dim, "hidden_mlp": args.hidden_mlp}
    names = [name for name in ("sobel", "sobel_padding") if getattr(args, name, None) is not None]
    if names == ["sobel_padding"]:
        raise ValueError(f"--sobel_padding {args.sobel_padding} needs --sobel true")
    return {
        **backbone_options(args),
        **head,
        "head_dims": args.head_dims,
        "head_bn": args.head_bn,
        **{name: getattr(args, name) for name in names},
    }


def lr_factor(args: argparse.Namespace, global_batch: int) -> float:
    """What --lr_scaling multiplies learning rates by, for the global batch in use."""
    ratio = global_batch / args.lr_reference_batch
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[args.lr_scaling]
