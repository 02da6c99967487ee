"""Which cluster each image is in, by a network's prototypes or by k-means, and the files of that.

clusters.csv has a line for each image, in the order of the data: index, file, cluster, cosine to its
centroid, and label and class where they are known; assignments.npy (N,) int64, similarities.npy (N,)
float32 and centroids.npy (K, D) float32, of length 1, the same as arrays; assignments_heads.npy
(heads, N) those of all heads, where there are several; clusters.json a summary. An image that cannot
be read is in cluster -1.
"""

import csv
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cluster.kmeans import initial_centroids, spherical_kmeans
from ..data.datasets import ImageDataset
from ..data.loading import TIMEOUT
from ..labels.agreement import Overlaps
from ..labels.features import extract_features
from ..nets.dino_head import DINOHead, unit_rows
from ..nets.pretrained import IMAGENET_RED, Pretrained
from ..nets.weights import read_weights
from ..run.health import count_unique
from .cluster_contents import Column, colour_spread

PROTOTYPES = re.compile(r"(?:.*\.)?prototypes(?:\.prototypes(\d+))?\.weight")
DINO_HEAD = re.compile(r"(?:.*\.)?head\.((?:mlp|last_layer)\..*)")
UNREADABLE = -1  # in place of a cluster
SCORES_AT_ONCE = 1 << 24  # bounds the memory that a matrix (images, clusters) takes
ITERATIONS = 20  # of k-means


# ============ prototypes ============
def read_heads(
    path: str | Path, checkpoint_key: str | None = None
) -> tuple[list[tuple[Tensor, Tensor | None]], DINOHead | None]:
    """The layers of a file of weights whose outputs are clusters, and the head of DINO before one.

    A list of (weight (K, D), bias (K,) or None): the prototypes of each head, of length 1 (arXiv:
    2006.09882, section 3.1), or the last layer of DINO (arXiv:2104.14294, section 3.1); empty where
    there is none, or no path. Raises as src.nets.weights.read_weights.
    """
    if not path:
        return [], None
    weights = read_weights(path, checkpoint_key)
    found = {match[1]: x for name, x in weights.items() if (match := PROTOTYPES.fullmatch(name))}
    if found:
        numbers = sorted(found, key=lambda number: int(number or 0))
        return [(F.normalize(found[i].float(), dim=1), None) for i in numbers], None
    found = {match[1]: x for name, x in weights.items() if (match := DINO_HEAD.fullmatch(name))}
    if not {"last_layer.weight", "last_layer.weight_v"} & set(found):
        return [], None
    head = _dino_head(found)
    last = head.last_layer
    if head.l2_bottleneck:
        return [(last.weight_g.detach() * unit_rows(last.weight_v.detach()), None)], head
    return [(last.weight.detach(), last.bias.detach())], head


def _dino_head(weights):
    """The head whose tensors these are; their shapes say what it is like."""
    bottleneck = "last_layer.weight_v" in weights
    last = weights["last_layer.weight_v" if bottleneck else "last_layer.weight"]
    linear = [x for name, x in weights.items() if name.startswith("mlp.") and x.dim() == 2]
    first = [*linear, last][0]
    head = DINOHead(
        first.shape[1],
        len(last),
        use_bn=any(name.endswith("running_mean") for name in weights),
        nlayers=len(linear) + (not bottleneck),
        hidden_dim=len(first),
        bottleneck_dim=last.shape[1],
        l2_bottleneck=bottleneck,
    )
    head.load_state_dict(weights)
    return head.eval()


