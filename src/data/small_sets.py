"""The data sets that have a name: scikit-learn's digits and the small ones of torchvision."""

import contextlib
import os

import numpy as np
import torch

# name -> class in torchvision.datasets, its arguments for training, and for evaluation
TORCHVISION = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "stl10_unlabeled": ("STL10", {"split": "unlabeled"}, {"split": "test"}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": False}),
}
# Mean and standard deviation of each channel over the training images, full range = 1. Those of
# digits are measured; those of cifar10 are the usual ones and within 0.002 of a measurement on
# re-encoded files; the rest are the usual ones.
STATISTICS = {
    "digits": ((0.3059,) * 3, (0.3761,) * 3),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "stl10_unlabeled": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "mnist": ((0.1307,) * 3, (0.3081,) * 3),
    "fashion_mnist": ((0.2860,) * 3, (0.3530,) * 3),
}
DIGITS_VAL, DIGITS_SEED = 500, 31  # 500 of 1,797 for evaluation, the same ones in every run


def read_small_set(
    name: str, split: str, flag: str, root: str
) -> tuple[torch.Tensor, torch.Tensor | None, list[str] | None]:
    """Images, labels and class names of one of datasets.NAMES.

    Returns uint8 `(N, C, H, W)`, int64 `(N,)` or None, and a list of str or None.
    Raises ValueError for a split other than train, val and test (val and test are the same), and
    ValueError when a package is missing or a download fails.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"{flag} {name} has no split {split}: take train or val")
    if name == "digits":
        return _read_digits(split, flag)
    class_name, for_training, for_evaluation = TORCHVISION[name]
    arguments = for_training if split == "train" else for_evaluation
    return images_and_labels(_download(class_name, arguments, name, flag, root))


def images_and_labels(
    dataset: torch.utils.data.Dataset,
) -> tuple[torch.Tensor, torch.Tensor | None, list[str] | None]:
    """The same of a small set of torchvision, which holds all its images."""
    images = torch.as_tensor(dataset.data)
    if images.dim() == 3:  # (N, H, W)
        images = images[:, None]
    elif images.shape[-1] == 3:  # (N, H, W, 3)
        images = images.permute(0, 3, 1, 2).contiguous()
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    labels = torch.as_tensor(labels).long()
    classes = getattr(dataset, "classes", None) or [str(i) for i in range(int(labels.max()) + 1)]
    if (labels < 0).any():  # STL-10's unlabelled images
        labels = classes = None
    return images, labels, classes


def _download(class_name, arguments, name, flag, root):
    from torchvision import datasets

    make = getattr(datasets, class_name)
    with contextlib.suppress(RuntimeError):  # what torchvision raises when the files are not there
        return make(root, download=False, **arguments)
    try:
        os.makedirs(root, exist_ok=True)
        with open(os.path.join(root, f".{name}.lock"), "w") as lock:
            with contextlib.suppress(ImportError):  # Windows: several processes may download
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            return make(root, download=True, **arguments)
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{flag} {name} cannot be downloaded to the folder {root} "
            f"({type(error).__name__}: {error}); put torchvision's {class_name} files there by "
            f"hand, or give a folder of images"
        ) from None


def _read_digits(split, flag):
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            f"{flag} digits needs the package scikit-learn: pip install scikit-learn"
        ) from None
    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), pixels are 0..16
    rows = split_evenly(data.target, DIGITS_VAL, DIGITS_SEED)[0 if split == "train" else 1]
    labels = torch.from_numpy(data.target[rows]).long()
    return torch.from_numpy(images[rows])[:, None], labels, [str(name) for name in range(10)]


def split_evenly(labels: np.ndarray, num_val: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sorted index arrays, `num_val` of them in the second, each class in proportion."""
    generator = np.random.RandomState(seed)  # its stream is frozen, whatever numpy's version
    counts = np.bincount(labels)
    exact = counts * num_val / len(labels)
    quota = np.floor(exact).astype(int)
    quota[np.argsort(quota - exact, kind="stable")[: num_val - quota.sum()]] += 1
    val = [generator.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(quota)]
    val = np.sort(np.concatenate(val))
    return np.setdiff1d(np.arange(len(labels)), val), val


class ArraySource:
    """Images in memory, uint8 `(N, C, H, W)`."""

    in_memory = True

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self):
        return len(self.images)

    def name(self, index: int) -> str:
        """The number of an image, for people."""
        return f"image {index}"

    def read(self, index: int) -> torch.Tensor:
        """One image, uint8 (C, H, W)."""
        return self.images[index]
