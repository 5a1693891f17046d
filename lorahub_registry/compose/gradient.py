"""Searches with gradients: the coefficients are few, so one backward pass gives all of theirs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lorahub_registry.compose.objective import Coefficients
from lorahub_registry.compose.stopping import CONVERGED, Stop
from lorahub_registry.recipes.learned import Learn

Slope = Callable[[Coefficients], tuple[float, "np.ndarray"]]
_FLAT = 1e-5
"""L-BFGS-B is at its end when a step gains less than this share of the objective."""
_DELTA_UNIT = 0.3
"""Coefficients of the exact sum are searched in this unit. L-BFGS-B's first step has length one at
most: from zero, one whole adapter overshoots. The factor form, its own start at the average, loses
by it (both measured)."""
_ADAM_STEP, _ADAM_DECAY = 0.1, (0.9, 0.99)


class _Enough(Exception):
    """Ends an optimizer from within."""


def follow(
    slope: Slope, stop: Callable[[], Stop | None], *, size: int, method: Learn
) -> tuple[Coefficients, Stop]:
    """L-BFGS-B or Adam within the bounds, with the L1 term.

    Args:
        slope: a candidate's NLL and its gradient, [size], both finite.
        stop: asked before every evaluation.

    Returns:
        The last point, and why it ended.
    """
    # At zero the factor form is flat, whatever the rows: it starts at the average instead.
    flat = method.form == "factor" and method.init == 0
    start = np.full(size, min(1 / size, method.bounds) if flat else method.init)
    return (_adam if method.gradient == "adam" else _lbfgs)(slope, stop, start, method)


def _lbfgs(
    slope: Slope, stop: Callable[[], Stop | None], start: np.ndarray, method: Learn
) -> tuple[Coefficients, Stop]:
    """L-BFGS-B on c = p − q with p, q ≥ 0, where mean|c| is smooth: mean(p + q)."""
    from scipy.optimize import minimize

    n, last = len(start), start
    unit = _DELTA_UNIT if method.form == "delta" else 1.0

    def objective(scaled: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal last
        if stop() is not None:
            raise _Enough
        pq = scaled * unit
        last = pq[:n] - pq[n:]
        nll, g = slope(tuple(last.tolist()))
        penalty = method.l1 / n
        return nll + penalty * pq.sum(), unit * (np.concatenate([g, -g]) + penalty)

    begin = np.concatenate([start.clip(min=0), (-start).clip(min=0)]) / unit
    try:
        minimize(
            objective, begin, jac=True, method="L-BFGS-B",
            bounds=[(0, method.bounds / unit)] * (2 * n),
            options={"maxfun": method.budget + 1, "maxiter": method.budget + 1, "ftol": _FLAT},
        )  # fmt: skip
    except _Enough:
        pass
    return tuple(last.tolist()), stop() or CONVERGED


def _adam(
    slope: Slope, stop: Callable[[], Stop | None], start: np.ndarray, method: Learn
) -> tuple[Coefficients, Stop]:
    """Adam (arXiv:1412.6980) on the NLL; the L1 term by soft threshold, bounds by clipping."""
    c, mean, square, step = start.copy(), np.zeros_like(start), np.zeros_like(start), 0
    first, second = _ADAM_DECAY
    while (end := stop()) is None:
        _, g = slope(tuple(c.tolist()))
        step += 1
        mean = first * mean + (1 - first) * g
        square = second * square + (1 - second) * g * g
        length = _ADAM_STEP / (np.sqrt(square / (1 - second**step)) + 1e-12)
        c = c - length * mean / (1 - first**step)
        c = np.sign(c) * (np.abs(c) - length * method.l1 / len(c)).clip(min=0)
        c = c.clip(-method.bounds, method.bounds)
    return tuple(c.tolist()), end
