"""What evaluations of frozen features share: the run that is evaluated, its network, labelled splits."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import dist
from ..cluster.neighbours import nearest_neighbours
from ..data.datasets import ImageDataset, open_dataset, usual_std
from ..labels.features import centre_crop
from ..nets.backbones import build_backbone, is_vit
from ..nets.resnet import build_model
from ..pictures.curves import neighbour_sheet
from ..run import checkpoint

logger = logging.getLogger(__name__)

HELD_OUT = 10  # without a val split, every tenth image is classified by the others

# Flags that make a network; and those that the args.json of a run decides for its evaluation.
VIT_FLAGS = ("patch_size", "img_size", "num_registers", "depth")
HEAD_FLAGS = ("hidden_mlp", "feat_dim", "head_dims", "head_bn")
SOBEL_FLAGS = ("sobel", "sobel_padding")
MODEL_FLAGS = ("arch", "stem", "width", *HEAD_FLAGS, *VIT_FLAGS, *SOBEL_FLAGS)
RUN_FLAGS = (*MODEL_FLAGS, "zero_init_residual", "data_path", "in_chans", "mean", "std", "seed")


def run_folder(pretrained: str | Path) -> Path:
    """The folder of the run that a folder or a checkpoint belongs to."""
    path = Path(pretrained)
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "checkpoints" else folder


def run_arguments(pretrained: str | Path) -> dict:
    """The args.json of the run that a folder or a checkpoint belongs to; {} where there is none."""
    file = run_folder(pretrained) / "args.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, OSError) as error:
        raise ValueError(f"--pretrained {pretrained}: {file} cannot be read ({error})") from None


def run_defaults(run: dict) -> dict:
    """What the arguments of a run say about its evaluation, by flag; `size` is its largest crop."""
    defaults = {name: run[name] for name in RUN_FLAGS if name in run}
    if run.get("size_crops"):
        defaults["size"] = max(run["size_crops"])
    if is_dino(run):
        defaults["size"] = run["global_crops_size"]  # and so is its position table
        defaults["img_size"] = run.get("img_size") or run["global_crops_size"]
    return defaults


def is_dino(run: dict) -> bool:
    """Whether these are the arguments of a run of main_dino.py."""
    return "global_crops_size" in run


def is_transformer(arch: str) -> bool:
    """Whether `arch` is a vision transformer of ours or an XCiT."""
    return is_vit(arch) or arch.startswith("xcit")


def build_network(
    arch: str,
    options: dict,
    weights: str | None,
    run: dict,
    feature: str = "backbone",
    checkpoint_key: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """The network of `arch` with `weights`, or untrained as `seed` makes it, in evaluation mode.

    options: of src.run.flags.model_options and vit_options; with `sobel`, true or false, the network is of
    src.nets.convnets. run: the arguments of its training run, {} if there was none. feature: "backbone" or "embedding"; the weights of what comes after it may be
    missing. Raises ValueError and OSError.
    """
    head_of_swav = not (is_transformer(arch) or is_dino(run) or "sobel" in options)
    if not head_of_swav and feature == "embedding":
        raise ValueError(
            "--feature embedding is the output of SwAV's projection head, which vision transformers, "
            "runs of DINO and classifiers of clusters do not have: use --feature backbone"
        )
    torch.manual_seed(seed)
    if head_of_swav:
        model = _with_swav_head(arch, options, run)
    else:
        without = ("output_dim", "hidden_mlp", "head_dims", "head_bn")
        options = {name: x for name, x in options.items() if name not in without}
        model = build_backbone(arch, **options)
    if weights:
        module, later = model, ("prototypes",) if head_of_swav else ()
        if feature == "backbone" and head_of_swav:  # torchvision's files have no name for our trunk
            module, later = getattr(model, "trunk", model), ("prototypes", "projection_head")
        checkpoint.load_weights(module, weights, checkpoint_key, allow_missing=later)
    return model.to(memory_format=torch.channels_last).eval()


def _with_swav_head(arch, options, run):
    options = {**options}
    for name in ("num_registers", "depth"):
        if options[name]:
            raise ValueError(f"--{name} is for vision transformers: leave it out for --arch {arch}")
    for name in VIT_FLAGS:
        del options[name]
    if run:
        sets = run.get("nmb_prototypes", 0)
        if isinstance(sets, list) and len(sets) == 1:  # a single set, as the scripts build it
            sets = sets[0]
        options["nmb_prototypes"] = sets
    return build_model(arch, normalize=True, **options)


def statistics(args, dataset: ImageDataset, usual: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation to normalise with: those given, or those of the data.

    usual: with ImageNet's usual red, as DINO, and DeepCluster, whose networks --sobel tells; else with
    SwAV's (src.data.datasets).
    """
    usual = usual or getattr(args, "sobel", None) is not None
    std = usual_std(dataset.std) if usual else dataset.std
    return args.mean or dataset.mean, args.std or std


