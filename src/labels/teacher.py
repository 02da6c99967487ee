"""Features of images by a network that was trained elsewhere, whatever its method; of any layer."""

import argparse
from collections.abc import Callable

from torch import Tensor, nn

from ..data.datasets import ImageDataset, open_dataset
from ..evaluate import flags as eval_flags
from ..evaluate.evaluation import build_network, is_dino, is_transformer, statistics
from ..nets.weights import CheckpointError
from ..pictures.responses import module_name
from ..run import flags
from .features import extract_features


def open_teacher(
    pretrained: str,
    dataset: ImageDataset,
    arch: str = "",
    checkpoint_key: str | None = None,
    layer: str = "",
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The network of a run's folder, a checkpoint or a file of weights, to make features with.

    arch: unless the run or the file says it. checkpoint_key: section of the file. layer: see
    forward_of_layer. Size and normalisation of the images are those of the run, else the usual ones.
    Returns extract(device, **options) -> features (n, D) of this process's share of the dataset and
    their indices (n,), with the options of extract_features. Raises ValueError and OSError.
    """
    command = [f"--pretrained={pretrained}", f"--data_path={dataset.name}"]
    for flag, value in (("arch", arch), ("checkpoint_key", checkpoint_key)):
        command += [f"--{flag}={value}"] if value else []
    args, run = eval_flags.parse_args(_parser, command)
    options = {**flags.model_options(args), **flags.vit_options(args, args.size)}
    try:
        model = build_network(args.arch, options, pretrained, run, checkpoint_key=checkpoint_key)
    except CheckpointError as error:
        if run or arch:
            raise
        raise CheckpointError(f"{error}; for a teacher give --teacher_arch, not --arch") from error
    forward = forward_of_layer(model, layer)
    if len(dataset.mean) != args.in_chans:
        dataset = open_dataset(dataset.name, in_chans=args.in_chans)
    normalise = statistics(args, dataset, is_transformer(args.arch) or is_dino(run))

    def extract(device, **options):
        model.to(device)
        return extract_features(forward, dataset, args.size, *normalise, device, **options)

    return extract


def forward_of_layer(model: nn.Module, layer: str = "") -> Callable[[Tensor], Tensor]:
    """Images (B, C, S, S) -> (B, D): what the module `layer` puts out, averaged over positions.

    layer: its name in model.named_modules(), "" for the pooled features of the model. Raises
    ValueError for another name and, when called, for a layer that has no part in the features.
    """
    if not layer:
        return model.forward_backbone
    full, near = module_name(model, layer)
    if full is None:
        near = ", ".join(near or [name for name, _ in model.named_children()])
        raise ValueError(f"--layer {layer} is not in the network; near to it are {near}")
    found = []

    def keep(module, inputs, output):  # at once, as the next layer may work in place
        output = output[0] if isinstance(output, tuple) else output
        positions = {4: (2, 3), 3: (1,)}.get(output.ndim)  # of a map, of the tokens of a ViT
        found.append(output.float().mean(positions) if positions else output.clone())

    def forward(images):
        found.clear()
        model.forward_backbone(images)
        if not found:
            raise ValueError(f"--layer {layer} has no part in the features of the network")
        return found[-1]

    model.get_submodule(full).register_forward_hook(keep)
    return forward


def _parser() -> argparse.ArgumentParser:
    """The flags of eval_knn.py that say what a network and its images are like."""
    parser = flags.Parser(__doc__)
    eval_flags.add_network_args(parser)
    eval_flags.add_image_args(parser)
    flags.add_runtime_args(parser)
    return parser
