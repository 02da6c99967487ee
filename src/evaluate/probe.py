"""k-NN accuracy of a network while it trains, on the labels of its data, if there are any."""

import torch
import torch.nn.functional as F
from torch import nn

from ..data.datasets import ImageDataset, open_dataset
from ..labels.features import extract_features
from .knn import knn_accuracy
from .splits import check_classes, number_as, split_features

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


def knn_probe(
    network: nn.Module, dataset: ImageDataset, val: ImageDataset | None, **extraction
) -> float:
    """Top-1 (%) of weighted 20-NN on the backbone's features.

    `val` is classified by `dataset`; without it every tenth image of `dataset` by the others.
    extraction: size, mean, std, device, ... of src.labels.features.extract_features. All processes call
    this; the network is put into evaluation mode and back.
    """

    def extract(images):
        return extract_features(network.forward_backbone, images, **extraction)

    network.eval()
    with torch.compiler.set_stance("force_eager"):  # no new graphs for a few seconds' work
        train, train_labels, queries, labels = split_features(extract, dataset, val)
    network.train()
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
