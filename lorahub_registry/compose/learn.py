"""Coefficients learned without gradients: propose, apply, score, tell.

The objective of ``learn`` is the rows' token-weighted mean NLL plus ``l1`` times mean |c|. The
preset ``lorahub`` uses the published one: mean cross-entropy of the batch divided by the number
of examples, plus the same term; there the weight of the penalty grows with the number of rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorahub_registry.compose.forms import Form
from lorahub_registry.errors import NotApplied
from lorahub_registry.evaluate.nll import RowNLL, score
from lorahub_registry.evaluate.tokens import Batch
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.learned import Learn, LoraHub
from lorahub_registry.runtime.apply import Applied


@dataclass(frozen=True)
class Evaluation:
    """One candidate: its coefficients, the training NLL in nats a token, the objective."""

    coefficients: tuple[float, ...]
    nll: float
    objective: float


@dataclass(frozen=True)
class Learned:
    """What a search ended with, and everything it tried, in order."""

    coefficients: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]


def objective(
    nll: RowNLL, coefficients: Sequence[float], l1: float, kind: Literal["token_mean", "published"]
) -> float:
    """What the search makes small; infinite where the model's output is not a number."""
    penalty = l1 * sum(map(abs, coefficients)) / len(coefficients)
    loss = nll.mean if kind == "token_mean" else nll.mean / len(nll.sums)
    return loss + penalty if math.isfinite(loss) else math.inf


def learn(
    model: Any,
    form: Form,
    batches: Sequence[Batch],
    *,
    size: int,
    method: Learn | LoraHub,
    seed: int,
    progress: Progress = silent,
) -> Learned:
    """Search coefficients for ``size`` adapters.

    ``learn`` ends with the best candidate it saw; ``lorahub`` with the search's recommendation, as
    published.

    Raises:
        NotApplied: no candidate gave a number, or none was better than leaving the base alone.
    """
    seen: list[Evaluation] = []

    def evaluate(c: tuple[float, ...]) -> float:
        on.set(form.at(c))
        nll = score(model, batches)
        value = objective(nll, c, method.l1, method.objective)
        seen.append(Evaluation(c, nll.mean, value))
        task.describe(f"best {min(e.objective for e in seen):.4f}")
        task.advance()
        return value

    with (
        Applied(model, form.modules) as on,
        progress.task("Learning coefficients", method.budget, "candidate") as task,
    ):
        recommended = _search(evaluate, size, method, seed)
    best = min(seen, key=lambda e: e.objective)
    if not math.isfinite(best.objective):
        raise NotApplied(
            "the search saw no finite loss",
            hint="an adapter makes the base overflow: compare them with `lorareg generate`",
        )
    chosen = recommended if isinstance(method, LoraHub) else best.coefficients
    if not any(chosen):
        raise NotApplied(
            f"no mixture is better on the training rows than the base alone (NLL {best.nll:.3f})",
            hint="use the base; or give a larger budget, or adapters nearer to the task",
        )
    return Learned(chosen, tuple(seen))


def _search(evaluate: Any, size: int, method: Learn | LoraHub, seed: int) -> tuple[float, ...]:
    """Ask and tell ``budget`` times; what the optimizer recommends in the end."""
    import nevergrad as ng  # takes half a second

    space = ng.p.Array(
        init=[method.init] * size, lower=[-method.bounds] * size, upper=[method.bounds] * size
    )
    space.random_state.seed(seed)
    with warnings.catch_warnings():
        # COBYLA and bounded mutations talk about their own settings; nobody here can act on it.
        warnings.simplefilter("ignore")
        optimizer = ng.optimizers.registry[method.optimizer](
            parametrization=space, budget=method.budget, num_workers=method.num_workers
        )
        told = 0
        while told < method.budget:
            asked = [optimizer.ask() for _ in range(min(method.num_workers, method.budget - told))]
            for candidate in asked:
                optimizer.tell(candidate, evaluate(tuple(float(x) for x in candidate.value)))
            told += len(asked)
        recommended = optimizer.provide_recommendation().value
    return tuple(float(x) for x in recommended)
