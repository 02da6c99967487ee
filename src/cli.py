"""Command line shared by all scripts: parser, flags of the run time, presets, errors in one sentence."""

import argparse
import logging
import math
import sys
from collections.abc import Callable

from src import distributed, image_args
from src.cli_types import at_least_zero, boolean, positive
from src.presets import SHARED, preset_of
from src.syncbn import sharing_processes

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
        no_default = action.default is None or switch
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
    add(
        "--dump_path",
        "--output_dir",
        default=".",
        help="folder of the run: checkpoints, logs, plots",
    )
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
    for flags in (["--dist_url"], ["--world_size"], ["--rank"], ["--local_rank", "--local-rank"]):
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
    add("--checkpoint_freq", type=positive(int), default=25,
        help="epochs between the checkpoints that are kept in checkpoints/")  # fmt: skip
    add("--checkpoint_iters", type=at_least_zero(int), default=0,
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

    parser: with --data_path, --preset and the crop flags; its own defaults are the preset imagenet.
    presets: changed defaults of the method, by preset; those that all methods share are in
    src.presets.
    """
    known, _ = parser.parse_known_args(argv)
    preset = preset_of(known.data_path) if known.preset == "auto" else known.preset
    parser.set_defaults(**{**SHARED[preset], **presets[preset]})
    args = parser.parse_args(argv)
    args.preset = preset
    if args.use_fp16 is not None and args.precision == "auto":
        args.precision = "auto" if args.use_fp16 else "fp32"
    image_args.fill_in_crops(args)
    return args


def check_runtime(args: argparse.Namespace, world_size: int) -> None:
    """ValueError for a device that is not there, or groups that do not divide the processes."""
    distributed.resolve_device(args.device)
    if args.sync_bn != "none":
        sharing_processes(args.syncbn_process_group_size, world_size)


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that one sentence explains."""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main; what the user can mend is one sentence on stderr, and no traceback.

    Exit status 2 for input that is wrong, a file or folder included, 1 for a run that cannot go on.
    The traceback goes to train.log, if the run has got as far as opening it.
    """
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


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """The network and its projection head."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--arch", default="resnet50",
        help="resnet18 34 50 101 152, resnet50w2 w4 w5, resnext50_32x4d, resnext101_32x8d, or any "
        "torchvision classification model")  # fmt: skip
    add("--stem", default="imagenet", choices=["imagenet", "small"],
        help="imagenet: 7x7 stride 2 and max-pooling; small, for 32 px: 3x3 stride 1")  # fmt: skip
    add("--width", type=positive(float), default=1.0, help="multiplies the width of every layer")
    add("--hidden_mlp", type=at_least_zero(int), default=2048,
        help="hidden units of the projection head; 0: a linear head")  # fmt: skip
    add("--feat_dim", type=positive(int), default=128, help="D, dimension of the embedding z")
    add("--head_dims", type=positive(int), nargs="+", default=None,
        help="sizes of a free projection MLP, such as 2048 2048 128; instead of the two above")  # fmt: skip
    add("--head_bn", action=argparse.BooleanOptionalAction, default=True,
        help="batch norm in the projection head; the released RN50-w5 has none")  # fmt: skip
    add("--zero_init_residual", action="store_true", help="start every residual branch at zero")


def model_options(args: argparse.Namespace) -> dict:
    """The arguments of src.resnet.build_model that come from the flags of add_model_args."""
    return {
        "in_chans": args.in_chans,
        "stem": args.stem,
        "width": args.width,
        "output_dim": args.feat_dim,
        "hidden_mlp": args.hidden_mlp,
        "head_dims": args.head_dims,
        "head_bn": args.head_bn,
        "zero_init_residual": args.zero_init_residual,
    }


def scaled_lr(args: argparse.Namespace, global_batch: int) -> tuple[float, float, float]:
    """(base_lr, final_lr, start_warmup) after --lr_scaling for the global batch in use."""
    ratio = global_batch / args.lr_reference_batch
    factor = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[args.lr_scaling]
    return args.base_lr * factor, args.final_lr * factor, args.start_warmup * factor