def features_of(
    network: Pretrained,
    dino: DINOHead | None,
    dataset: ImageDataset,
    *,
    size: int,
    device: torch.device,
    precision: str,
    batch_size: int,
    workers: int,
    loader_timeout: float = TIMEOUT,
) -> tuple[Tensor, Tensor]:
    """What clusters are made of, (N, D), on the device where they are made; mean colours, on the CPU.

    It is the output of the network, or, where `dino` is its head, what its last layer is applied to.
    Mean colours (N, C) are those of the same crops, in levels of 0 to 255.
    size: side in pixels of the images. precision, batch_size, workers, loader_timeout: see
    extract_features. Raises ValueError for values that are not finite.
    """
    model = network.model.to(device)
    mean, std = network.normalisation(dataset, IMAGENET_RED if dino else None)

    def features_and_colours(images):
        x = model(images).flatten(1)
        if dino:
            x = dino.mlp(x).float()
            x = unit_rows(x) if dino.l2_bottleneck else x
        return torch.cat([x.float(), images.float().mean((2, 3))], 1)

    if dino:
        dino.to(device)
    rows, _ = extract_features(
        features_and_colours,
        dataset,
        size,
        mean=mean,
        std=std,
        device=device,
        batch_size=batch_size,
        num_workers=workers,
        loader_timeout=loader_timeout,
        precision=precision,
    )
    features, colours = rows[:, : -len(mean)], rows[:, -len(mean) :]
    if not features.isfinite().all():
        raise ValueError("the network of --pretrained makes features that are not finite")
    colours = 255 * (colours * torch.tensor(std) + torch.tensor(mean))
    return features.to(device if device.type != "mps" else "cpu"), colours


