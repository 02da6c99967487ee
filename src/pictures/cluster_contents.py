"""What the images of a cluster have in common beside their class: metadata, colour; and their neighbours.

Thesis, section 3.2.2, Figure 3.6 (colour), section 3.3.2, Figure 3.13 (metadata), Table 3.4 (neighbours).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cluster.neighbours import nearest_neighbours
from ..labels.agreement import Overlaps

QUERIES = 10_000  # images whose neighbours are looked up, at most


# ============ metadata ============
class Column:
    """What is known of images in a column of a table, as groups.

    texts: N of them, empty where nothing is known. values: the different ones, sorted; groups: (N,)
    int64, which of them each image has, -1 for none.
    """

    def __init__(self, texts: Sequence[str]):
        self.values = sorted({text for text in texts if text})
        numbers = {value: number for number, value in enumerate(self.values)}
        self.groups = torch.tensor([numbers.get(text, -1) for text in texts], dtype=torch.int64)

    def agreement(self, assignments: Tensor) -> dict:
        """Of clusters (N,) with this column: NMI, AMI, different values, images that have one."""
        overlaps = Overlaps(assignments, self.groups)
        return {
            "nmi": overlaps.nmi(),
            "ami": overlaps.ami(),
            "values": len(self.values),
            "images": int((self.groups >= 0).sum()),
        }

    def dominant(self, assignments: Tensor, num_clusters: int) -> list[dict | None]:
        """Of each cluster its most frequent value, and that value's shares; None where it has none.

        Of equally frequent ones the first. share: of all images of the cluster, with a value or not;
        share_of_all: of all images that are in a cluster.
        """
        clustered = assignments >= 0
        sizes = assignments[clustered].bincount(minlength=num_clusters)
        known = clustered & (self.groups >= 0)
        clusters, groups = assignments[known], self.groups[known]
        totals = groups.bincount(minlength=len(self.values))
        pairs, counts = (clusters * max(1, len(self.values)) + groups).unique(return_counts=True)
        found, most = [None] * num_clusters, [0] * num_clusters
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            cluster, group = divmod(pair, len(self.values))
            if count > most[cluster]:
                most[cluster] = count
                found[cluster] = {
                    "value": self.values[group],
                    "share": count / int(sizes[cluster]),
                    "share_of_all": int(totals[group]) / int(clustered.sum()),
                }
        return found


def read_columns(
    metadata: dict[str, Sequence[str]], wanted: Sequence[str] | None
) -> dict[str, Column]:
    """The columns of metadata, by name, or those that are `wanted`. Raises ValueError, naming --columns."""
    for name in wanted or []:
        if name not in metadata:
            there = f"they have {', '.join(metadata)}" if metadata else "they have no metadata"
            raise ValueError(
                f"--columns {name} is nothing that is known of the images of --data_path: {there}"
            )
    names = metadata if wanted is None else wanted
    return {name: Column(metadata[name]) for name in names}


# ============ colour ============
def colour_spread(
    colours: Tensor, assignments: Tensor, num_clusters: int
) -> tuple[Tensor, float, float]:
    """How far the images of a cluster are from its mean colour: (each cluster (K,), within all, of all).

    colours: (N, C), the mean of each channel over an image. assignments: (N,), negative for none. The
    standard deviation over the images, its square averaged over channels; in the unit of `colours`. NaN
    for empty clusters. within all: the same of all images around the means of their clusters; of all:
    around the mean of all, what clusters that know no colour have. Both are root mean squares.
    """
    kept = assignments >= 0
    colours, assignments = colours[kept].double(), assignments[kept]
    sizes = assignments.bincount(minlength=num_clusters).double()
    sums = colours.new_zeros(num_clusters, colours.shape[1]).index_add_(0, assignments, colours)
    means = sums / sizes[:, None]  # (K, C), NaN for empty ones
    squares = (colours - means[assignments]).square().mean(1)  # (n,)
    total = torch.zeros_like(sizes).index_add_(0, assignments, squares)
    of_all = (colours - colours.mean(0)).square().mean().sqrt().item()
    return (total / sizes).sqrt(), squares.mean().sqrt().item(), of_all


# ============ neighbours ============
def same_class_edges(features: Tensor, labels: Tensor, k: int, seed: int) -> float:
    """Share of edges between images of one class in the graph of the k nearest neighbours (Table 3.4).

    features: (N, D), compared by their cosine; labels: (N,), negative for images that are left out. Edges
    go from each image, or from QUERIES of them drawn by `seed`, to the k nearest others. NaN where there
    is no other.
    """
    kept = labels >= 0
    rows, labels = F.normalize(features[kept.to(features.device)], dim=1), labels[kept]
    if len(rows) < 2:
        return float("nan")
    k = min(k, len(rows) - 1)
    queries = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    queries = queries[:QUERIES].sort().values
    _, near = nearest_neighbours(rows, rows[queries.to(rows.device)], k + 1)
    near = near.cpu()  # (Q, k + 1), the image itself among them, unless it has k + 1 equals
    is_self = near == queries[:, None]
    is_self[~is_self.any(1), -1] = True
    others = near[~is_self].view(len(queries), k)
    return (labels[others] == labels[queries][:, None]).double().mean().item()
