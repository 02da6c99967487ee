"""One way to a trained network: from a run, a checkpoint, a file, or weights of torchvision or timm.

    network = open_pretrained("runs/mine")
    features = network.model(images)  # normalised (B, C, S, S) -> (B, D)

What is known of a network comes from four places; the first that says a thing decides: the caller,
the arguments of its run, the tensors of the file, and the defaults of the architecture.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from .backbones import build_backbone, is_transformer
from .library_weights import TORCHVISION, TRANSFORMED, described_by_torchvision
from .recognise import recognise
from .resnet import TIMM, build_model
from .weight_folders import heads_of_config
from .weights import LIBRARIES, fit_weights, read_file, tensors_of

# Flags of the scripts that make a network, and those that say what its images are like.
VIT_FLAGS = ("patch_size", "img_size", "num_registers", "depth", "num_heads", "layer_scale")
HEAD_FLAGS = ("hidden_mlp", "feat_dim", "head_dims", "head_bn")
SOBEL_FLAGS = ("sobel", "sobel_padding")
MODEL_FLAGS = ("arch", "stem", "width", *HEAD_FLAGS, *VIT_FLAGS, *SOBEL_FLAGS)
NETWORK_FLAGS = (*MODEL_FLAGS, "zero_init_residual", "in_chans", "image_padding", "stem_padding")
NETWORK_FLAGS += ("transform_input",)  # which no flag says, but the weights of torchvision
IMAGE_FLAGS = ("data_path", "data_root", "label_column", "mean", "std", "seed")
HEADS = ("projection_head", "prototypes")  # modules that come after the features of a network
IMAGE_SIZE = 224  # pixels, where nothing says it
SWAV_HEAD = {"hidden_mlp": 2048, "feat_dim": 128}  # as published, where nothing says it

# The standard deviation of red on ImageNet: SwAV's family divided by 0.228, everybody else by 0.229.
SWAV_RED, IMAGENET_RED = 0.228, 0.229


@dataclass
class Pretrained:
    """A network to be used, not trained, and what is known about it.

    model           in evaluation mode, normalised images (B, C, S, S) -> (B, D): the pooled features
                    of the trunk, or with the feature "embedding" the output of the projection head;
                    model.forward_backbone gives the former in either case
    head            what came after that while it was trained, if anything: projection_head, prototypes
    image_size      side in pixels of its largest crops, 224 where nothing says it
    mean, std       of each channel, to normalise images with; None where neither the caller nor its run,
                    nor the library of its weights says: those of the data then, see normalisation
    imagenet_red    what it divided the red of ImageNet by: 0.228 or 0.229
    run_args        the arguments of its run, {} if it is of no run of this repository
    options         what it is built with, by flag, without arch
    seed            of its run, which makes it untrained
    path            the file of its weights or the folder of its run, "" if it is untrained
    epoch           how many epochs it was trained for, where its run's checkpoint says it
    """

    model: nn.Module
    arch: str
    image_size: int
    mean: list[float] | None
    std: list[float] | None
    imagenet_red: float
    run_args: dict
    options: dict
    feature: str = "backbone"
    seed: int = 0
    head: nn.ModuleDict | None = None
    path: str = ""
    epoch: int | None = None

    @property
    def origin(self) -> str:
        """Whose weights these are, for people: 'resnet18 of runs/mine after 100 epochs'."""
        if not self.path:
            return f"an untrained {self.arch}"
        after = f" after {self.epoch} epoch{'s' * (self.epoch != 1)}" if self.epoch else ""
        return f"{self.arch} of {self.path}{after}"

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.options.get("in_chans", 3)

    def normalisation(
        self, dataset: Dataset, imagenet_red: float | None = None
    ) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel to normalise the images of a dataset with.

        dataset: of src.data.datasets.open_dataset, or whatever has its mean and std. imagenet_red:
        instead of that of the network, where images are normalised as ImageNet's.
        """
        red = self.imagenet_red if imagenet_red is None else imagenet_red
        std = [red if value == SWAV_RED else value for value in dataset.std]
        return self.mean or dataset.mean, self.std or std

    def untrained(self) -> "Pretrained":
        """The same network before its training, as the seed makes it."""
        model = _build(self.arch, self.options, self.run_args, self.seed)
        head = _take_off(model, self.feature)
        return replace(self, model=model, head=head, path="", epoch=None)


