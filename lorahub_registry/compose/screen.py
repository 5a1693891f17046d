"""Of many adapters, the few that are worth a search.

First each alone, with coefficient 1, one at a time in memory; then, of the best of these, greedily
the one that gains most beside those kept, at coefficient 1 or 0.5. It is a heuristic of the exact
sum: the search that follows decides about coefficients, and the proof about the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.compat import Member
from lorahub_registry.adapters.facts import AdapterFacts
from lorahub_registry.compose.forms import make_form
from lorahub_registry.compose.journal import Journal, rows_digest
from lorahub_registry.compose.objective import Coefficients, Loss, Losses, Measure
from lorahub_registry.errors import NotApplied
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.tokens import Batch, Encoded
from lorahub_registry.progress import Progress, silent
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.files import load_deltas

_STRENGTHS = (1.0, 0.5)


@dataclass(frozen=True)
class Screened:
    """What screening found.

    Attributes:
        kept: the members that stay, in the recipe's order.
        alone: name → NLL with coefficient 1, in nats a token; infinite where it is no number.
        together: name → NLL of the sum once this adapter was added, in the order of adding.
    """

    kept: tuple[Member, ...]
    alone: dict[str, float]
    together: dict[str, float]


def screen(
    base: LoadedBase,
    members: Sequence[Member],
    rows: Sequence[Encoded],
    keep: int,
    *,
    journal: Journal,
    singles: Losses | None = None,
    progress: Progress = silent,
) -> Screened:
    """Keep the best ``keep`` of ``members`` on these rows.

    The best single adapter is always kept. Where nothing more gains beside those kept, the places
    left go to the next best alone.

    Args:
        singles: measures adapters alone, given by their numbers; None: this process, one by one.

    Raises:
        NotApplied: no adapter alone gives a finite loss.
    """
    single, batches, known = [], base.batches(rows), rows_digest(rows)
    with progress.task("Screening, one by one", len(members), "adapter") as task:
        here = _one_by_one(base, members, batches)
        losses = journal.through(f"alone {known}", singles or here)
        found = losses([(float(i),) for i in range(len(members))])
        for member in members:
            task.describe(member.name)
            nll = next(found).nll
            single.append(nll if math.isfinite(nll) else math.inf)
            task.advance()
    order = [i for i in sorted(range(len(members)), key=single.__getitem__)
             if math.isfinite(single[i])]  # fmt: skip
    if not order:
        raise NotApplied(
            "no adapter alone gives a finite loss on the training rows",
            hint="they make the base overflow: were they made for it?",
        )
    short = order[: max(2 * keep, keep + 4)]
    joint = _greedy(base, [members[i] for i in short], single[short[0]], batches, keep, journal,
                    known, progress)  # fmt: skip
    kept = [short[0], *(short[j] for j, _ in joint)]
    kept += [i for i in short if i not in kept][: keep - len(kept)]
    return Screened(
        tuple(members[i] for i in sorted(kept)),
        {m.name: nll for m, nll in zip(members, single, strict=True)},
        {members[short[j]].name: nll for j, nll in joint},
    )


def alone(model: Any, folder: Path, facts: AdapterFacts, batches: Sequence[Batch]) -> float:
    """The NLL of the rows with one adapter at coefficient 1 on the base."""
    with applied(model, load_deltas(folder, facts)):
        return score(model, batches).mean


def _one_by_one(base: LoadedBase, members: Sequence[Member], batches: Sequence[Batch]) -> Losses:
    def measured(numbers: Sequence[Coefficients]) -> Iterator[Loss]:
        for [number] in numbers:
            member = members[int(number)]
            yield Loss(alone(base.model, member.folder, member.facts, batches))

    return measured


def _greedy(
    base: LoadedBase,
    members: Sequence[Member],
    first: float,
    batches: Sequence[Batch],
    keep: int,
    journal: Journal,
    known: str,
    progress: Progress,
) -> list[tuple[int, float]]:
    """(member, NLL) one after the other; the first of ``members``, whose NLL is given, is in."""
    best, taken = first, list[tuple[int, float]]()
    coefficients: Coefficients = (1.0, *[0.0] * (len(members) - 1))
    form = make_form([(m.folder, m.facts) for m in members], device=base.device)
    with (
        Measure(base.model, form, batches, population=2 * len(members)) as measure,
        progress.task("Screening, together", keep - 1, "adapter") as task,
    ):
        losses = journal.through(f"together {known}", measure, measure.copies)
        while len(taken) + 1 < min(keep, len(members)):
            tried = [
                (j, (*coefficients[:j], strength, *coefficients[j + 1 :]))
                for j, c in enumerate(coefficients)
                if c == 0.0
                for strength in _STRENGTHS
            ]
            found = [loss.nll for loss in losses([c for _, c in tried])]
            values = [nll if math.isfinite(nll) else math.inf for nll in found]
            value, at = min((v, n) for n, v in enumerate(values))
            if not value < best:
                break
            (j, coefficients), best = tried[at], value
            taken.append((j, value))
            task.advance()
    return taken
