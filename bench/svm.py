"""Linear SVMs of VOC 2007: 5,011 rows of 2,048 features, 11 costs, three folds and all rows.

    python -m bench.svm [--device cuda]

Published: scikit-learn's LinearSVC, one fit after the other, by coordinate descent on the dual to a
tolerance of 1e-4 or 2,000 passes. Ours: src.evaluate.svm_classes, the primal by Newton's method, all
classes of a group and all folds at once, from one cost to the next, to the minimum.
Both sides fit --classes classes: 11 costs, of three folds and of all rows, 44 SVMs a class.

Floor: one Newton step of an SVM with m active rows is m^3 / 3 operations; with 3 steps of 1,000 rows for
each of 44 SVMs 44 GFLOP a class, 0.7 s at 60 GFLOP/s of float64 (2 CPU cores); small costs, of which most
rows are active, take more. Held by ours: the rows in float64 and their products, 82 + 201 MB.
Targets on one thread: 2 times faster for one class, 4 times for a group of five, at objectives that are
not higher.
"""

import warnings

import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from bench.measure import get_parser, median_seconds, parse_args, print_table
from src.evaluate.svm import Rows, objective
from src.evaluate.svm_classes import COSTS, FOLDS, POSITIVE_WEIGHT, fit_group, stratified_folds

SPECTRUM = -0.6  # power by which the directions of the made features fall


def made_rows(num_rows, dim, num_classes):
    """Unit features (n, D), none negative as a ResNet's, and labels (n, C) bool, 7 % of them true."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    sizes = torch.arange(1, dim + 1).float() ** SPECTRUM
    hidden = torch.randn(num_rows, dim, generator=generator) * sizes @ directions
    features = F.normalize((hidden + 0.02).relu(), dim=1)
    scores = (features - features.mean(0)) @ torch.randn(dim, num_classes, generator=generator)
    scores = scores / scores.std(0) + 0.5 * torch.randn(num_rows, num_classes, generator=generator)
    return features.double(), scores > 1.5 * 1.25**0.5


def linear_svcs(features, positive):
    """Weights with intercepts (D + 1,) by class and cost, of all rows, after those of the folds."""
    weights, numbers = {}, features.cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for c in range(positive.shape[1]):
            labels = torch.where(positive[:, c].cpu(), 1, -1).numpy()
            folds = stratified_folds(positive[:, c].cpu()).numpy()
            for cost in COSTS:
                svm = LinearSVC(
                    C=cost,
                    class_weight={1: POSITIVE_WEIGHT, -1: 1},
                    dual=True,
                    tol=1e-4,
                    max_iter=2000,
                )
                for fold in range(FOLDS):
                    svm.fit(numbers[folds != fold], labels[folds != fold])
                svm.fit(numbers, labels)
                whole = [torch.from_numpy(svm.coef_[0]), torch.from_numpy(svm.intercept_)]
                weights[c, cost] = torch.cat(whole).to(features.device)
    return weights


def main(argv=None):
    parser = get_parser(__doc__, repeats=1)
    parser.add_argument("--rows", type=int, default=5011)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument(
        "--classes", type=int, default=1, help="VOC 2007 has 20; 0: ours alone, of 5"
    )
    args = parse_args(parser, smoke={"rows": 120, "dim": 16}, argv=argv)
    num_classes = args.classes or 5
    features, positive = (x.to(args.device) for x in made_rows(args.rows, args.dim, num_classes))
    kept = {}

    def published():
        kept["published"] = linear_svcs(features, positive)

    def ours():
        kept["ours"] = fit_group(Rows(features), positive, COSTS)

    forms = {"scikit-learn": published, "ours": ours} if args.classes else {"ours": ours}
    seconds = median_seconds(list(forms.values()), args.repeats, warmup=0, device=args.device)
    rows = [
        [name, time, seconds[0] / time, 44 * num_classes / time]
        for name, time in zip(forms, seconds, strict=True)
    ]
    title = (
        f"SVMs, {args.rows} x {args.dim}, {num_classes} classes, {len(COSTS)} costs, {args.device}"
    )
    print_table(title, ["form", "seconds", "times faster", "SVMs a second"], rows, args.json)
    if args.classes:
        compare(features, positive, kept)


def compare(features, positive, kept):
    """Print how much higher scikit-learn's objectives are at the cost that ours chose."""
    x, excess = Rows(features).x, []
    for c, cost in enumerate(kept["ours"]["costs"].tolist()):
        signs = torch.where(positive[:, c : c + 1], 1.0, -1.0).double()
        costs = cost * torch.where(positive[:, c : c + 1], POSITIVE_WEIGHT, 1.0).double()
        weights = [kept["published"][c, cost], kept["ours"]["weights"][:, c].to(x.device)]
        theirs, own = (objective(x, w[:, None], signs, costs).item() for w in weights)
        excess.append(theirs / own - 1)
    print(f"their objective is higher by {min(excess):.1e} to {max(excess):.1e} of ours")


if __name__ == "__main__":
    main()
