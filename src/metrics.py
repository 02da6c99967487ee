"""Health of a representation: are the codes spread, are the prototypes used, has it collapsed?"""

import math

import torch

from src import distributed


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
    counts = distributed.all_reduce_sum(counts)  # (K,)
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
def kl_to_uniform(probabilities: torch.Tensor) -> torch.Tensor:
    """KL divergence in nats from the mean of (B, K) probabilities over all processes to 1 / K.

    0 when all outputs are equally likely over the batch, ln(K) when one of them takes all.
    """
    mean = probabilities.mean(0, dtype=torch.float32).cpu().double()  # (K,)
    mean = distributed.all_reduce_sum(mean) / distributed.world_size()
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


def diagnose(history: list[dict], num_prototypes: int) -> str | None:
    """What is wrong with a run, in one sentence that names the flags that help, or None.

    history: the latest log lines, oldest first, with `loss`, `code_entropy` (nats), `prototypes_used`,
    `embedding_std` and `batch` (samples that share one assignment problem). The remedies are the
    published ones ("Common issues" of the SwAV repository): a lower epsilon, prototypes frozen for
    longer, a queue that is shorter or starts later. Needs 10 lines, all of them in trouble, because a
    healthy run passes ln(K) too.
    """
    recent = history[-10:]
    if len(recent) < 10 or num_prototypes < 2:
        return None
    ceiling = math.log(num_prototypes)
    if all(line["embedding_std"] < 0.05 for line in recent):
        return (
            "collapse: all images have the same embedding (standard deviation "
            f"{recent[-1]['embedding_std']:.3f}, healthy is near 1); lower --epsilon (0.03), lower "
            "--base_lr, or freeze the prototypes for longer (--freeze_prototypes_niters)"
        )
    if all(abs(line["loss"] - ceiling) < 1e-3 * ceiling for line in recent):
        return (
            f"the loss stays at ln(K) = {ceiling:.3f}, what constant codes give; lower --epsilon "
            "(0.03), freeze the prototypes for longer (--freeze_prototypes_niters), use fewer "
            "prototypes (--nmb_prototypes), or a shorter or later queue (--queue_length, "
            "--epoch_queue_starts)"
        )
    if all(line["code_entropy"] > 0.99 * ceiling for line in recent):
        return (
            f"the codes are uniform (entropy {recent[-1]['code_entropy']:.2f} of at most "
            f"{ceiling:.2f}) and carry no signal; lower --epsilon (0.03)"
        )
    possible = min(num_prototypes, recent[-1]["batch"])
    if possible >= 8 and all(line["prototypes_used"] < 0.05 * possible for line in recent):
        return (
            f"only {recent[-1]['prototypes_used']:.1f} of {possible} possible prototypes are in use; "
            "freeze the prototypes for longer (--freeze_prototypes_niters), lower --base_lr, or "
            "start the queue later (--epoch_queue_starts)"
        )
    return None


def diagnose_teacher(history: list[dict], num_outputs: int) -> str | None:
    """What is wrong with a run of self-distillation, as `diagnose`, or None.

    history: log lines with `teacher_entropy`, `student_kl`, `kl_to_uniform` (nats),
    `prototypes_used` and `embedding_std`. Collapse has two forms (section 5.6.3 of the thesis): uniform outputs, or one
    output that takes all; in both the student's KL to the teacher vanishes.
    """
    recent = history[-10:]
    if len(recent) < 10 or num_outputs < 2:
        return None
    ceiling, last = math.log(num_outputs), recent[-1]
    if all(line["teacher_entropy"] > 0.99 * ceiling for line in recent):
        return (
            f"collapse: the teacher's output is uniform (entropy {last['teacher_entropy']:.2f} of at "
            f"most {ceiling:.2f}); lower --teacher_temp or --warmup_teacher_temp (0.02), or lower --lr"
        )
    if all(
        line["kl_to_uniform"] > 0.9 * ceiling or line["prototypes_used"] < 1.5 for line in recent
    ):
        return (
            f"collapse: one output takes all images (KL to uniform {last['kl_to_uniform']:.2f} of at "
            f"most {ceiling:.2f}, {last['prototypes_used']:.1f} outputs in use); let the center follow faster (--center_momentum 0.9), use a teacher "
            "with momentum (--momentum_teacher 0.996), or raise --teacher_temp"
        )
    if all(line["student_kl"] < 1e-3 * ceiling for line in recent):
        return (
            f"collapse: student and teacher give all crops the same output (KL {last['student_kl']:.4f}"
            "); use a teacher with momentum (--momentum_teacher 0.996 --momentum_teacher_end 1), "
            "lower --teacher_temp, or lower --lr"
        )
    if all(line["embedding_std"] < 0.05 for line in recent):
        return (
            "collapse: all images have the same features (standard deviation "
            f"{last['embedding_std']:.3f}); lower --lr, lower --teacher_temp, or use a teacher with "
            "momentum (--momentum_teacher 0.996 --momentum_teacher_end 1)"
        )
    return None


def diagnose_clusters(
    history: list[dict], num_prototypes: int, ceiling: float | None = None
) -> str | None:
    """What is wrong with a run that predicts the clusters of a memory bank, as `diagnose`, or None.

    history: log lines with `loss`, `prototypes_used` (by the predictions of a batch), `batch` and
    `embedding_std`. num_prototypes: of the head that these are of. ceiling: the loss of predicting
    nothing, ln(K) unless the heads differ.
    """
    recent = history[-10:]
    if len(recent) < 10 or num_prototypes < 2:
        return None
    ceiling, last = math.log(num_prototypes) if ceiling is None else ceiling, recent[-1]
    if all(line["embedding_std"] < 0.05 for line in recent):
        return (
            "collapse: all images have the same embedding (standard deviation "
            f"{last['embedding_std']:.3f}, healthy is near 1); lower --base_lr, or lengthen "
            "--warmup_epochs"
        )
    if all(abs(line["loss"] - ceiling) < 1e-3 * ceiling for line in recent):
        return (
            f"the loss stays at ln(K) = {ceiling:.3f}, what predicting nothing gives; raise --base_lr, "
            "lower --temperature, or use fewer prototypes (--nmb_prototypes)"
        )
    possible = min(num_prototypes, last["batch"])
    if possible >= 8 and all(line["prototypes_used"] < 0.05 * possible for line in recent):
        return (
            f"only {last['prototypes_used']:.1f} of {possible} possible clusters are predicted; lower "
            "--base_lr, or use fewer prototypes (--nmb_prototypes)"
        )
    return None
