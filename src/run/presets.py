"""Defaults that a data set asks for, the same for all methods; a flag on the command line wins.

imagenet is what the parsers say themselves, the published values. The others were found by trials
on two CPU cores (digits) and are what the README and RESULTS.md run.
"""

PRESET_OF = {"digits": "tiny"} | dict.fromkeys(
    ("cifar10", "cifar100", "stl10", "stl10_unlabeled", "svhn", "mnist", "fashion_mnist"), "cifar"
)

# Side in pixels and share of the image's area of the crops, for one or two resolutions.
# imagenet: SwAV, arXiv:2006.09882, appendix A.2. Images of cifar are 32 px, those of digits 8 px.
CROPS = {
    "imagenet": {"size": [224, 96], "min_scale": [0.14, 0.05], "max_scale": [1.0, 0.14]},
    "cifar": {"size": [32, 16], "min_scale": [0.3, 0.1], "max_scale": [1.0, 0.4]},
    "tiny": {"size": [16, 8], "min_scale": [0.4, 0.2], "max_scale": [1.0, 0.5]},
}

SMALL = {
    "nmb_crops": [2, 2],
    "stem": "small",
    "feat_dim": 64,
    "blur": [0.0],
    "optimizer": "sgd",
    "base_lr": 0.5,
    "final_lr": 0.0005,
    "wd": 5e-4,
    "warmup_epochs": 0,
    "batch_size": 128,
    "log_freq": 20,
}
SHARED = {
    "imagenet": {},
    "cifar": {
        **SMALL,
        "arch": "resnet18",
        "hidden_mlp": 512,
        "base_lr": 0.2,
        "final_lr": 0.0002,
        "epochs": 100,
        "knn_freq": 10,
        "workers": 2,
    },
    "tiny": {
        **SMALL,
        "arch": "resnet10",
        "width": 0.25,
        "hidden_mlp": 128,
        "no_flip": True,  # a mirrored digit is another sign
        "color_jitter": [0.4, 0.4, 0.0, 0.0],
        "grayscale": 0.0,
        "epochs": 60,
        "knn_freq": 20,
        "workers": 0,
    },
}


def preset_of(data_path: str) -> str:
    """The preset that --preset auto means: imagenet for all but the small named sets."""
    return PRESET_OF.get(data_path, "imagenet")