def open_pretrained(
    path: str | Path,
    arch: str | None = None,
    *,
    checkpoint_key: str | None = None,
    feature: str = "backbone",
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
    **options,
) -> Pretrained:
    """The network of a run's folder, a checkpoint, a released file, a folder of the Hugging Face hub, or
    torchvision's weights.

    path: also an http(s) address; "torchvision:resnet50" or "timm:resnet50" for the weights that these
    packages have of a network; "" for an untrained network. arch: where neither the run nor the file says
    it, resnet50 unless given. checkpoint_key: section of the file, such as "student"; the teacher unless
    given. feature: "backbone", or "embedding", the output of SwAV's projection head. image_size in pixels,
    mean, std, seed: instead of those of the run. options: flags of the network by name (NETWORK_FLAGS, None
    for what is not said), and other arguments of src.nets.backbones.build_backbone.

    Raises FileNotFoundError, ValueError and CheckpointError (an OSError), with a sentence that names
    the flag of the evaluations, --pretrained for path, that is to be changed.
    """
    if feature not in ("backbone", "embedding"):
        raise ValueError(f"--feature {feature} must be backbone or embedding")
    contents, weights, run_args, said = {}, {}, {}, {}
    arch = arch or _arch_of_library(path)
    if path:
        contents = read_file(path)
        weights = tensors_of(contents, path, checkpoint_key)
        run_args = read_run_args(path) or _args_of(contents)
        said = _said(path, weights, arch, run_args)
    said |= {name: value for name, value in options.items() if value is not None}
    said = for_channels(said, said.get("in_chans", 3))
    arch = arch or said.get("arch") or "resnet50"
    if image_size is None:
        image_size = said.get("size") or IMAGE_SIZE
    built_with = {
        name: said[name]
        for name in said
        if name not in ("arch", "size", *IMAGE_FLAGS) and said[name] is not None
    }
    built_with.setdefault("img_size", image_size)
    if "sobel_padding" in built_with and "sobel" not in built_with:
        raise ValueError(f"--sobel_padding {built_with['sobel_padding']} needs --sobel true")
    if feature == "embedding":
        if not _has_swav_head(arch, built_with, run_args):
            raise ValueError(
                "--feature embedding is the output of SwAV's projection head, which vision transformers, "
                "runs of DINO and classifiers of clusters do not have: use --feature backbone"
            )
        built_with = {**SWAV_HEAD, **built_with}
    if seed is None:
        seed = said.get("seed") or 0
    model = _build(arch, built_with, run_args, seed)
    if path:
        if "sobel" in built_with:
            _fold_as_in_file(model, weights)
        of_swav = _has_swav_head(arch, built_with, run_args)
        _fill(model, weights, arch, path, of_swav=of_swav, feature=feature)
    as_dino = is_transformer(arch) or is_dino(run_args) or checkpoint_key in ("teacher", "student")
    of_library = str(path).startswith(LIBRARIES) or (arch.startswith(TIMM) and not run_args)
    usual_red = as_dino or "sobel" in built_with or of_library
    return Pretrained(
        model=model,
        arch=arch,
        image_size=image_size,
        mean=list(mean or said.get("mean") or []) or None,
        std=list(std or said.get("std") or []) or None,
        imagenet_red=IMAGENET_RED if usual_red else SWAV_RED,
        run_args=run_args,
        options=built_with,
        feature=feature,
        seed=seed,
        head=_take_off(model, feature),
        path=str(path),
        epoch=contents.get("epoch") if "method" in contents else None,
    )


