"""Health of a contrastive run: how alike are crops of one image, and of different images?"""

import math

import torch

from src import distributed


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
    within, selves = distributed.all_reduce_sum(squares).tolist()
    everything = distributed.all_reduce_sum(images.sum(0)).square().sum().item()
    num_crops, crops_of_image = z[..., 0].numel() * distributed.world_size(), len(z)
    positive = (within - selves) / (num_crops * (crops_of_image - 1))
    negative = (everything - within) / (num_crops * (num_crops - crops_of_image))
    return positive, negative


def diagnose_contrastive(history: list[dict], num_negatives: int) -> str | None:
    """What is wrong with a run, in one sentence that names the flags that help, or None.

    history: the latest log lines, oldest first, with `loss` and `embedding_std`. num_negatives: of a
    crop. Needs 10 lines, all of them in trouble. Identical embeddings give ln(1 + num_negatives).
    """
    recent = history[-10:]
    if len(recent) < 10:
        return None
    last, ceiling = recent[-1], math.log(1 + num_negatives)
    if all(line["embedding_std"] < 0.05 for line in recent):
        return (
            "collapse: all images have the same embedding (standard deviation "
            f"{last['embedding_std']:.3f}, healthy is near 1); lower --base_lr, lengthen "
            "--warmup_epochs, or lower --temperature (0.1)"
        )
    if all(abs(line["loss"] - ceiling) < 1e-3 * ceiling for line in recent):
        return (
            f"the loss stays at ln(1 + {num_negatives}) = {ceiling:.3f}, what identical embeddings "
            "give; lower --temperature (0.1), or change --base_lr"
        )
    return None
