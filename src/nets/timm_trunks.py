"""Networks of the package timm, by the name of --arch: timm:resnet26d, timm:vit_small_patch16_224.

timm (Wightman 2019) is https://github.com/huggingface/pytorch-image-models; it is optional.
"""

import difflib
import types

from torch import Tensor, nn

from ..errors import CheckpointError, cause

# What lets a network take images of any size, by kind: a ViT interpolates its table of positions, a Swin
# pads its windows. A convolutional network takes neither argument, and needs none.
ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


def timm_trunk(name: str, in_chans: int = 3, drop_path_rate: float = 0.0) -> tuple[nn.Module, int]:
    """The untrained network `name` of timm up to its pooled features, and their number.

    drop_path_rate is not used by networks without stochastic depth. Raises ValueError on an unknown
    name, and where timm is not installed.
    """
    timm = import_timm(name)
    attempts = [
        {**stochastic_depth, **any_size}
        for stochastic_depth in ({"drop_path_rate": drop_path_rate}, {})
        for any_size in ANY_SIZE
    ]
    for i, options in enumerate(attempts):
        try:
            trunk = timm.create_model(name, num_classes=0, in_chans=in_chans, **options)
            break
        except TypeError:  # an argument that this kind of network does not have
            if i == len(attempts) - 1:
                raise
    return trunk, getattr(trunk, "head_hidden_size", trunk.num_features)


def timm_weights(name: str) -> dict[str, Tensor]:
    """The tensors of the weights that timm has of a network, downloaded unless they are there already.

    Raises ValueError as described_by_timm, and CheckpointError where they cannot be had.
    """
    timm = import_timm(name)
    described_by_timm(name)
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of the hub, of the connection or of the file
        raise CheckpointError(
            f"the weights of timm:{name} cannot be downloaded, and are not in the cache ({cause(error)})"
        ) from error


def described_by_timm(name: str) -> dict:
    """What timm says of the images that its weights of a network are for: size, mean, std.

    Raises ValueError on an unknown name or one without weights, and where timm is not installed.
    """
    timm = import_timm(name)
    said = timm.get_pretrained_cfg(name)
    if not said.has_weights:
        raise ValueError(
            f"timm has no weights of {name}: without --pretrained, --arch timm:{name} is untrained"
        )
    return {"size": said.input_size[-1], "mean": list(said.mean), "std": list(said.std)}


def import_timm(name: str) -> types.ModuleType:
    """The package timm; raises ValueError where it is not installed, or has no network `name`."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"timm:{name} needs the package timm: pip install timm") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4)
        hint = f"near to it are {', '.join(near)}" if near else "see timm.list_models()"
        raise ValueError(f"timm:{name} is not known to timm {timm.__version__}: {hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # of what is behind the dot in resnet18.a1_in1k
        raise ValueError(f"timm:{name} is not known to timm: {error}") from None
    return timm
