"""A linear probe of frozen features: multinomial logistic regression to its optimum, in seconds.

For small labelled sets that are looked at while a network trains; eval_linear.py has the published
protocols.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dist

PENALTY = 1e-3  # of the squared weights, beside the mean cross-entropy
ITERATIONS = 200


def linear_accuracy(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor) -> float:
    """Top-1 (%) on the rows of all processes: the same number on all of them, which all call it.

    train (n, D), val (m, D), labels (n,), (m,): of this process. Features are standardised by the
    training rows; the minimum of mean cross-entropy + PENALTY / 2 |W|^2 is found by L-BFGS in float64.
    """
    rows = [dist.all_gather_rows(x.cpu()) for x in (train, train_labels, val, val_labels)]
    return dist.broadcast_object(_fit_and_score(*rows) if dist.is_main() else None)


def _fit_and_score(train, train_labels, val, val_labels):
    train, val = train.double(), val.double()
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a feature that never changes says nothing
    train, val = (train - mean) / std, (val - mean) / std
    num_classes = int(torch.cat([train_labels, val_labels]).max()) + 1
    weight = torch.zeros(num_classes, train.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss():
        solver.zero_grad()
        scores = train @ weight.t() + bias
        value = F.cross_entropy(scores, train_labels) + PENALTY / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    with torch.no_grad():
        predicted = (val @ weight.t() + bias).argmax(1)
    return 100 * (predicted == val_labels).double().mean().item()
