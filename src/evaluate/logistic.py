"""Multinomial logistic regression to its minimum: L-BFGS in float64, rows shared out to processes.

Minimised is the mean cross-entropy + penalty / (2 n) |W|^2 of n rows, whose minimum is that of
scikit-learn's LogisticRegression(C=1 / penalty). An intercept, where there is one, is not penalised.

L-BFGS works on V = W L, where L L' is the Hessian of a class's weights at the start, on average over the
classes: features of a network vary along few directions, and without that small penalties take hundreds
of steps.
"""

import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dist
from .label_subsets import class_members

logger = logging.getLogger(__name__)

TOLERANCE = 1e-6  # of the loss, beside the loss
STEPS = 20  # of L-BFGS between two looks at the tolerance, at signals, and two saves
MOST_STEPS = 10_000
HISTORY = 10  # pairs of L-BFGS
BLOCK = 2**24  # scores that are held at a time
CPU_BLOCK = 2**18  # features that are worked on at a time on a CPU, in whose cache they stay


class Problem:
    """The loss of the rows of all processes at given weights, and its gradient.

    features (n, D), labels (n,): of this process, n may be 0, on the device; float32 features become
    float64 a block at a time. penalty: as the module says; n is that of all processes.
    Weights are (C, D), or (C, D + 1) with the intercept behind.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, num_classes: int, penalty: float, intercept: bool
    ):
        self.features, self.labels = features, labels
        self.num_rows = int(dist.all_reduce_sum(torch.tensor(len(labels))))
        self.curvature = penalty / self.num_rows  # of the objective, at least
        self.shape = (num_classes, features.shape[1] + intercept)
        self.intercept = intercept
        self.block = max(1, BLOCK // num_classes)
        if features.is_cpu:
            self.block = max(1, min(self.block, CPU_BLOCK // features.shape[1]))

    def loss_and_gradient(self, weights: Tensor) -> tuple[float, Tensor]:
        """Objective and its gradient (C, D): the same on all processes, which all call it."""
        parts = weights.new_zeros(weights.numel() + 1)
        gradient, loss = parts[:-1].view(weights.shape), parts[-1:]
        for rows, labels in zip(
            self.features.split(self.block), self.labels.split(self.block), strict=True
        ):
            if len(rows):
                loss += self._add_block(rows, labels, weights, gradient)
        parts = dist.all_reduce_sum(parts) / self.num_rows
        penalised = weights.clone()
        if self.intercept:
            penalised[:, -1] = 0
        loss = parts[-1] + self.curvature / 2 * penalised.square().sum()
        return loss.item(), parts[:-1].view(weights.shape) + self.curvature * penalised

    def root_of_hessian(self, weights: Tensor) -> Tensor:
        """L (D, D), lower triangular, at some weights; the same on all processes, which all call it.

        The identity where there are no more rows than features, whose Hessian soon is another one, and
        where the penalty is too small beside features that repeat each other.
        """
        width = self.shape[1]
        identity = torch.eye(width, dtype=weights.dtype, device=weights.device)
        if self.num_rows <= width:
            return identity
        hessian = weights.new_zeros(width, width)
        for rows in self.features.split(self.block):
            rows = rows.double()
            likelihood = scores_of(rows, weights, self.intercept).softmax(1)
            spread = (likelihood * (1 - likelihood)).mean(1, keepdim=True)  # (b, 1)
            if self.intercept:
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
            hessian.addmm_((rows * spread).t(), rows)
        hessian = dist.all_reduce_sum(hessian) / self.num_rows
        hessian.diagonal().add_(self.curvature)
        root, failed = torch.linalg.cholesky_ex(hessian)
        return identity if failed else root

    def _add_block(self, rows, labels, weights, gradient):
        """The sum of the cross-entropies of some rows; adds its gradient."""
        rows = rows.double()
        scores = scores_of(rows, weights, self.intercept)  # (b, C)
        logarithms = scores.log_softmax(1)
        own = logarithms.gather(1, labels[:, None])
        residual = logarithms.exp_().scatter_add_(1, labels[:, None], -torch.ones_like(own))
        width = rows.shape[1]
        gradient[:, :width].addmm_(residual.t(), rows)
        if self.intercept:
            gradient[:, width] += residual.sum(0)
        return -own.sum()


def scores_of(features: Tensor, weights: Tensor, intercept: bool) -> Tensor:
    """Scores (n, C) in float64 of features (n, D) by weights as Problem has them."""
    scores = features.double() @ weights[:, : features.shape[1]].t()
    return scores + weights[:, -1] if intercept else scores


def minimise(
    problem: Problem,
    weights: Tensor,
    solver_state: dict | None = None,
    on_steps: Callable[[dict], bool] | None = None,
) -> Tensor | None:
    """Weights (C, D) at the minimum, from given ones; None where on_steps has asked to stop.

    solver_state: what on_steps was given, to go on from there to the last bit. on_steps: called every
    STEPS steps with `point`, V, `solver`, `steps`, `loss` and `excess`, by which the loss is above the
    minimum at most: |gradient|^2 / 2 over the curvature that the penalty makes. The search ends when
    that is TOLERANCE of the loss, or when STEPS steps no longer lower it. All processes call it.
    """
    root = problem.root_of_hessian(weights)
    steps, before, known = 0, math.inf, [None, None]
    if solver_state is not None and "point" not in solver_state:
        solver_state = None  # of a version without L: that fit is begun anew
    if solver_state is not None:
        steps, before = solver_state["steps"], solver_state["before"]
    parameter = torch.nn.Parameter(
        weights @ root if solver_state is None else solver_state["point"]
    )
    solver = torch.optim.LBFGS(
        [parameter],
        max_iter=STEPS,
        max_eval=STEPS * 25,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    if solver_state is not None:
        solver.load_state_dict(solver_state["solver"])

    def closure():
        if known[0] is None or not torch.equal(known[0], parameter.data):
            weights = torch.linalg.solve_triangular(root, parameter.data, upper=False, left=False)
            known[:] = parameter.data.clone(), (weights, *problem.loss_and_gradient(weights))
        _, loss, gradient = known[1]
        gradient = torch.linalg.solve_triangular(root.t(), gradient, upper=True, left=False)
        parameter.grad = gradient.contiguous()
        return loss

    while True:
        loss = closure()
        weights, _, gradient = known[1]
        excess = gradient.square().sum().item() / (2 * problem.curvature)
        if excess <= TOLERANCE * loss or loss >= before:
            return weights
        if steps >= MOST_STEPS:
            logger.warning(
                f"the logistic regression was ended after {steps:,} steps, up to {excess:.2g} above the "
                f"minimum of its loss ({loss:.4g}): use larger penalties"
            )
            return weights
        state = {"point": parameter.data, "solver": solver.state_dict(), "steps": steps}
        state |= {"before": before, "loss": loss, "excess": excess}
        if on_steps is not None and on_steps(state):
            return None
        before = loss
        solver.step(closure)
        steps += STEPS


def held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Which images are held out, (N,) bool: the share of each class, rounded down, at random."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for members in class_members(labels):
        order = torch.randperm(len(members), generator=generator)
        mask[members[order[: int(share * len(members))]]] = True
    return mask


def unit_rows(features: Tensor, device: torch.device) -> Tensor:
    """Features (n, D) of norm 1, float32 on the device."""
    return F.normalize(features.float(), dim=1).to(device)
