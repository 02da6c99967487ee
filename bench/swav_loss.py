"""SwAV loss, forward and backward: 8 crops x 64 images, 3000 prototypes.

Floor: the scores are read once and their gradient written once, 6 MB each; on a CPU the time is that
of one exponential per score. The published form computes a log-softmax for each of the 14 pairs.

    python -m bench.swav_loss [--device cuda]
"""

import torch
import torch.nn.functional as F

from bench.measure import get_parser, median_seconds, parse_args, peak_megabytes, print_table
from src.losses import swapped_cross_entropy

NUM_CROPS = 8


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


def main(argv=None):
    parser = get_parser(__doc__, repeats=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prototypes", type=int, default=3000)
    args = parse_args(parser, smoke={"batch": 4, "prototypes": 30}, argv=argv)
    torch.manual_seed(0)
    shape = (args.batch, args.prototypes)
    scores = torch.rand(NUM_CROPS * args.batch, args.prototypes, device=args.device) * 2 - 1
    scores.requires_grad_()
    assignments = [torch.softmax(torch.rand(shape, device=args.device) * 20, 1) for _ in range(2)]

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
    title = f"SwAV loss forward + backward, {NUM_CROPS} x {args.batch} x {args.prototypes}"
    print_table(title, header, rows, args.json)


if __name__ == "__main__":
    main()
