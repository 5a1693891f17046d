"""How sure a search is: the same again on other rows, or with other seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from lorahub_registry.compose.bench import Bench
from lorahub_registry.compose.learn import learn
from lorahub_registry.errors import DataError, NotApplied
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.progress import Progress
from lorahub_registry.recipes.learned import Learn, LoraHub


def spread_of(
    bench: Bench,
    method: Learn | LoraHub,
    seed: int,
    train: Sequence[Encoded],
    test: Sequence[Encoded],
    *,
    held_out: bool,
    progress: Progress,
) -> dict[str, Any]:
    """The same search on other folds or with other seeds: how far do its answers lie apart.

    Args:
        held_out: nothing was chosen by the rows that a fold leaves out (screening sees them all),
            so that the NLL on them means something.

    Returns:
        ``by`` (``folds`` or ``seeds``); ``runs``, each with its coefficients, objective, number of
        evaluations, reason to stop, NLL on the rows left out (folds) and on the test rows, or
        why it failed; mean and standard deviation over the others of each coefficient and NLL.
    """
    runs = []
    for i in range(method.folds or method.seeds or 0):
        left = [row for n, row in enumerate(train) if method.folds and n % method.folds == i]
        taken = [row for n, row in enumerate(train) if not method.folds or n % method.folds != i]
        scope = f"without fold {i + 1}" if method.folds else "search"
        try:
            with bench.losses(scope, taken) as losses:
                found = learn(
                    losses, size=bench.form.size, rows=len(taken), method=method,
                    seed=seed if method.folds else seed + i, progress=progress,
                )  # fmt: skip
        except (DataError, NotApplied) as error:  # of these rows; the mixture stands without them
            runs.append({"failed": str(error)})
            continue
        run: dict[str, Any] = {
            "coefficients": found.coefficients,
            "objective": min(e.objective for e in found.evaluations),
            "evaluations": len(found.evaluations),
            "stopped": found.stop.reason,
        }
        outside = left if held_out else ()
        for key, name, rows in (("fold_nll", f"fold {i + 1}", outside), ("test_nll", "test", test)):
            if rows:
                with bench.losses(name, rows) as losses:
                    run[key] = next(losses([found.coefficients])).nll
        runs.append(run)
    return {"by": "folds" if method.folds else "seeds", "runs": runs, **_over(runs)}


def _over(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ended = [run for run in runs if "failed" not in run]
    each = list(zip(*(run["coefficients"] for run in ended), strict=True))
    facts: dict[str, Any] = {"coefficients": [_mean_std(values) for values in each]}
    for key in ("fold_nll", "test_nll"):
        if any(key in run for run in ended):
            facts[key] = _mean_std([run[key] for run in ended])
    return facts


def _mean_std(values: Sequence[float]) -> dict[str, float]:
    """Over the finite ones; not a number where there are too few."""
    finite = [value for value in values if math.isfinite(value)]
    return {
        "mean": statistics.fmean(finite) if finite else math.nan,
        "std": statistics.stdev(finite) if len(finite) > 1 else math.nan,
    }
