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

FILE_OF_HUB = "model.safetensors"  # where timm does not say another name
SECONDS = 5  # after which a server that does not answer is given up


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


def has_stochastic_depth(network: nn.Module) -> bool:
    """Whether a network of timm was built so that it leaves out branches in training."""
    layers = [module for module in network.modules() if type(module).__name__ == "DropPath"]
    return any(layer.drop_prob for layer in layers)


def timm_weights(name: str) -> dict[str, Tensor]:
    """The tensors of the weights that timm has of a network, downloaded unless they are there already.

    Raises ValueError as described_by_timm, and CheckpointError where they cannot be had.
    """
    timm = import_timm(name)
    described_by_timm(name)
    address, is_cached = weights_of_timm(name)
    try:
        if not is_cached:
            refuse_unreachable(address)
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of the hub, of the connection or of the file
        raise CheckpointError(
            f"the weights of timm:{name} cannot be downloaded, and are not in the cache ({cause(error)}): "
            f"fetch {address} elsewhere, and give it by --pretrained or --init_from, with --arch "
            f"timm:{name}"
        ) from error


def weights_of_timm(name: str) -> tuple[str, bool]:
    """(address of the weights that timm has of a network, whether they are downloaded already).

    Of weights that are not in the Hugging Face hub the latter is not known, and said to be true.
    """
    from huggingface_hub import hf_hub_url, try_to_load_from_cache  # which timm needs

    said = import_timm(name).get_pretrained_cfg(name)
    if not said.hf_hub_id:
        return said.url, True
    repository, _, revision = said.hf_hub_id.partition("@")
    file, revision = said.hf_hub_filename or FILE_OF_HUB, revision or None
    cached = try_to_load_from_cache(repository, file, revision=revision)
    return hf_hub_url(repository, file, revision=revision), isinstance(cached, str)


def refuse_unreachable(address: str) -> None:
    """Ask the Hugging Face hub for a file once, and raise the error of the connection where there is none.

    The hub's own download tries each of timm's names of a file six times, for a minute and more. An answer,
    such as that it has another name, is no error here: timm knows the names.
    """
    from huggingface_hub import get_hf_file_metadata

    try:
        get_hf_file_metadata(address, timeout=SECONDS)
    except Exception as error:
        if getattr(error, "response", None) is None:  # nobody has answered
            raise


def described_by_timm(name: str) -> dict:
    """What timm says of the images that its weights of a network are for: size, mean, std.

    Raises ValueError on an unknown name or one without weights, and where timm is not installed.
    """
    said = images_of_timm(name)
    if not said:
        raise ValueError(
            f"timm has no weights of {name}: without --pretrained, --arch timm:{name} is untrained"
        )
    return said


def images_of_timm(name: str) -> dict:
    """The same for a file of weights of the network, which may be timm's; {} where timm has none of it.

    Raises ValueError as import_timm.
    """
    said = import_timm(name).get_pretrained_cfg(name)
    if not said.has_weights:
        return {}
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
