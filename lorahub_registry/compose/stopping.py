"""When a search has reached its end: budget, plateau, target, and how it says so."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorahub_registry.recipes.learned import Searched


@dataclass(frozen=True)
class Stop:
    """Why a search ended.

    Attributes:
        reason: ``budget``, ``plateau``, ``target``, or ``converged`` (the optimizer itself had
            nothing more to try).
        text: the same in words.
    """

    reason: str
    text: str


class Stopping:
    """Watches a search's objectives, in order.

    A plateau is ``patience`` candidates in a row none of which was better than the best before
    them by more than ``tolerance``; before the first finite value there is none.

    Attributes:
        best: the least objective so far, infinite before the first.
    """

    def __init__(self, method: Searched) -> None:
        self._method = method
        self.best = self._mark = math.inf
        self._count = self._since = 0

    def add(self, objective: float) -> None:
        """One candidate more."""
        self._count += 1
        self.best = min(self.best, objective)
        if objective < self._mark - self._method.tolerance:
            self._mark, self._since = objective, 0
        else:
            self._since += 1

    def reason(self) -> Stop | None:
        """Why the search is at its end; None while it is not."""
        method = self._method
        if method.target is not None and self.best <= method.target:
            return Stop("target", f"the objective reached {method.target:g}")
        if self._count >= method.budget:
            return Stop("budget", f"the budget of {method.budget} candidates was spent")
        if method.patience and self._since >= method.patience and math.isfinite(self.best):
            return Stop(
                "plateau",
                f"the last {self._since} candidates were no better by more than "
                f"{method.tolerance:g}",
            )
        return None


CONVERGED = Stop("converged", "the optimizer found no direction that gains")
