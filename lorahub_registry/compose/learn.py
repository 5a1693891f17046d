"""Coefficients learned on rows: propose, measure, tell, until there is a reason to stop.

The objective of ``learn`` is the rows' token-weighted mean NLL plus ``l1`` times mean |c|. The
preset ``lorahub`` uses the published one: mean cross-entropy of the batch divided by the number
of examples, plus the same term; there the weight of the penalty grows with the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorahub_registry.compose.gradient import follow
from lorahub_registry.compose.objective import Coefficients, Loss, Losses, value
from lorahub_registry.compose.search import ask_and_tell
from lorahub_registry.compose.stopping import Stop, Stopping
from lorahub_registry.errors import DataError, NotApplied
from lorahub_registry.progress import Progress, Task, silent
from lorahub_registry.recipes.learned import GRADIENT, Learn, LoraHub


@dataclass(frozen=True)
class Evaluation:
    """One candidate: its coefficients, the training NLL in nats a token, the objective."""

    coefficients: Coefficients
    nll: float
    objective: float


@dataclass(frozen=True)
class Learned:
    """What a search ended with, everything it tried, in order, and why it stopped.

    Attributes:
        skipped: how many candidates had no finite loss.
    """

    coefficients: Coefficients
    evaluations: tuple[Evaluation, ...]
    stop: Stop
    skipped: int = 0


def learn(
    losses: Losses,
    *,
    size: int,
    rows: int,
    method: Learn | LoraHub,
    seed: int,
    progress: Progress = silent,
) -> Learned:
    """Search ``size`` coefficients.

    ``learn`` ends with the best candidate it saw; ``lorahub`` with the search's recommendation, as
    published.

    Args:
        losses: measures candidates on the rows.
        rows: how many rows there are.

    Raises:
        NotApplied: no candidate gave a number.
        DataError: every candidate has the same loss.
    """
    with progress.task("Learning coefficients", method.budget, "candidate") as task:
        seen = _Seen(losses, method, rows, task)
        stop = seen.stopping.reason
        if isinstance(method, Learn) and method.optimizer == GRADIENT:
            recommended, why = follow(seen.slope, stop, size=size, method=method)
        else:
            recommended, why = ask_and_tell(seen.values, stop, size=size, method=method, seed=seed)
    best = min(seen.all, key=lambda e: e.objective)
    if not math.isfinite(best.objective):
        raise NotApplied(
            "the search saw no finite loss",
            hint="an adapter makes the base overflow: compare them with `lorareg generate`",
        )
    _check_told_apart(seen.all, flat=seen.flat)
    chosen = recommended if isinstance(method, LoraHub) else best.coefficients
    return Learned(chosen, tuple(seen.all), why, seen.skipped)


def check_helps(learned: Learned) -> None:
    """Whether the search ended with a mixture at all.

    Raises:
        NotApplied: it ended with every coefficient at zero.
    """
    if not any(learned.coefficients):
        tried = len(learned.evaluations)
        skipped = f"; {learned.skipped} of {tried} candidates had no finite loss"
        best = min(learned.evaluations, key=lambda e: e.objective)
        raise NotApplied(
            f"no mixture is better on the training rows than the base alone (NLL {best.nll:.3f}"
            f"{skipped if learned.skipped else ''})",
            hint="use the base; or give a larger budget, or adapters nearer to the task",
        )


class _Seen:
    """Every evaluation of one search: counted, watched, and told as the optimizers take it."""

    def __init__(self, losses: Losses, method: Learn | LoraHub, rows: int, task: Task) -> None:
        self._losses, self._method, self._rows, self._task = losses, method, rows, task
        self.all: list[Evaluation] = []
        self.skipped = 0
        self.flat: bool | None = None  # no gradient so far was anything but zero
        self.stopping = Stopping(method)

    def values(self, candidates: Sequence[Coefficients]) -> list[float]:
        """Finite objectives; one that is not a number counts as worse than the worst."""
        self._measured(candidates)
        worst = max((e.objective for e in self.all if math.isfinite(e.objective)), default=0.0)
        return [
            e.objective if math.isfinite(e.objective) else worst + 10
            for e in self.all[-len(candidates) :]
        ]

    def slope(self, candidate: Coefficients) -> tuple[float, np.ndarray]:
        """NLL and gradient; where they are not numbers, a slope that leads back to zero."""
        [found] = self._measured([candidate])
        if found.slope is not None and all(map(math.isfinite, (found.nll, *found.slope))):
            self.flat = not any(found.slope) and self.flat is not False
            return found.nll, np.array(found.slope)
        worst = max((e.nll for e in self.all if math.isfinite(e.nll)), default=0.0)
        return worst + 10, 10 * np.sign(np.array(candidate))

    def _measured(self, candidates: Sequence[Coefficients]) -> list[Loss]:
        found = []
        for c, loss in zip(candidates, self._losses(candidates), strict=True):
            self._add(c, loss)
            found.append(loss)
        return found

    def _add(self, c: Coefficients, loss: Loss) -> None:
        method = self._method
        objective = value(loss.nll, c, l1=method.l1, kind=method.objective, rows=self._rows)
        self.all.append(Evaluation(c, loss.nll, objective))
        self.skipped += not math.isfinite(objective)
        self.stopping.add(objective)
        self._task.describe(f"best {self.stopping.best:.4f}")
        self._task.advance()


def _check_told_apart(seen: Sequence[Evaluation], *, flat: bool | None) -> None:
    """Whether the rows tell any two candidates apart.

    Args:
        flat: every gradient was zero.

    Raises:
        DataError: all losses are equal.
    """
    finite = {e.coefficients: e.nll for e in seen if math.isfinite(e.nll)}
    if flat or (len(finite) > 1 and len(set(finite.values())) == 1):
        why = "the gradient is zero" if flat else f"each of {len(finite)} candidates has it"
        raise DataError(
            "the rows cannot tell the adapters apart: the NLL is the same for all coefficients, "
            f"{next(iter(finite.values())):.4f} ({why})",
            hint="give rows of the task itself; or the adapters are untrained (B is zero)",
        )
