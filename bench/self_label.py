"""SeLa's assignment phase, one process: 20,000 x 128 embeddings shared by 3000 prototypes.

Published: the N x K float64 matrix P is made once and read twice an iteration, 16 bytes of memory
traffic for each entry. Ours, kept: a float32 kernel is read once, 4 bytes. Floor: that, or, where
the cache's speed is less than four times memory's, its conversion and two float64 products there.
Ours, computed anew: floor 2 D operations for each entry and iteration, the product of embeddings
and prototypes. The second table shows that what this holds does not grow with N x K.

    python -m bench.self_label [--device cuda --rows 1281167]
"""

import logging

import torch
import torch.nn.functional as F

from bench.measure import get_parser, median_seconds, parse_args, peak_megabytes, print_table
from src.cluster.self_label import self_labels

TEMPERATURE, EPSILON = 0.1, 0.05


def published_plan(embeddings, prototypes):
    """P = softmax(z^T c / temperature) ^ lambda, (N, K) float64."""
    plan = (embeddings @ prototypes.T).double().div_(TEMPERATURE)
    return plan.softmax(1).pow_(TEMPERATURE / EPSILON)


def published(plan, iterations):
    """Two products with P an iteration; returns labels (N,)."""
    num_rows, num_prototypes = plan.shape
    c = plan.new_full((num_rows,), 1 / num_rows)
    for _ in range(iterations):
        r = 1 / num_prototypes / (plan.T @ c)
        c = 1 / num_rows / (plan @ r)
    return torch.cat([(rows * r).argmax(1) for rows in plan.split(256)])


def clustered(num_rows, num_prototypes, dim, device):
    """Unit rows around 300 directions, and prototypes close to some of them."""
    centres = F.normalize(torch.randn(300, dim, device=device), dim=1)
    noise = torch.randn(num_rows, dim, device=device) / dim**0.5
    rows = F.normalize(centres[torch.randint(300, (num_rows,), device=device)] + noise, dim=1)
    near = rows[torch.randint(num_rows, (num_prototypes,), device=device)]
    return rows, F.normalize(near + torch.randn_like(near) / dim**0.5, dim=1)


def main(argv=None):
    parser = get_parser(__doc__, repeats=1)
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--prototypes", type=int, default=3000)
    parser.add_argument("--iterations", type=int, default=12)
    smoke = {"rows": 400, "dim": 16, "prototypes": 30, "iterations": 4}
    args = parse_args(parser, smoke, argv)
    # These do not converge: no warning.
    logging.getLogger("src.cluster.self_label").setLevel(logging.ERROR)
    torch.manual_seed(0)
    data = clustered(args.rows, args.prototypes, args.dim, args.device)

    def ours(max_bytes, data=data):
        return lambda n: (
            self_labels(
                *data, TEMPERATURE, EPSILON, tolerance=1e-300, max_iterations=n, max_bytes=max_bytes
            ).labels
        )

    forms = {
        "published": lambda n: published(published_plan(*data), n),
        "ours, kernel kept": ours(2**60),
        "ours, computed anew": ours(0),
    }
    # The time of an iteration is that of many less that of two: what comes once is not in it, which
    # is making P and the labels and, of ours, two passes in float64 and the kernel.
    runs = [lambda f=f, n=n: f(n) for f in forms.values() for n in (2, args.iterations)]
    seconds = median_seconds(runs, args.repeats, warmup=0, device=args.device)
    times = [(seconds[i + 1] - seconds[i]) / (args.iterations - 2) for i in (0, 2, 4)]
    labels = [form(args.iterations) for form in forms.values()]
    megabytes = [peak_megabytes(lambda f=f: f(2), args.device) for f in forms.values()]
    rows = []
    for i, name in enumerate(forms):
        agreement = (labels[i] == labels[0]).double().mean().item() * 100
        ratios = times[0] / times[i], seconds[2 * i] - 2 * times[i]
        ratios += megabytes[i], megabytes[i] / megabytes[0]
        rows.append([name, times[i] * 1e3, *ratios, f"{agreement:.3f}"])
    header = ["form", "ms an iteration", "times faster", "s once", "MB", "share", "% same labels"]
    title = f"Assignment of {args.rows} x {args.dim} to {args.prototypes}, {args.device}"
    print_table(title, header, rows, args.json)

    rows = []
    for num_rows in (args.rows // 4, args.rows // 2, args.rows):
        part = ours(0, (data[0][:num_rows], data[1]))
        megabytes = peak_megabytes(lambda part=part: part(2), args.device)
        matrix = num_rows * args.prototypes * 8 / 1e6
        rows.append([num_rows, megabytes, matrix, megabytes / matrix])
    header = ["N", "MB, scores computed anew", "MB of N x K in float64", "ratio"]
    print_table("Memory beyond the input", header, rows, args.json)


if __name__ == "__main__":
    main()