# ============ what a run and a file say ============
def run_folder(path: str | Path) -> Path:
    """The folder of the run that a folder or a checkpoint belongs to."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "checkpoints" else folder


def read_run_args(path: str | Path) -> dict:
    """The args.json of the run that a folder or a checkpoint belongs to; {} where there is none."""
    file = run_folder(path) / "args.json"
    if not path or not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, OSError) as error:
        raise ValueError(f"--pretrained {path}: {file} cannot be read ({error})") from None


def describe(
    path: str | Path, arch: str | None = None, checkpoint_key: str | None = None
) -> tuple[dict, dict]:
    """(arguments of the run, what the run or else the file says of network and images, by flag).

    The tensors are read only where there is no args.json. Raises as open_pretrained.
    """
    of_library = _arch_of_library(path)
    if of_library and arch in (None, of_library):  # without a download
        return {}, {"arch": of_library, **_said_by_library(path, of_library)}
    run_args = read_run_args(path)
    if run_args:
        return run_args, settings_of_run(run_args)
    contents = read_file(path)
    run_args = _args_of(contents)
    weights = tensors_of(contents, path, checkpoint_key)
    return run_args, _said(path, weights, arch, run_args)


def settings_of_run(run_args: dict) -> dict:
    """What the arguments of a run say of its network and images, by flag; `size` is its largest crop."""
    names = (*NETWORK_FLAGS, *IMAGE_FLAGS)
    settings = {name: run_args[name] for name in names if name in run_args}
    if run_args.get("size_crops"):
        settings["size"] = max(run_args["size_crops"])
    if is_dino(run_args):
        settings["size"] = run_args["global_crops_size"]  # and so is its table of positions
        settings["img_size"] = run_args.get("img_size") or run_args["global_crops_size"]
    return settings


def for_channels(said: dict, in_chans: int) -> dict:
    """What is said by flag, without mean and std of images with another number of channels.

    Libraries have weights for images of three channels; somebody's file for one of their networks may be
    for others.
    """
    others = [name for name in ("mean", "std") if len(said.get(name) or ()) not in (0, in_chans)]
    return {name: said[name] for name in said if name not in others}


def is_dino(run_args: dict) -> bool:
    """Whether these are the arguments of a run of main_dino.py."""
    return "global_crops_size" in run_args


def _args_of(contents):
    """The arguments that a checkpoint of this repository holds, {} for another file."""
    args = contents.get("args") if "method" in contents else None
    return args if isinstance(args, dict) else {}


def _arch_of_library(path):
    """The --arch of "torchvision:resnet50", resnet50, or of "timm:resnet50", itself; None for others."""
    name = str(path)
    if name.startswith(TIMM):
        return name
    return name.removeprefix(TORCHVISION) if name.startswith(TORCHVISION) else None


def _said(path, weights, arch, run_args):
    """What the tensors of a file, what is beside them and their run say, by flag; the last one decides."""
    said = recognise(weights, arch)
    if "patch_size" in said and (heads := heads_of_config(path)) is not None:
        said["num_heads"] = heads
    if run_args:
        return {**said, **settings_of_run(run_args)}
    return {**said, **_said_by_library(path, arch)}


def _said_by_library(path, arch):
    """What a library says of the images that its weights are for: mean, std, of timm size; {} for others.

    arch: of _said; a file for one of timm's networks is taken for timm's. Whether a network of torchvision
    transforms its images is said of that network alone.
    """
    name = str(path)
    if name.startswith(TORCHVISION):
        said = described_by_torchvision(name.removeprefix(TORCHVISION))
        if arch not in (None, _arch_of_library(path)):
            said.pop("transform_input", None)
        return said
    if not name.startswith(TIMM) and not (arch or "").startswith(TIMM):
        return {}
    from .timm_trunks import described_by_timm, images_of_timm  # here, as timm is optional

    if name.startswith(TIMM):
        return described_by_timm(name.removeprefix(TIMM))
    return images_of_timm(arch.removeprefix(TIMM))


# ============ building and filling ============
def _has_swav_head(arch, options, run_args):
    return not (is_transformer(arch) or is_dino(run_args) or "sobel" in options)


def _build(arch, options, run_args, seed):
    """The untrained network as `seed` makes it, in evaluation mode; the caller's random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if _has_swav_head(arch, options, run_args):
            model = _build_with_head(arch, options, run_args)
        else:
            # What Sobel filters leave is not transformed as images of torchvision are.
            unused = (*HEAD_FLAGS, "transform_input")
            options = {name: value for name, value in options.items() if name not in unused}
            model = build_backbone(arch, **options)
    return model.to(memory_format=torch.channels_last).eval()


def _build_with_head(arch, options, run_args):
    for name in ("num_registers", "depth", "num_heads", "layer_scale"):
        if options.get(name):
            raise ValueError(f"--{name} is for vision transformers: leave it out for --arch {arch}")
    unused = {*VIT_FLAGS, "feat_dim"}  # published for every network
    if not arch.startswith(TIMM):
        unused.add("drop_path_rate")
    head = {"output_dim": options.get("feat_dim", 0)}
    options = {name: value for name, value in options.items() if name not in unused} | head
    transform_input = options.pop("transform_input", False)
    prototypes = run_args.get("nmb_prototypes", 0)
    if isinstance(prototypes, list) and len(prototypes) == 1:
        prototypes = prototypes[0]  # a single set, as the scripts build it
    model = build_model(arch, normalize=True, nmb_prototypes=prototypes, **options)
    if arch in TRANSFORMED:
        model.trunk.transform_input = transform_input
    return model


def _fill(model, weights, arch, source, *, of_swav, feature):
    """Give the network the tensors of a file; those of a head that is not asked for may be missing."""
    module, later = model, ()
    if of_swav:
        later = ("prototypes",)
    if of_swav and feature == "backbone":
        # torchvision's files have no name for our trunk.
        module, later = getattr(model, "trunk", model), ("prototypes", "projection_head")
    if arch.startswith("xcit"):
        from timm.models.xcit import checkpoint_filter_fn as with_names_of_timm

        weights = {name.removeprefix("backbone."): x for name, x in weights.items()}
        weights = {name: x for name, x in weights.items() if not name.startswith("head.")}
        weights = with_names_of_timm(weights, model)
    fit_weights(module, weights, source, allow_missing=later)


def _fold_as_in_file(model, weights):
    """Make Sobel filters and first layer one, where eval_finetune.py --sobel2RGB true has left them so."""
    from .folded_sobel import (
        fold_sobel,
        has_folded_sobel,
    )  # here, as few networks have such filters

    if has_folded_sobel(weights, model):
        fold_sobel(model)
        model.to(memory_format=torch.channels_last)


def _take_off(model, feature):
    """Take what comes after `feature` off the network, and return it."""
    head = nn.ModuleDict()
    for name in HEADS:
        part = getattr(model, name, None)
        if part is None:
            continue
        if name == "prototypes" or feature == "backbone":
            head[name] = part
            setattr(model, name, None)
    if feature == "backbone" and hasattr(model, "normalize"):
        model.normalize = False  # an embedding has length 1, the features of the trunk have not
    return head
