"""Spherical k-means of DeepCluster-v2: 100,000 rows of 128 entries, 3000 clusters.

    python -m bench.kmeans [--device cuda]

(a) One M-step. Published: lists of members from a CSR matrix of the assignments (scipy, and the same
by a sort), then a loop over the clusters, a gather and a sum for each. Ours sorts the rows by cluster
and adds up bags of 8, of a copy of the features that is rounded once per run.
(b) Two iterations and the final assignment. Published: the whole N x K product in each E-step.
(c) With --part peers: ten iterations of Euclidean k-means beside scikit-learn's (Lloyd), of 100 to 3000
clusters, on a CPU, from the same start.

Floor: (a) the features are read once, 51 MB, 5 ms at 10 GB/s; (b) three products of 77 GFLOP, 1.2 s
at 190 GFLOP/s (2 CPU cores) and 4 ms at 60 TFLOP/s (H200). Held by ours beyond the features: a
copy of the features (51 MB), and either a block of scores (8 MB on a CPU) or sums of bags (25 MB).
Targets on two threads: (a) 20 times faster, (b) 1.8 times, within 100 MB.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix

from bench.measure import get_parser, median_seconds, parse_args, peak_megabytes, print_table
from src.cluster.exact_sums import exact_rows, extent, member_sums
from src.cluster.kmeans import assign, euclidean_kmeans, initial_centroids, spherical_kmeans


def members_by_scipy(assignments, num_clusters):
    """The rows of each cluster, from the lines of a CSR matrix."""
    rows = np.arange(len(assignments))
    matrix = csr_matrix((rows, (assignments, rows)), shape=(num_clusters, len(assignments)))
    return [np.unravel_index(line.data, assignments.shape)[0] for line in matrix]


def members_by_sort(assignments, num_clusters):
    """The same lists without scipy, in a tenth of the time."""
    order = np.argsort(assignments, kind="stable")
    return np.split(order, np.bincount(assignments, minlength=num_clusters).cumsum()[:-1])


def published_m_step(features, assignments, centroids, members=members_by_scipy):
    """Normalised means of the members, by a loop over clusters; empty ones keep their centroid."""
    lists = members(assignments.cpu().numpy(), len(centroids))
    counts = torch.zeros(len(centroids), dtype=torch.int32, device=features.device)
    sums = torch.zeros_like(centroids)
    for k, rows in enumerate(lists):
        if len(rows) > 0:
            sums[k] = torch.sum(features[rows], dim=0)
            counts[k] = len(rows)
    kept = counts > 0
    centroids = centroids.clone()
    centroids[kept] = sums[kept] / counts[kept].unsqueeze(1)
    return F.normalize(centroids, dim=1)


def published_kmeans(features, centroids, iterations):
    for step in range(iterations + 1):
        assignments = torch.mm(features, centroids.t()).max(dim=1)[1]
        if step < iterations:
            centroids = published_m_step(features, assignments, centroids)
    return centroids, assignments


def m_step(features, assignments, centroids, exact):
    sums, counts = member_sums(features, exact, assignments, len(centroids))
    means = torch.where(counts[:, None] > 0, sums / counts[:, None], centroids.double())
    return F.normalize(means, dim=1).float()


def main(argv=None):
    parser = get_parser(__doc__, repeats=3)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--clusters", type=int, default=3000)
    parser.add_argument("--part", choices=["m_step", "all", "peers"], default="all")
    args = parse_args(parser, smoke={"rows": 1000, "clusters": 20}, argv=argv)
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(args.rows, 128, generator=generator)).to(args.device)
    if args.part == "peers":
        compare_with_scikit_learn(features, args)
        return
    start = initial_centroids(features, args.clusters, seed=0)
    assignments = assign(features, start, spherical=True)
    reach = extent(features)
    rows = exact_rows(features, *reach)
    given = features, assignments, start
    forms = {
        "published": lambda: published_m_step(*given),
        "published, members by a sort": lambda: published_m_step(*given, members_by_sort),
        "ours": lambda: m_step(*given, rows),
        "ours, and the rounding": lambda: m_step(*given, exact_rows(features, *reach)),
        "ours, plain float64 sums": lambda: m_step(*given, None),
    }
    ours = m_step(*given, rows)
    report("M-step", forms, args, 5 * args.repeats, lambda x: (x - ours).abs().max().item())
    if args.part == "m_step":
        return
    forms = {
        "published": lambda: published_kmeans(features, start, 2)[1],
        "ours": lambda: spherical_kmeans(features, start, 2)[1],
        'ours, empty="reseed"': lambda: spherical_kmeans(features, start, 2, "reseed")[1],
    }
    try:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        forms["faiss"] = lambda: spherical_kmeans(features, start, 2, backend="faiss")[1]
    except ImportError:
        pass
    ours = forms["ours"]()
    report("2 iterations", forms, args, args.repeats, lambda x: (x != ours).float().mean().item())


def compare_with_scikit_learn(features, args):
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    rows = []
    for num_clusters in [k for k in (100, 300, 1000, 3000) if k <= args.clusters]:
        start = initial_centroids(features, num_clusters, seed=0)
        peer = KMeans(num_clusters, init=start.numpy(), n_init=1, max_iter=10, tol=0)

        def ours(start=start):
            return euclidean_kmeans(features, start, 10)[1]

        def theirs(peer=peer):
            with threadpool_limits(torch.get_num_threads()):
                return peer.fit_predict(features.numpy())

        seconds = median_seconds([theirs, ours], args.repeats, 1)
        agree = (torch.from_numpy(theirs()) == ours()).float().mean().item()
        rows.append([num_clusters, *(1e3 * s for s in seconds), seconds[0] / seconds[1], agree])
    header = ["clusters", "scikit-learn ms", "ours ms", "times faster", "same labels"]
    print_table(f"k-means, 10 iterations: {args.rows} x 128", header, rows, args.json)


def report(title, forms, args, repeats, difference):
    seconds = median_seconds(list(forms.values()), repeats, 1, args.device)
    rows = []
    for (name, form), time in zip(forms.items(), seconds, strict=True):
        extra = peak_megabytes(form, args.device)
        rows.append([name, time * 1e3, seconds[0] / time, extra, f"{difference(form()):.1e}"])
    header = ["form", "ms", "times faster", "MB beyond features", "difference from ours"]
    title = f"k-means, {title}: {args.rows} x 128, K = {args.clusters}, {args.device}"
    print_table(title, header, rows, args.json)


if __name__ == "__main__":
    main()
