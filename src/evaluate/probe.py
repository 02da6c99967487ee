"""k-NN and linear accuracy of a network while it trains, on the labels of its data or on other sets."""

import torch
import torch.nn.functional as F
from torch import nn

from ..data.datasets import ImageDataset, open_dataset
from ..labels.features import extract_features
from .knn import knn_accuracy
from .linear_probe import linear_accuracy
from .splits import check_classes, number_as, open_labelled_splits, split_features

TEMPERATURE = 0.07  # Wu et al. 2018, arXiv:1805.01978
NUM_NEIGHBOURS = 20


def open_validation(dataset: ImageDataset, data_path: str, in_chans: int) -> ImageDataset | None:
    """The labelled val split beside the training images, None where there is none.

    Raises ValueError where the two have no class in common, and warns of classes that training lacks.
    """
    dataset.load(0)  # or a storage that is away for a moment would look like a missing split
    try:
        val = open_dataset(data_path, split="val", in_chans=in_chans, **dataset.opening)
    except FileNotFoundError:
        return None
    if val.labels is None or val.same_files(dataset):
        return None
    number_as(dataset, val)
    remedy = "--data_path: name the folders of classes alike in both splits, or use --knn_freq 0"
    check_classes(dataset, val, remedy)
    return val


def open_probe_set(name: str, path: str, in_chans: int) -> tuple[ImageDataset, ImageDataset | None]:
    """A labelled set of --probe_data: training and validation images, None where nothing splits them.

    Raises ValueError and FileNotFoundError, naming the set.
    """
    try:
        return open_labelled_splits(path, in_chans=in_chans)
    except (ValueError, FileNotFoundError) as error:
        sentence = str(error).replace("--data_path ", "")
        raise type(error)(f"--probe_data {name}={path}: {sentence}") from None


def knn_probe(
    network: nn.Module, dataset: ImageDataset, val: ImageDataset | None, **extraction
) -> float:
    """Top-1 (%) of weighted 20-NN on the backbone's features.

    `val` is classified by `dataset`; without it every tenth image of `dataset` by the others.
    extraction: size, mean, std, device, ... of src.labels.features.extract_features. All processes call
    this; the network is put into evaluation mode and back.
    """
    return _knn(_features(network, dataset, val, extraction))


def probe_set(
    network: nn.Module, train: ImageDataset, val: ImageDataset | None, **extraction
) -> tuple[float, float]:
    """Top-1 (%) of 20-NN as knn_probe, and of a linear probe (src.evaluate.linear_probe)."""
    split = _features(network, train, val, extraction)
    return _knn(split), linear_accuracy(*split)


def _features(network, dataset, val, extraction):
    """Features and labels to classify by, then those to classify, of this process."""

    def extract(images):
        return extract_features(network.forward_backbone, images, **extraction)

    network.eval()
    with torch.compiler.set_stance("force_eager"):  # no new graphs for a few seconds' work
        split = split_features(extract, dataset, val)
    network.train()
    return split


def _knn(split):
    train, train_labels, queries, labels = split
    accuracies = knn_accuracy(
        F.normalize(train, dim=1),
        train_labels,
        F.normalize(queries, dim=1),
        labels,
        ks=[NUM_NEIGHBOURS],
        temperature=TEMPERATURE,
        top=[1],
    )
    (top1,) = accuracies[NUM_NEIGHBOURS]
    return top1
