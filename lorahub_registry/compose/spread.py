"""How sure a search is: the same again on other rows, or with other seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from lorahub_registry.compose.bench import Bench
from lorahub_registry.compose.learn import learn
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.progress import Progress
from lorahub_registry.recipes.learned import Learn, LoraHub


def spread_of(
    bench: Bench,
    method: Learn | LoraHub,
    seed: int,
    train: Sequence[Encoded],
    test: Sequence[Encoded],
    progress: Progress,
) -> dict[str, Any]:
    """The same search on other folds or with other seeds: how far do its answers lie apart.

    Returns:
        ``by`` (``folds`` or ``seeds``); ``runs``, each with its coefficients, objective, number of
        evaluations, reason to stop, NLL on the rows left out (folds) and on the test rows; mean
        and standard deviation over the runs of each coefficient and NLL.
    """
    runs = []
    for i in range(method.folds or method.seeds or 0):
        left = [row for n, row in enumerate(train) if method.folds and n % method.folds == i]
        taken = [row for n, row in enumerate(train) if not method.folds or n % method.folds != i]
        scope = f"without fold {i + 1}" if method.folds else "search"
        with bench.losses(scope, taken) as losses:
            found = learn(
                losses, size=bench.form.size, rows=len(taken), method=method,
                seed=seed if method.folds else seed + i, progress=progress,
            )  # fmt: skip
        run: dict[str, Any] = {
            "coefficients": found.coefficients,
            "objective": min(e.objective for e in found.evaluations),
            "evaluations": len(found.evaluations),
            "stopped": found.stop.reason,
        }
        for key, name, rows in (("fold_nll", f"fold {i + 1}", left), ("test_nll", "test", test)):
            if rows:
                with bench.losses(name, rows) as losses:
                    run[key] = next(losses([found.coefficients])).nll
        runs.append(run)
    return {"by": "folds" if method.folds else "seeds", "runs": runs, **_over(runs)}


def _over(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    each = list(zip(*(run["coefficients"] for run in runs), strict=True))
    facts: dict[str, Any] = {"coefficients": [_mean_std(values) for values in each]}
    for key in ("fold_nll", "test_nll"):
        if key in runs[0]:
            facts[key] = _mean_std([run[key] for run in runs])
    return facts


def _mean_std(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values)}
