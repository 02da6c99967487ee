"""Sinkhorn-Knopp for two crops of 4096 x 3000 scores (the paper's section 3.1 reports 35 ms on a V100).

Floor: one exponential of B x K is written once, read once per scaling vector (2 x 3) and scaled once:
about 8 passes over 49 MB a crop, or 0.1 ms of an H200's 4.3 TB/s; the published form makes about 39.

    python -m bench.sinkhorn [--device cuda]
"""

import torch

from bench.measure import get_parser, median_seconds, parse_args, peak_megabytes, print_table
from src.cluster.sinkhorn import sinkhorn


def published(scores, epsilon=0.05, iterations=3):
    """The pseudo-code of appendix A.1 with its published normalisations, one process."""
    q = torch.exp(scores / epsilon).t()
    q /= torch.sum(q)
    num_prototypes, batch_size = q.shape
    for _ in range(iterations):
        q /= torch.sum(q, dim=1, keepdim=True)
        q /= num_prototypes
        q /= torch.sum(q, dim=0, keepdim=True)
        q /= batch_size
    q *= batch_size
    return q.t()


def main(argv=None):
    parser = get_parser(__doc__, repeats=15)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--prototypes", type=int, default=3000)
    args = parse_args(parser, smoke={"batch": 64, "prototypes": 30}, argv=argv)
    torch.manual_seed(0)
    shape = (args.batch, args.prototypes)
    crops = [torch.rand(shape, device=args.device) * 2 - 1 for _ in range(2)]
    memory = [torch.empty_like(scores) for scores in crops]
    forms = {
        "published": lambda: [published(scores) for scores in crops],
        "ours, bound known": lambda: [sinkhorn(scores, max_score=1.0) for scores in crops],
        "ours, into given memory": lambda: [
            sinkhorn(scores, max_score=1.0, out=q) for scores, q in zip(crops, memory, strict=True)
        ],
        "ours": lambda: [sinkhorn(scores) for scores in crops],
        "ours, float64": lambda: [sinkhorn(scores, dtype=torch.float64) for scores in crops],
        "ours, epsilon 0.01": lambda: [sinkhorn(scores, 0.01) for scores in crops],
    }
    expected = published(crops[0])
    seconds = median_seconds(list(forms.values()), args.repeats, device=args.device)
    rows = []
    for (name, form), time in zip(forms.items(), seconds, strict=True):
        error = "" if "0.01" in name else f"{(form()[0] - expected).abs().max().item():.1e}"
        extra = peak_megabytes(form, args.device)
        rows.append([name, time * 1e3, seconds[0] / time, extra, error])
    header = ["form", "ms", "times faster", "MB beyond input", "max difference"]
    print_table(f"Sinkhorn, two crops of {args.batch} x {args.prototypes}", header, rows, args.json)


if __name__ == "__main__":
    main()
