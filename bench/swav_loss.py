"""SwAV loss, forward and backward: 8 crops x 64 images, 3000 prototypes.

Floor: the scores are read once and their gradient written once, 6 MB each; on a CPU the time is that
of one exponential per score. The published form computes a log-softmax for each of the 14 pairs.

    python -m bench.swav_loss [--device cuda]
"""

import argparse

import torch
import torch.nn.functional as F

from bench.measure import median_seconds, peak_megabytes, print_table
from src.losses import swapped_cross_entropy


def published(scores, assignments, temperature=0.1):
    """Eq. 6 pair by pair, each with its own log-softmax."""
    num_crops = len(scores) // len(assignments[0])
    batch_size = len(assignments[0])
    loss = 0
    for i, q in enumerate(assignments):
        subloss = 0
        for v in range(num_crops):
            if v != i:
                x = scores[batch_size * v : batch_size * (v + 1)] / temperature
                subloss -= torch.mean(torch.sum(q * F.log_softmax(x, dim=1), dim=1))
        loss += subloss / (num_crops - 1)
    return loss / len(assignments)


def ours(scores, assignments, temperature=0.1):
    views = scores.view(-1, *assignments[0].shape)
    weight = 1 / (2 * (len(views) - 1))
    return swapped_cross_entropy(views, assignments, [0, 1], temperature, weight)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    scores = (torch.rand(8 * 64, 3000, device=args.device) * 2 - 1).requires_grad_()
    assignments = [torch.softmax(torch.rand(64, 3000, device=args.device) * 20, 1) for _ in "01"]

    def step(loss):
        def run():
            loss(scores, assignments).backward()
            gradient, scores.grad = scores.grad, None
            return gradient

        return run

    forms = {"published": step(published), "ours": step(ours)}
    seconds = median_seconds(list(forms.values()), args.repeats, device=args.device)
    expected, rows = forms["published"]().clone(), []
    megabytes = [peak_megabytes(form, args.device) for form in forms.values()]
    for i, (name, form) in enumerate(forms.items()):
        error = (form() - expected).abs().max().item() / expected.abs().max().item()
        ratio, share = seconds[0] / seconds[i], megabytes[i] / megabytes[0]
        rows.append([name, seconds[i] * 1e3, ratio, megabytes[i], share, f"{error:.0e}"])
    header = ["form", "ms", "times faster", "MB", "share of memory", "relative error of gradient"]
    print_table("SwAV loss forward + backward, 8 x 64 x 3000", header, rows)


if __name__ == "__main__":
    main()
