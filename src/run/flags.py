"""Command line shared by all scripts: types, presets, parser, flags of the run time, errors."""

import argparse
import difflib
import importlib.util
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .. import dist
from ..data.loading import TIMEOUT as LOADER_TIMEOUT
from ..errors import RunError, explain, explain_size, printable
from ..nets import resnet
from . import signals
from .presets import (
    CROPS,
    MADE_FOR_IMAGES,
    PRESET_OF,
    Situation,
    default_folder,
    defaults_of,
    first_spans,
    network_of_weights,
    preset_for,
    preset_of,
    stored_choice,
    typical,
)

logger = logging.getLogger(__name__)

LONGEST_LIMIT = 1e7  # seconds, sixteen weeks; a larger one is more than the system's clocks take


# ============ types of values ============
def boolean(text: str) -> bool:
    """The published true / false values of a flag."""
    values = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return values[text.lower()]


def integer(text: str) -> int:
    """An argparse type: a whole number, also as published commands write them: 1e8, 300.0."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


def positive(kind: Callable) -> Callable:
    """An argparse type: int or float above zero."""
    read = integer if kind is int else kind

    def parse(text):
        value = read(text)
        if not value > 0 or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def at_least_zero(kind: Callable) -> Callable:
    """An argparse type: int or float, zero or more."""
    read = integer if kind is int else kind

    def parse(text):
        value = read(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
        return value

    parse.__name__ = f"{kind.__name__} of 0 or more"
    return parse


def seconds(text: str) -> float:
    """An argparse type: a time limit of some seconds, 0 for none."""
    value = float(text)
    if not 0 <= value <= LONGEST_LIMIT:
        raise argparse.ArgumentTypeError(f"must be from 0 to {LONGEST_LIMIT:g} seconds, not {text}")
    return value


def probability(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a probability from 0 to 1, not {text}")
    return value


def named_path(text: str) -> tuple[str, str]:
    """An argparse type: NAME=PATH."""
    name, equals, path = text.partition("=")
    if not (equals and path and re.fullmatch(r"[\w-]+", name)):
        raise argparse.ArgumentTypeError(
            f"must be NAME=PATH, such as pets=/data/pets, not {text!r}"
        )
    return name, path


# What presets set and networks that are not built here have no use for; and the sides of crops of DINO.
# Such networks were made for images of 224 px: the last of their stages has one cell for 32 px.
OF_OUR_NETWORKS = ("stem", "width")
OF_CROPS = ("global_crops_size", "local_crops_size")
SMALLEST_CROP = 32  # pixels


# ============ parser ============
class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose --help shows defaults and whose errors are one sentence, status 2."""

    def __init__(self, doc: str):
        super().__init__(
            usage="%(prog)s [flags]",
            description=doc,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As of argparse; a ~ is the home directory where no shell has replaced it, as in --flag=~/file."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_home(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        """Leave with status 2 and one sentence, which names the flags that are like a mistyped one."""
        unknown = re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL)
        if unknown:
            words = [word.split("=")[0] for word in unknown[1].split() if word.startswith("--")]
            known = [name for name in self._option_string_actions if name.startswith("--")]
            near = [difflib.get_close_matches(word, known, n=1, cutoff=0.7) for word in words]
            meant = ", ".join(name for names in near for name in names)
            message += f": did you mean {meant}?" if meant else ""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _with_home(word):
    before, home, path = re.fullmatch(r"([\w-]*=)?(~?)(.*)", word, re.DOTALL).groups(default="")
    return before + os.path.expanduser(home + path) if home else word


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


def add_runtime_args(parser: argparse.ArgumentParser, one_process: bool = False) -> None:
    """Flags of how a run is run, not of what it computes; the same in every script.

    one_process: of a script that is not for several.
    """
    group = parser.add_argument_group("runtime")
    add = group.add_argument
    add("--dump_path", "--output_dir", "--exp", default=".",
        help="folder of the run: checkpoints, logs, plots")  # fmt: skip
    add("--seed", type=at_least_zero(int), default=31, help="seed of every random draw")
    add("--workers", "--num_workers", type=at_least_zero(int), default=10,
        help="loader processes per training process; 0: load in the process itself")  # fmt: skip
    add("--loader_timeout", type=seconds, default=LOADER_TIMEOUT,
        help="seconds that a batch of the loader processes may take before the run stops; 0: no "
        "limit")  # fmt: skip
    if not one_process:
        add("--dist_timeout", type=seconds, default=dist.TIMEOUT,
            help="seconds that a process waits for the others, at the start and in each exchange; 0: "
            "no limit")  # fmt: skip
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


def add_training_args(parser: argparse.ArgumentParser) -> Callable:
    """Flags of starting, logging and saving, for training; returns the last group's add_argument."""
    add = parser.add_argument_group("learning-rate scaling, weights, batch norm").add_argument
    add("--lr_scaling", default="none", choices=["none", "linear", "sqrt"],
        help="scale all learning rates by the global batch / --lr_reference_batch")  # fmt: skip
    add("--lr_reference_batch", type=positive(int), default=4096, help="images, see --lr_scaling")
    add("--init_from", default=None, help="weights to start from: a run, a file that the "
        "evaluations read, torchvision:NAME or timm:NAME")  # fmt: skip
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
    add("--probe_data", type=named_path, nargs="+", default=[], metavar="NAME=PATH",
        help="labelled sets that are evaluated with --knn_freq too, by k-NN and a linear probe")  # fmt: skip
    add("--guard_knn", type=at_least_zero(float), default=None,
        help="stop, and go back to the best state, when k-NN on the first of --probe_data, or else on the "
        "data itself, falls by more than so many points below its best")  # fmt: skip
    add("--max_nonfinite", type=at_least_zero(int), default=0,
        help="steps of the run that are skipped because the loss or its gradient is not finite, before "
        "the run stops")  # fmt: skip
    add("--abort_on_collapse", action="store_true", help="stop when a collapse is diagnosed")
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=True,
        help="write TensorBoard events, where the package tensorboard is installed")  # fmt: skip
    return add


