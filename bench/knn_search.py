"""k-NN of 10,000 queries among 50,000 features of 384 dimensions, for k = 10, 20, 100 and 200.

    python -m bench.knn_search [--device cpu|cuda]

Both sides return the votes of every query for every k. Published: for each k a search of its own,
in 100 chunks of queries: product, topk over all training rows, one-hot labels weighted and summed.
Ours: src.evaluate.knn.knn_votes, one search for all k.

Floor: the product is 2 x 10,000 x 50,000 x 384 = 384 GFLOP, once (ours) or four times (published),
in float32 2.0 s at 190 GFLOP/s (2 CPU cores) and 6 ms at 60 TFLOP/s (H200). Held at once by ours:
one block of 512 x 50,000 similarities, 102 MB. Targets: 2 times faster, within 500 MB.
"""

import torch
import torch.nn.functional as F

from bench.measure import get_parser, median_seconds, parse_args, peak_megabytes, print_table
from src.evaluate.knn import knn_votes

KS = [10, 20, 100, 200]
TEMPERATURE = 0.07
NUM_CLASSES = 1000


def published_votes(train, labels, queries, k):
    """Votes (M, num_classes) by the published formulation, for one k."""
    train, votes = train.T, []
    rows = max(1, len(queries) // 100)
    buffer = torch.empty(rows * k, NUM_CLASSES, device=train.device)
    for chunk in queries.split(rows):
        similarities, indices = (chunk @ train).topk(k, largest=True, sorted=True)  # (B, k)
        near = labels.expand(len(chunk), -1).gather(1, indices)
        one_hot = buffer[: len(chunk) * k].zero_()
        one_hot.scatter_(1, near.reshape(-1, 1), 1)
        weights = (similarities / TEMPERATURE).exp()
        votes.append((one_hot.view(len(chunk), k, NUM_CLASSES) * weights[:, :, None]).sum(1))
    return torch.cat(votes)


def main(argv=None):
    parser = get_parser(__doc__, repeats=3)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    args = parse_args(parser, smoke={"train": 500, "queries": 100}, argv=argv)
    num_train, num_queries = args.train, args.queries
    generator = torch.Generator().manual_seed(0)
    train, queries = (
        F.normalize(torch.randn(n, 384, generator=generator)).to(args.device)
        for n in (num_train, num_queries)
    )
    labels = torch.randint(NUM_CLASSES, (num_train,), generator=generator).to(args.device)

    def published():
        return [published_votes(train, labels, queries, k) for k in KS]

    def ours():
        return list(knn_votes(train, labels, queries, KS, TEMPERATURE, NUM_CLASSES))

    def searches():
        for k in KS:
            for chunk in queries.split(max(1, num_queries // 100)):
                (chunk @ train.T).topk(k)

    def product():
        for chunk in queries.split(512):
            chunk @ train.T

    differences = [
        ((a - b).abs().max() / b.abs().max()).item()
        for a, b in zip(ours(), published(), strict=True)
    ]
    functions = [published, ours, searches, product]
    times = median_seconds(functions, args.repeats, warmup=1, device=args.device)
    memory = [peak_megabytes(function, args.device) for function in functions[:2]]
    rows = [
        ["four searches (published)", times[0], 1.0, memory[0]],
        ["one search (ours)", times[1], times[0] / times[1], memory[1]],
        ["four searches without votes", times[2], times[0] / times[2], "-"],
        ["one product without search", times[3], times[0] / times[3], "-"],
    ]
    title = f"k-NN votes, {num_queries} queries among {num_train}, k = {KS}, {args.device}"
    print_table(title, ["form", "seconds", "times faster", "peak MB"], rows, args.json)
    print(f"votes differ by at most {max(differences):.1e} of the largest vote")


if __name__ == "__main__":
    main()