def forward_of(model: nn.Module, feature: str) -> Callable[[Tensor], Tensor]:
    """Images (B, C, S, S) -> (B, D): the pooled trunk ("backbone") or the head's ("embedding")."""
    if feature == "backbone":
        return model.forward_backbone

    def embedding(images):
        output = model(images)
        return output[0] if isinstance(output, tuple) else output  # without the scores

    return embedding


def open_labelled_splits(
    data_path: str, train_path: str | None = None, val_path: str | None = None, in_chans: int = 3
) -> tuple[ImageDataset, ImageDataset | None]:
    """Training and validation images with labels; (images, None) where nothing splits them.

    train_path, val_path: where they are not in data_path. The labels of validation images are
    numbered as the classes of the training images. Raises ValueError where labels are missing.
    """
    flags = ["--train_path" if train_path else "--data_path"]
    flags.append("--val_path" if val_path else "--data_path")
    train = open_dataset(train_path or data_path, "train", in_chans, flag=flags[0])
    val = open_dataset(val_path or data_path, "val", in_chans, flag=flags[1])
    check_labelled(train, flags[0])
    check_labelled(val, flags[1])
    if val.same_files(train):
        logger.info("%s is one split: image 0, %d, ... are held out", train.name, HELD_OUT)
        return train, None
    if train.classes and val.classes and train.classes != val.classes:
        numbers = {name: i for i, name in enumerate(train.classes)}
        order = [numbers.setdefault(name, len(numbers)) for name in val.classes]
        val.labels, val.classes = torch.tensor(order)[val.labels], list(numbers)
    return train, val


def check_labelled(dataset: ImageDataset, flag: str) -> None:
    """Raise ValueError, naming `flag`, for a dataset without labels."""
    if dataset.labels is None:
        raise ValueError(
            f"{flag} {dataset.name} has no labels, which this evaluation needs: give a folder "
            "with one folder for each class, or shards with .cls entries"
        )


def split_features(
    extract: Callable[[ImageDataset], tuple[Tensor, Tensor]],
    train: ImageDataset,
    val: ImageDataset | None,
) -> list[Tensor]:
    """[features (N, D), labels (N,)] of training, then of validation images, of this process.

    extract: dataset -> features and sample indices of this process, see src.labels.features. Without `val`
    every tenth image of `train` is held out.
    """
    features, indices = extract(train)
    labels = train.labels[indices]
    if val is None:
        held_out = indices % HELD_OUT == 0
        return [features[~held_out], labels[~held_out], features[held_out], labels[held_out]]
    val_features, indices = extract(val)
    return [features, labels, val_features, val.labels[indices]]


def draw_neighbours(
    split: list[Tensor],
    train: ImageDataset,
    val: ImageDataset | None,
    path: str | Path,
    num_queries: int = 12,
    k: int = 10,
) -> None:
    """Draw validation images of rank 0 and the k training images nearest to each, as PNG.

    split: what split_features made of `train` and `val`. All processes call this, one draws.
    """
    train_features, train_labels, features, labels = split
    train_rows, val_rows = range(len(train)), range(len(val or train))  # row -> sample
    if val is None:
        train_rows = [i for i in train_rows if i % HELD_OUT]
        val_rows = val_rows[::HELD_OUT]
    num = len(features) if dist.is_main() else 0
    chosen = range(0, num, max(1, num // num_queries))[:num_queries]
    queries = F.normalize(features[list(chosen)], dim=1)
    _, nearest = nearest_neighbours(F.normalize(train_features, dim=1), queries, k)  # (q, k)
    train_labels = dist.all_gather_rows(train_labels)
    if not dist.is_main():
        return

    def picture(dataset, sample):
        image = dataset.load(sample)
        side = min(64, *image.shape[1:])
        return centre_crop(image, side, side)

    neighbour_sheet(
        [picture(val or train, val_rows[query]) for query in chosen],
        [[picture(train, train_rows[row]) for row in rows] for rows in nearest.tolist()],
        (train_labels[nearest] == labels[list(chosen), None]).tolist(),
        path,
    )
