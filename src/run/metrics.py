"""Health of a representation: are the codes spread, are the prototypes used, has it collapsed?"""

import math

import torch

from .. import dist


@torch.no_grad()
def code_entropy(assignments: torch.Tensor) -> torch.Tensor:
    """Mean entropy in nats of the rows of (B, K) assignments: 0 one-hot, ln(K) says nothing."""
    return torch.special.entr(assignments.cpu().double()).sum(1).mean()


@torch.no_grad()
def prototype_usage(assignments: torch.Tensor) -> torch.Tensor:
    """Number of prototypes in use by the batch of all processes, from (B, K) assignments.

    Perplexity exp(H) of the histogram of the most likely prototype of each sample: 1 when all
    samples choose the same one, at most min(K, B). The hard choice is counted, because Sinkhorn's
    soft codes use all prototypes equally by construction (Eq. 4).
    """
    counts = torch.bincount(assignments.argmax(1).cpu(), minlength=assignments.shape[1]).double()
    counts = dist.all_reduce_sum(counts)  # (K,)
    return torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp()


@torch.no_grad()
def embedding_std(embeddings: torch.Tensor) -> torch.Tensor:
    """Spread of L2-normalised (B, D) embeddings: 1 when uniform on the sphere, 0 when collapsed.

    Standard deviation over the batch, averaged over dimensions, times sqrt(D).
    """
    z = embeddings.cpu().double()  # on the CPU: some devices have no float64
    return z.std(0, unbiased=False).mean() * math.sqrt(z.shape[1])


@torch.no_grad()
def rankme(embeddings: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Effective rank of (B, D) embeddings (RankMe, Garrido et al., 2023, arXiv:2210.02885, Eq. 1-2).

    Exponential of the entropy of the normalised singular values: between 1 and min(B, D).
    """
    if not torch.isfinite(embeddings).all():
        return torch.tensor(math.nan)
    singular_values = torch.linalg.svdvals(embeddings.cpu().double())
    p = singular_values / singular_values.sum().clamp(min=eps) + eps
    return torch.special.entr(p).sum().exp()


@torch.no_grad()
def pair_cosines(embedding: torch.Tensor) -> tuple[float, float]:
    """Mean cosine of pairs of crops of one image, and of pairs of crops of different images.

    embedding: (M, B, D), M >= 2 crops of B images, L2-normalised; with a process group, this process's
    images, the same number on each. All pairs of all processes count; there must be two images. From
    sums of embeddings alone: the cosines of all pairs of a set add up to |sum of the set|^2.
    """
    z = embedding.cpu().double()
    images = z.sum(0)  # (B, D)
    # of all pairs in an image, of every crop with itself
    squares = torch.stack([images.square().sum(), z.square().sum()])
    within, selves = dist.all_reduce_sum(squares).tolist()
    everything = dist.all_reduce_sum(images.sum(0)).square().sum().item()
    num_crops, crops_of_image = z[..., 0].numel() * dist.world_size(), len(z)
    positive = (within - selves) / (num_crops * (crops_of_image - 1))
    negative = (everything - within) / (num_crops * (num_crops - crops_of_image))
    return positive, negative


@torch.no_grad()
def kl_to_uniform(probabilities: torch.Tensor) -> torch.Tensor:
    """KL divergence in nats from the mean of (B, K) probabilities over all processes to 1 / K.

    0 when all outputs are equally likely over the batch, ln(K) when one of them takes all.
    """
    mean = probabilities.mean(0, dtype=torch.float32).cpu().double()  # (K,)
    mean = dist.all_reduce_sum(mean) / dist.world_size()
    return (math.log(len(mean)) - torch.special.entr(mean).sum()).clamp(min=0)


@torch.no_grad()
def normalized_mutual_information(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """NMI of two assignments of the same samples: I(A; B) / sqrt(H(A) H(B)) (thesis, section 3.2.2).

    a, b: (N,) integers; samples that are negative in either are left out. 1 for the same partition,
    whatever its numbers, 0 for independent ones. A float64 scalar.
    """
    known = (a.cpu() >= 0) & (b.cpu() >= 0)
    a, b = (torch.unique(x.cpu()[known], return_inverse=True)[1] for x in (a, b))
    if not len(a):
        return torch.zeros((), dtype=torch.float64)

    def entropy(labels):
        counts = torch.unique(labels, return_counts=True)[1]
        return torch.special.entr(counts.double() / len(labels)).sum()

    h_a, h_b = entropy(a), entropy(b)
    if h_a == 0 or h_b == 0:  # all samples in one cluster: equal to another such partition only
        return (h_a == h_b).double()
    information = h_a + h_b - entropy(a * (int(b.max()) + 1) + b)
    return (information / (h_a * h_b).sqrt()).clamp(0, 1)


@torch.no_grad()
def prediction_health(
    logits: torch.Tensor, labels: torch.Tensor, ignored: int
) -> dict[str, torch.Tensor]:
    """How sure predictions are, and how often they agree with the pseudo-labels.

    logits: (V * B, K), crop-major, before the softmax; labels: (B,), `ignored` for images without.
    prediction_entropy: mean over rows, nats. accuracy: in percent, NaN when there is no label.
    """
    logits = logits.float()
    known = (labels != ignored).repeat(len(logits) // len(labels))  # (V * B,)
    agree = (logits.argmax(1) == labels.repeat(len(logits) // len(labels)))[known]
    return {
        "prediction_entropy": code_entropy(torch.softmax(logits, 1)),
        "accuracy": 100 * agree.float().mean(),
    }


@torch.no_grad()
def cluster_health(
    assignments: torch.Tensor,
    previous: torch.Tensor | None,
    labels: torch.Tensor | None,
    num_clusters: list[int],
) -> dict[str, float]:
    """Sizes of the clusters of all heads, and NMI, the mean of the heads.

    assignments, previous: (heads, N), negative for samples without; num_clusters: K of each head;
    labels: (N,), of the data. Keys whose argument is None are left out.
    """
    heads = list(zip(assignments.cpu(), num_clusters, strict=True))
    sizes = [torch.bincount(a[a >= 0], minlength=k) for a, k in heads]  # (K,) each
    every = torch.cat(sizes).double()
    health = {
        "cluster_min": every.min().item(),
        "cluster_median": every.median().item(),
        "cluster_max": every.max().item(),
        "clusters_empty": (every == 0).double().sum().item() / len(heads),
    }
    for key, other in (("nmi_previous", previous), ("nmi_labels", labels)):
        if other is not None:
            others = other.expand(len(heads), -1)
            nmi = [
                normalized_mutual_information(a, b)
                for a, b in zip(assignments, others, strict=True)
            ]
            health[key] = torch.stack(nmi).mean().item()
    return health