# ============ clusters ============
def nearest(
    features: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The cluster with the largest output for each row, its cosine to the centroid, the centroids.

    features (N, D), weight (K, D), bias (K,) -> (N,) int64, (N,), (K, D) on the CPU. Centroids are
    the rows of `weight` at length 1.
    """
    weight, centroids = weight.to(features), F.normalize(weight.to(features), dim=1)
    bias = None if bias is None else bias.to(features)
    clusters, cosines = [], []
    for rows in features.split(max(1, SCORES_AT_ONCE // len(weight))):
        best = F.linear(rows, weight, bias).argmax(1)  # (n,)
        clusters.append(best)
        cosines.append((F.normalize(rows, dim=1) * centroids[best]).sum(1).clamp(-1, 1))
    return torch.cat(clusters).cpu(), torch.cat(cosines).cpu(), centroids.cpu()


def group(
    features: Tensor, heads: list, readable: Tensor, num_clusters: int | None, seed: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What `nearest` finds for each of `heads`, of read_heads; unreadable images are in -1.

    features (N, D), readable (N,) bool. num_clusters: instead, by spherical k-means of the readable
    images, from a start by k-means++.
    """
    if num_clusters:
        features = F.normalize(features, dim=1)
        rows = features[readable.to(features.device)]
        centroids = initial_centroids(rows, num_clusters, seed, method="k-means++")
        centroids, _ = spherical_kmeans(rows, centroids, ITERATIONS, empty="reseed")
        heads = [(centroids, None)]
    found = [nearest(features, weight, bias) for weight, bias in heads]
    return [
        (clusters.masked_fill(~readable, UNREADABLE), cosines, centroids)
        for clusters, cosines, centroids in found
    ]


class Clusters:
    """Clusters of images and what is known about them.

    assignments (N,) int64, cosines (N,), centroids (K, D); labels (N,) and classes or None; colours
    (N, C) in levels, or None; columns of metadata by name. Then sizes (K,); with labels majority (K,),
    the most frequent label (of equal ones the lowest) of each cluster, and matching (K,), the number of
    its images that have it; dominant, of each column what Column.dominant gives; with colours what
    colour_spread gives. same_class_edges: what that function gave, None where nobody asked for it.
    """

    def __init__(
        self,
        assignments: Tensor,
        cosines: Tensor,
        centroids: Tensor,
        labels: Tensor | None = None,
        classes: list[str] | None = None,
        colours: Tensor | None = None,
        columns: dict[str, Column] | None = None,
    ):
        self.assignments, self.centroids = assignments, centroids
        self.readable = assignments != UNREADABLE
        self.cosines = cosines.masked_fill(~self.readable, torch.nan)
        self.labels, self.classes = labels, classes
        self.sizes = torch.bincount(assignments[self.readable], minlength=len(centroids))
        self.columns, self.same_class_edges, self.spread = columns or {}, None, None
        self.dominant = {
            name: column.dominant(assignments, len(centroids))
            for name, column in self.columns.items()
        }
        if colours is not None:
            self.spread, self.spread_within, self.spread_of_all = colour_spread(
                colours, assignments, len(centroids)
            )
        if labels is None:
            return
        most = int(labels.max()) + 1
        pairs = (assignments * most + labels)[self.readable]
        pairs, counts = torch.unique(pairs, return_counts=True)
        clusters, labels, none = pairs // most, pairs % most, torch.zeros_like(self.sizes)
        self.matching = none.scatter_reduce(0, clusters, counts, "amax")
        winners = counts == self.matching[clusters]
        self.majority = none.scatter_reduce(
            0, clusters[winners], labels[winners], "amin", include_self=False
        )

    def class_name(self, label: int) -> str:
        """The name of a class; its number where it has none."""
        return self.classes[label] if self.classes and label < len(self.classes) else str(label)

    def summary(self) -> dict:
        """Numbers for clusters.json; sizes are of clusters that are not empty."""
        used = self.sizes[self.sizes > 0]
        numbers = {
            "images": len(self.assignments),
            "unreadable": int((~self.readable).sum()),
            "num_clusters": len(self.sizes),
            "empty": len(self.sizes) - len(used),
            "size_min": int(used.min()),
            "size_median": float(used.double().quantile(0.5)),
            "size_max": int(used.max()),
            "unique": count_unique(self.centroids),
        }
        if self.spread is not None:
            numbers |= {
                "colour_spread": self.spread_within,
                "colour_spread_of_all": self.spread_of_all,
            }
        if self.labels is not None:
            numbers |= Overlaps(self.assignments, self.labels).summary()
        if self.same_class_edges is not None:
            numbers["same_class_edges"] = self.same_class_edges
        if self.columns:
            numbers["metadata"] = {
                name: column.agreement(self.assignments) for name, column in self.columns.items()
            }
        return numbers

    def entry(self, cluster: int) -> dict:
        """What clusters.json says of a cluster that is not empty."""
        size = int(self.sizes[cluster])
        entry = {"cluster": cluster, "size": size}
        if self.labels is not None:
            entry["purity"] = int(self.matching[cluster]) / size
            entry["class"] = self.class_name(int(self.majority[cluster]))
        if self.spread is not None:
            entry["colour_spread"] = float(self.spread[cluster])
        if self.columns:
            entry["dominant"] = {name: found[cluster] for name, found in self.dominant.items()}
        return entry


# ============ files ============
def write_files(
    folder: Path, clusters: Clusters, names: list[str], heads: list[Tensor], settings: dict
) -> dict:
    """Write all files of a call but the pictures; heads: the clusters (N,) by each head.

    Returns the summary of the clusters.
    """
    labelled = clusters.labels is not None
    np.save(folder / "assignments.npy", clusters.assignments.numpy())
    np.save(folder / "similarities.npy", clusters.cosines.float().numpy())
    np.save(folder / "centroids.npy", clusters.centroids.float().numpy())
    several = folder / "assignments_heads.npy"
    if len(heads) > 1:
        np.save(several, torch.stack(heads).numpy())
    else:
        several.unlink(missing_ok=True)  # of an earlier call

    with open(
        folder / "clusters.csv", "w", newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        writer = csv.writer(file)
        header = ["index", "file", "cluster", "cosine", "label", "class"]
        writer.writerow(header if labelled else header[:4])
        rows = zip(names, clusters.assignments.tolist(), clusters.cosines.tolist(), strict=True)
        for index, (name, cluster, cosine) in enumerate(rows):
            row = [index, name, cluster, f"{cosine:.6f}"]
            if labelled:
                label = int(clusters.labels[index])
                row += [label, clusters.class_name(label)]
            writer.writerow(row)

    summary = clusters.summary()
    used = clusters.sizes.nonzero().flatten().tolist()
    found = {"settings": settings, **summary, "clusters": [clusters.entry(i) for i in used]}
    (folder / "clusters.json").write_text(json.dumps(found, indent=1) + "\n")
    return summary