def parse_args(
    parser: argparse.ArgumentParser,
    presets: dict[str, dict | Callable],
    argv: list[str] | None,
    method: str = "run",
    look: Callable[[argparse.Namespace], Situation] | None = None,
) -> argparse.Namespace:
    """Parse `argv`; the defaults are those of the preset, a flag on the command line wins.

    parser: with --data_path and --preset; its own defaults are the preset imagenet. presets: changed
    defaults of the method, by preset (src.run.presets.defaults_of). method: for the name of the default
    folder. look: opens the images, as these arguments say, and tells the situation; without it --preset
    auto goes by names alone. A default warm-up that is longer than --epochs becomes half of them, and
    what the preset sets and --arch has no use for is left out; check_batch says so.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    words_without_help = [word for word in words if word not in ("-h", "--help")]
    asked_for_help = len(words_without_help) < len(words)
    if asked_for_help:
        first, look = parser.parse_known_args(words_without_help)[0], None
        if first.preset == "auto" and "data_path" not in explicit_flags(parser, words_without_help):
            first.preset = "imagenet"  # whoever asks for help alone wants to see what is published
    else:
        first = parser.parse_args(words)
    if look is not None or asked_for_help:
        parser.set_defaults(dump_path=default_folder(method, first.data_path))
        first.dump_path = parser.parse_known_args(words_without_help)[0].dump_path
    stored_preset, chosen = stored_choice(first.dump_path)
    preset, situation = first.preset, None
    if preset == "auto":
        preset = preset_of(first.data_path)
        if look is not None and first.data_path not in PRESET_OF:
            situation = look(first)
            preset = stored_preset if stored_preset in presets else preset_for(situation)
    if preset in MADE_FOR_IMAGES and situation is None:
        situation = typical(first.device) if look is None else look(first)
    published = {name: parser.get_default(name) for name in vars(first)}
    goes_on = preset != "imagenet" and bool(getattr(first, "init_from", None))
    network = network_of_weights(first.init_from) if goes_on else None
    if situation is not None:
        is_arch_said = "arch" in explicit_flags(parser, words_without_help)
        situation = situation.with_network(network, is_arch_said)
    defaults = defaults_of(preset, presets, situation, published=published, network=network)
    if preset in MADE_FOR_IMAGES:
        chosen = chosen if stored_preset == preset and chosen else defaults
        defaults = dict(chosen)  # without what a newer version would choose
    sides = defaults.pop("crop_sides", None)
    parser.set_defaults(**defaults)
    if preset == "continue":  # of the epochs and the batch that are asked for
        asked = parser.parse_known_args(words_without_help)[0]
        iterations = situation.num_images // (asked.batch_size * situation.world_size)
        parser.set_defaults(**first_spans(published, asked.epochs, iterations))
    notes = fit_preset_to_arch(
        parser, words_without_help, preset, sides or CROPS[preset]["size"], published
    )
    args = parser.parse_args(words)
    if "warmup_epochs" in args and args.warmup_epochs > args.epochs:
        parser.set_defaults(warmup_epochs=args.epochs // 2)
        args, usual_epochs = parser.parse_args(words), args.warmup_epochs
        if args.warmup_epochs != usual_epochs:  # else it was asked for: check_batch refuses it
            notes.append(
                f"the usual {usual_epochs} epochs of warm-up are {args.warmup_epochs} in a run of "
                f"--epochs {args.epochs}; --warmup_epochs says otherwise"
            )
    args.notes = notes
    args.preset = preset
    if situation is not None:
        args.chosen_for = str(situation)
    if preset in MADE_FOR_IMAGES:
        args.chosen, args.crop_sides = chosen, sides
        if situation.hint() and not getattr(args, "reduced_decoding", False):
            notes.append(situation.hint())
    if args.use_fp16 is not None and args.precision == "auto":
        args.precision = "auto" if args.use_fp16 else "fp32"
    return args


def explicit_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict:
    """What the command line says, by flag, without any default."""
    unsaid = object()  # argparse puts defaults only where there is nothing yet
    blank = argparse.Namespace(**{action.dest: unsaid for action in parser._actions})
    parsed = vars(parser.parse_args(argv, blank))
    return {name: value for name, value in parsed.items() if value is not unsaid}


def is_built_here(parser: argparse.ArgumentParser, arch: str) -> bool:
    """Whether --arch of a script is a network of src.nets, and not of torchvision or timm."""
    names = [*resnet.ARCHITECTURES]
    if "--sobel" in parser._option_string_actions:
        names += ["alexnet", "vgg16"]
    is_vit = resnet.TRANSFORMERS.fullmatch(arch) and not arch.startswith("xcit")
    return arch in names or bool(is_vit)


def fit_preset_to_arch(
    parser: argparse.ArgumentParser, argv: list[str], preset: str, sides: list[int], published: dict
) -> list[str]:
    """Take from the defaults of a preset what a network of --arch that is not built here has no use for.

    sides: of the preset's crops. published: the values before the preset, by flag. Crops become as large
    as such networks need. Returns
    a sentence on what has changed, for the log, or none.
    """
    args = parser.parse_args(argv)
    if "arch" not in args or is_built_here(parser, args.arch):
        return []
    changed = {name: published[name] for name in OF_OUR_NETWORKS if name in published}
    for name in OF_CROPS:
        if name in args:
            changed[name] = max(getattr(args, name), SMALLEST_CROP)
    if "size_crops" in args and args.size_crops is None and min(sides) < SMALLEST_CROP:
        changed["size_crops"] = [max(side, SMALLEST_CROP) for side in sides][: len(args.nmb_crops)]
    explicit = explicit_flags(parser, argv)
    changed = {
        name: value
        for name, value in changed.items()
        if name not in explicit and value != getattr(args, name)
    }
    parser.set_defaults(**changed)
    if not changed:
        return []
    values = ", ".join(
        f"--{name} {' '.join(map(str, value if isinstance(value, list) else [value]))}"
        for name, value in changed.items()
    )
    return [
        f"--preset {preset} is for networks that are built here, and --arch {args.arch} is not: {values} "
        "instead of its values"
    ]


def check_runtime(args: argparse.Namespace, world_size: int) -> None:
    """ValueError for a device that is not there, k-NN that was not copied, or groups that do not divide
    the processes."""
    dist.resolve_device(args.device)
    if len({name for name, _ in args.probe_data}) < len(args.probe_data):
        raise ValueError("--probe_data names two sets alike: give each a name of its own")
    if (args.probe_data or args.guard_knn is not None) and not args.knn_freq:
        flag = "--probe_data" if args.probe_data else "--guard_knn"
        raise ValueError(
            f"{flag} needs --knn_freq: give the epochs between two evaluations, such as 1"
        )
    if args.knn_freq and importlib.util.find_spec("..evaluate", __package__) is None:
        raise ValueError(
            f"--knn_freq {args.knn_freq} needs src/evaluate, which this copy lacks: copy it with "
            "--with knn, or give --knn_freq 0"
        )
    if args.sync_bn != "none":
        dist.sharing_processes(args.syncbn_process_group_size, world_size)


def check_batch(args: argparse.Namespace, global_batch: int, num_images: int) -> None:
    """ValueError for more images in a batch than there are, or a warm-up longer than the run.

    Logs what parse_args has changed, which is before there is a log, and takes its notes out of args.
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
    for note in vars(args).pop("notes", []):
        logger.info(f"note: {note}")


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and end the process; an error is one sentence on stderr where one will do.

    Exit status 2 for input that is wrong, a file or folder included, 1 for a run that cannot go on, 130
    after Ctrl-C. Every traceback goes to train.log, if the run has got as far as opening it; that of an
    error that nobody foresaw to the screen too. Where the process hangs on its way out, it is ended.
    """
    dist.settle_vector_functions()
    is_script = main.__module__ == "__main__"  # else the process has more to do
    try:
        status = main() or 0
    except (Exception, KeyboardInterrupt) as error:
        if is_script:  # first: torch would raise its error of a dead process once more, in here
            signals.end_workers()
        status, sentence = _judge(error)
        if is_script:  # while the error still holds the loaders, which wait for their processes
            signals.leave_within(signals.LEAVE_SECONDS, status)
        logger.debug("stopped by an error", exc_info=True)
        if sentence is None:
            raise
        sys.stderr.write(f"{printable(' '.join(sentence.split()))}\n")
    if is_script:
        signals.leave_within(signals.LEAVE_SECONDS, status)
        signals.end_workers()
    sys.exit(status)


def _judge(error):
    """Exit status and sentence of an error; None for one that needs its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped by SIGINT"
    if (meaning := explain_size(error)) is not None:
        return 2, f"error: {meaning}"
    meaning = None if isinstance(error, RunError) else explain(error)
    if meaning is not None:
        return 1, f"error: {meaning}"
    if not isinstance(error, ValueError | OSError | RunError):
        return 1, None
    sentence = str(error).strip()
    if sentence.startswith("Caught "):  # in a loader's worker, with its traceback before it
        sentence = sentence.splitlines()[-1].partition(": ")[2]
    return 1 if isinstance(error, RunError) else 2, f"error: {sentence}"


