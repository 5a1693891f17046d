"""Learned mixtures: from members and rows to the adapters that stay, their coefficients, their sum.

Screening (which adapters), the search (which coefficients), and the spread (how sure) measure the
same way: in this process, or by workers, always through the journal.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from lorahub_registry.adapters.compat import Member
from lorahub_registry.compose.bench import Bench, Means, singles
from lorahub_registry.compose.enough import check_rows, least_size
from lorahub_registry.compose.learn import Learned, check_helps, learn
from lorahub_registry.compose.screen import Screened, screen
from lorahub_registry.compose.search import check_starts
from lorahub_registry.compose.spread import spread_of
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.quiet import one_thread
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.learned import Learn, LoraHub
from lorahub_registry.recipes.model import Recipe
from lorahub_registry.weights.lowrank import Deltas


@dataclass(frozen=True)
class Fitted:
    """A learned mixture.

    Attributes:
        members: those that are in it, in the recipe's order.
        sets: what each set of coefficients is for; one empty name where there is one set.
        pairs: (set, member) of each coefficient, by number.
        mixture: the sum, on the CPU.
        how: in which way candidates were measured, and how many shared a forward.
        spread: see :func:`.spread.spread_of`; None where the recipe asks for none.
        warned: what was told before the search, which the result has to say, too.
    """

    members: tuple[Member, ...]
    learned: Learned
    sets: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    mixture: Deltas
    how: dict[str, Any]
    screened: Screened | None = None
    spread: dict[str, Any] | None = None
    warned: tuple[str, ...] = ()

    def mean(self) -> dict[str, float]:
        """Member → its coefficient, the mean over the sets that it has one in."""
        sets = self.by_set().values()
        return {
            m.name: statistics.fmean(each[m.name] for each in sets if m.name in each)
            for m in self.members
        }

    def notes(self) -> list[str]:
        """What a reader of the result has to know, and nobody was told yet."""
        found = []
        if self.screened:
            kept = {m.name for m in self.members}
            out = [name for name in self.screened.alone if name not in kept]
            some = ", ".join(out[:5]) + (", …" if len(out) > 5 else "")
            found.append(
                f"{len(out)} of {len(self.screened.alone)} adapters were screened out: {some}"
            )
        if self.learned.skipped:
            tried = len(self.learned.evaluations)
            found.append(f"{self.learned.skipped} of {tried} candidates had no finite loss")
        return found

    def by_set(self) -> dict[str, dict[str, float]]:
        """Set → member → coefficient; of the members that have one of its modules."""
        found: dict[str, dict[str, float]] = {name: {} for name in self.sets}
        for (g, i), c in zip(self.pairs, self.learned.coefficients, strict=True):
            found[self.sets[g]][self.members[i].name] = c
        return found


def fit(
    recipe: Recipe,
    members: Sequence[Member],
    base: LoadedBase,
    train: Sequence[Encoded],
    test: Sequence[Encoded] = (),
    *,
    means: Means | None = None,
    progress: Progress = silent,
) -> Fitted:
    """Learn the coefficients of ``recipe``.

    Args:
        test: held-out rows, on which the spread is told, too; nothing is chosen by them.

    Raises:
        NotApplied: no finite loss, or nothing is better than the base.
        DataError: too few rows, or rows that tell no candidates apart.
        RecipeError: the optimizer cannot run here, or takes no such size or budget.
    """
    method, means = recipe.method, means or Means()
    assert isinstance(method, Learn | LoraHub)
    tokens = sum(len(row.output) for row in train)
    least = least_size(method, members)
    check_rows(method, least, len(train), tokens)
    screened = None
    if method.screen is not None and method.screen.keep < len(members):
        # Screening costs a pass for every adapter; in vain where no search can follow.
        check_starts(method, size=least, seed=recipe.seed)
        with (
            one_thread() if means.jobs else nullcontext(),
            singles(recipe, base, members, train, means) as losses,
        ):
            screened = screen(
                base, members, train, method.screen.keep, journal=means.journal, singles=losses,
                progress=progress,
            )  # fmt: skip
        members = screened.kept
    with Bench(recipe, base, members, means) as bench:
        if means.jobs and means.jobs > 1 and not bench.parallel:
            where = "after screening" if screened else "here"
            progress.warn(
                f"--jobs {means.jobs} is of no use {where}: the search proposes one candidate at a "
                "time (num_workers: 1)"
            )
        warned = check_rows(method, bench.form.size, len(train), tokens)
        for text in warned:
            progress.warn(text)
        with bench.losses("search", train) as losses:
            learned = learn(
                losses, size=bench.form.size, rows=len(train), method=method, seed=recipe.seed,
                progress=progress,
            )  # fmt: skip
        how = bench.how  # of these rows: the spread measures others
        check_helps(learned)
        spread = None
        if method.folds or method.seeds:
            spread = spread_of(
                bench, method, recipe.seed, train, test, held_out=screened is None,
                progress=progress,
            )  # fmt: skip
        mixture = bench.mixture(learned.coefficients)
    return Fitted(
        tuple(members),
        learned,
        bench.form.sets,
        bench.form.pairs,
        mixture,
        how,
        screened,
        spread,
        warned,
    )
