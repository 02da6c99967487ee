"""What DeepCluster and DeeperCluster do around k-means: PCA-whitening, and the uniform sampler.

    python -m bench.deeper_clustering [--device cuda]

(a) PCA to 256 of 10,000 rows of 2048 entries, and their whitened, normalised rows. Plain: a centred
copy of all features, its covariance, numpy.linalg.eigh, a product, a norm; in float32, as published,
and in float64, as precise as ours. Ours reads blocks and adds them up exactly, so that any number of
processes finds the same to the bit.
(b) 1.3 million images drawn uniformly from 10,000 clusters. Published: a list of images for each
cluster, made by a loop over the images, then a draw for each. Ours sorts the labels once.

Floor: (a) on one CPU core at 40 GFLOP/s in float64, half of a covariance 1.05 s and the eigenvectors
about 1.3 s; the projection 0.13 s at 80 GFLOP/s in float32; (b) a sort of the labels, 0.07 s.
Targets: (a) at most twice the time of float32, in memory that does not grow with the rows: 40 D^2
bytes and a block, where the plain form holds another copy of the features (two in float64);
(b) 2 times faster.
"""

import tracemalloc

import numpy as np
import torch

from bench.measure import get_parser, median_seconds, parse_args, peak_megabytes, print_table
from src.cluster.pca import fit_whitening, whiten
from src.labels.sampling import uniform_over_clusters


def plain_fit(features, dim, dtype):
    rows = features.cpu().numpy().astype(dtype)
    mean = rows.mean(0)
    rows = rows - mean
    values, vectors = np.linalg.eigh(np.dot(rows.T, rows) / len(rows))
    values = np.maximum(values, values.max() * 1e-5)[::-1][:dim]
    return mean, vectors[:, ::-1][:, :dim] / np.sqrt(values)


def plain_whiten(features, mean, components):
    rows = (features.cpu().numpy() - mean) @ components
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def published_sampler(labels, total, rng):
    """A list of images per cluster, as the assignments are kept there, and a draw from each."""
    images = [[] for _ in range(labels.max() + 1)]
    for image in range(len(labels)):
        images[labels[image]].append(image)
    images = [members for members in images if members]
    share = int(total / len(images)) + 1
    drawn = np.zeros(share * len(images))
    for i, members in enumerate(images):
        of_cluster = rng.choice(members, share, replace=len(members) <= share)
        drawn[i * share : (i + 1) * share] = of_cluster
    rng.shuffle(drawn)
    return drawn[:total].astype("int")


def held(form, device):
    """Peak of the memory of tensors and of numpy's arrays, in 1e6 bytes, beyond what was there."""
    tensors = peak_megabytes(form, device)
    tracemalloc.start()
    form()
    arrays = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return tensors + arrays


def report(title, forms, repeats, difference, json_file, device="cpu"):
    seconds = median_seconds(list(forms.values()), repeats, 1, device)
    rows = []
    for (name, form), time in zip(forms.items(), seconds, strict=True):
        rows.append([name, time * 1e3, seconds[0] / time, held(form, device), difference(form())])
    header = ["form", "ms", "times faster", "MB held", "difference from ours"]
    print_table(title, header, rows, json_file)


def main(argv=None):
    parser = get_parser(__doc__, repeats=3)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--images", type=int, default=1_300_000)
    parser.add_argument("--clusters", type=int, default=10_000)
    smoke = {"rows": 500, "size": 32, "dim": 8, "images": 2000, "clusters": 20}
    args = parse_args(parser, smoke, argv)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(args.rows, args.size, generator=generator).relu()
    features = (features * torch.logspace(0, -1.5, args.size)).to(args.device)

    ours, single = fit_whitening(features, args.dim), plain_fit(features, args.dim, np.float32)
    few = whiten(features[:500], ours).cpu().numpy()

    def off(rows):  # by a Gram matrix, as signs are free
        rows = np.asarray(rows.cpu() if torch.is_tensor(rows) else rows)[:500]
        return f"{np.abs(rows @ rows.T - few @ few.T).max():.1e}"

    def off_fit(fit):
        plain = isinstance(fit, tuple)
        return off(plain_whiten(features, *fit) if plain else whiten(features, fit))

    shape = f"{args.rows} x {args.size}, d = {args.dim}, on {args.device}"
    forms = {
        "plain, float32": lambda: plain_fit(features, args.dim, np.float32),
        "plain, float64": lambda: plain_fit(features, args.dim, np.float64),
        "ours": lambda: fit_whitening(features, args.dim),
    }
    report(f"PCA, fit: {shape}", forms, args.repeats, off_fit, args.json, args.device)
    forms = {
        "plain, float32": lambda: plain_whiten(features, *single),
        "ours": lambda: whiten(features, ours),
    }
    report(f"PCA, whiten: {shape}", forms, 3 * args.repeats, off, args.json, args.device)

    labels = np.random.RandomState(0).randint(0, args.clusters, args.images)
    given = labels, len(labels)
    expected = uniform_over_clusters(*given, np.random.RandomState(31))
    forms = {
        "published": lambda: published_sampler(*given, np.random.RandomState(31)),
        "ours": lambda: uniform_over_clusters(*given, np.random.RandomState(31)),
    }
    title = f"uniform sampler: {args.images} images, {args.clusters} clusters"
    report(title, forms, args.repeats, lambda x: int((x != expected).sum()), args.json)


if __name__ == "__main__":
    main()