def add_backbone_args(
    parser: argparse.ArgumentParser, arch: str = "resnet50", others: str = ""
) -> Callable:
    """The network without its head; returns the group's add_argument for what a method adds.

    arch: the default. others: names for the help, which names vision transformers after add_vit_args.
    """
    add = parser.add_argument_group("model").add_argument
    transformers = "--patch_size" in parser._option_string_actions
    others += "vit_tiny vit_small vit_base vit_large, xcit_* (by timm), " if transformers else ""
    add("--arch", "-a", default=arch,
        help=f"{others}resnet18 34 50 101 152, resnet50w2 w4 w5, resnext50_32x4d, resnext101_32x8d, "
        "any torchvision classification model, or timm:NAME, of the package timm")  # fmt: skip
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
        help="side in pixels that the table of positions is for (default: the images', or 224)")  # fmt: skip
    add("--num_registers", type=at_least_zero(int), default=0,
        help="register tokens, arXiv:2309.16588")  # fmt: skip
    add("--depth", type=positive(int), default=None, help="number of blocks (default: of the arch)")
    add("--num_heads", type=positive(int), default=None,
        help="heads of the attention (default: of the arch); MoCo v3's vit_small has 12")  # fmt: skip
    add("--layer_scale", type=positive(float), default=None,
        help="LayerScale, arXiv:2103.17239: where its factors start, 1e-5 (default: none)")  # fmt: skip
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
    names = ("patch_size", "num_registers", "depth", "num_heads", "layer_scale")
    options = {name: getattr(args, name) for name in names}
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


def loader_options(args: argparse.Namespace, device_type: str) -> dict:
    """The arguments of src.data.multicrop.multicrop_loader that come from the flags."""
    return {
        "batch_size": args.batch_size,
        "num_workers": args.workers,
        "device_type": device_type,
        "timeout": args.loader_timeout,
    }


def placement_options(args: argparse.Namespace) -> dict:
    """The arguments of src.run.run.place_network that come from the flags of add_training_args."""
    return {
        "sync_bn": args.sync_bn,
        "syncbn_process_group_size": args.syncbn_process_group_size,
        "compiled": args.compile,
    }


def lr_factor(args: argparse.Namespace, global_batch: int) -> float:
    """What --lr_scaling multiplies learning rates by, for the global batch in use."""
    ratio = global_batch / args.lr_reference_batch
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[args.lr_scaling]
