"""Linear support vector machines, many at a time: the minimum that LIBLINEAR approaches, in float64.

For labels y in {1, -1}, with x' = (x, 1) and w' = (w, b), a problem is to minimise

    |w'|^2 / 2 + C sum_i c_i max(0, 1 - y_i w'.x'_i)^2

(Fan et al. 2008, LIBLINEAR, JMLR 9, section 2, the squared hinge; scikit-learn's LinearSVC with
intercept_scaling 1). Problems share the rows and differ in their labels, in C and in the weights c_i, 0
for rows that they leave out. The primal is minimised by Newton's method (Chapelle 2007, Training a
support vector machine in the primal, Neural Computation 19, sections 3 and 4).
"""

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 1e-6  # of the gradient, beside the weights
NEWTON_STEPS = 200
INNER_STEPS = 40  # of conjugate gradients; a problem that needs more is factorised
USUAL_STEPS = 30  # of them, by which the cheaper way is chosen
HALVINGS = 40  # of a Newton step
LARGEST_RESIDUAL = 0.1  # of a Newton step by conjugate gradients, beside the gradient
MOST_PRODUCTS = 16384  # rows whose products with each other are kept: 2 GB


class Rows:
    """Rows (n, D) with a feature of 1 behind them, in float64, and their products with each other."""

    def __init__(self, features: Tensor):
        ones = features.new_ones(len(features), 1, dtype=torch.float64)
        self.x = torch.cat([features.double(), ones], 1)  # (n, D + 1)
        self.products = self.x @ self.x.t() if len(self.x) <= MOST_PRODUCTS else None  # (n, n)
        # A Newton step takes m^3 / 3 operations where m rows are active and their products are
        # factorised, and 4 n D for each step of conjugate gradients.
        self.most_active = int((12 * USUAL_STEPS * self.x.numel()) ** (1 / 3))

    def products_of(self, members: Tensor) -> Tensor:
        """The products (m, m) of the rows `members` with each other."""
        if self.products is not None:
            return self.products[members[:, None], members]
        return self.x[members] @ self.x[members].t()


def solve(
    rows: Rows,
    signs: Tensor,
    costs: Tensor,
    start: Tensor | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """The minima of P problems: (D + 1, P) float64, weights with the intercept behind them.

    signs (n, P): y. costs (n, P): C c_i. start: (D + 1, P) to begin with, 0 by default; the minimum
    for another C is a good one. on_step: called before each Newton step, and may raise.
    A problem is solved when its gradient is at most TOLERANCE (1 + |w'|): as the objective curves by
    at least 1, that bounds the distance to the minimum. Raises RuntimeError where it is not reached.
    """
    x = rows.x
    weights = x.new_zeros(x.shape[1], signs.shape[1]) if start is None else start.clone()
    left = torch.arange(signs.shape[1], device=x.device)  # problems that are not solved
    failed = torch.zeros_like(
        left, dtype=torch.bool
    )  # those that conjugate gradients did not solve
    for _ in range(NEWTON_STEPS):
        if on_step is not None:
            on_step()
        w, y, c = weights[:, left], signs[:, left], costs[:, left]
        slack = 1 - y * (x @ w)  # (n, P)
        active = torch.where(slack > 0, c, 0.0)
        gradient = w - 2 * (x.t() @ (active * y * slack))  # (D + 1, P)
        unsolved = gradient.norm(dim=0) > TOLERANCE * (1 + w.norm(dim=0))
        if not unsolved.any():
            return weights
        left, failed, w, y, c, slack, active, gradient = (
            value[..., unsolved] for value in (left, failed, w, y, c, slack, active, gradient)
        )
        direction = torch.empty_like(w)
        factorised = failed | ((active > 0).sum(0) <= rows.most_active)
        iterated = (~factorised).nonzero()[:, 0]
        if len(iterated):
            direction[:, iterated], reached = _newton_directions(
                x, active[:, iterated], gradient[:, iterated]
            )
            failed[iterated[~reached]] = True
        for i in (factorised | failed).nonzero()[:, 0].tolist():
            direction[:, i] = _newton_direction(rows, active[:, i], gradient[:, i])
        step = _step_lengths(w, direction, slack, y * (x @ direction), c)
        weights[:, left] = w + step * direction
    raise RuntimeError(f"{len(left)} SVMs are not solved after {NEWTON_STEPS} Newton steps")


def _newton_direction(rows, active, gradient):
    """d (D + 1,) with (I + 2 X^T diag(active) X) d = -gradient for one problem, by the products of its
    active rows (the Woodbury identity)."""
    members = active.nonzero()[:, 0]
    own, products = rows.x[members], rows.products_of(members)
    products.diagonal().add_(1 / (2 * active[members]))
    factor = torch.linalg.cholesky(products)
    return own.t() @ torch.cholesky_solve((own @ gradient)[:, None], factor)[:, 0] - gradient


def _newton_directions(x, active, gradient):
    """d (D + 1, P) with (I + 2 X^T diag(active) X) d = -gradient by conjugate gradients, and whether
    each is found to a residual that shrinks with the gradient (P,)."""
    norms = gradient.norm(dim=0)
    goal = norms * norms.sqrt().clamp(max=LARGEST_RESIDUAL)
    direction, residual = torch.zeros_like(gradient), -gradient
    search, square = residual, residual.square().sum(0)
    going = square.sqrt() > goal
    for _ in range(INNER_STEPS):
        curved = search + 2 * (x.t() @ (active * (x @ search)))
        length = torch.where(going, square / (search * curved).sum(0), 0.0)
        direction = direction + length * search
        residual = residual - length * curved
        before, square = square, residual.square().sum(0)
        going = square.sqrt() > goal
        if not going.any():
            break
        search = residual + torch.where(going, square / before, 0.0) * search
    return direction, ~going


def _step_lengths(weights, direction, slack, change, costs):
    """The largest of 1, 1/2, 1/4 ... by which each problem's objective falls enough: (P,)."""
    linear, square = (weights * direction).sum(0), direction.square().sum(0)
    active = costs * slack.clamp(min=0)
    slope = linear - 2 * (active * change).sum(0)  # of the objective along the direction, below 0
    start = (active * slack).sum(0)
    step = torch.ones_like(slope)
    for _ in range(HALVINGS):
        loss = (costs * (slack - step * change).clamp(min=0).square()).sum(0)
        rise = step * linear + step.square() * square / 2 + loss - start
        too_long = rise > 1e-4 * step * slope + 1e-12 * start
        if not too_long.any():
            break
        step = torch.where(too_long, step / 2, step)
    return step


def objective(x: Tensor, weights: Tensor, signs: Tensor, costs: Tensor) -> Tensor:
    """The objectives (P,) of weights (D + 1, P) on rows (n, D + 1), whose last feature is 1."""
    slack = 1 - signs * (x @ weights)  # (n, P)
    return weights.square().sum(0) / 2 + (costs * slack.clamp(min=0).square()).sum(0)
