"""Which adapters get into each other's way, from their factors alone.

Of two adapters in one module, V₁ an orthonormal basis of ΔW₁'s row space:

    cosine                    ⟨ΔW₁, ΔW₂⟩ / ‖ΔW₁‖‖ΔW₂‖
    interference of 2 on 1    ‖ΔW₂ V₁‖ / ‖ΔW₁‖         Frobenius norms

For inputs that spread evenly over what ΔW₁ reads, ``‖ΔW₁V₁‖ = ‖ΔW₁‖``, so the interference is how
loud 2 is there, as a multiple of 1's own voice (root mean square). It does not ask where 2 writes:
what it writes outside of ΔW₁'s columns moves the same hidden state.

How far to believe it (``benchmarks/interference.py``: two small models, four adapters each, 24
ordered pairs). The loss that adapter 1's own task gains when 2 is added at full strength, as a
multiple of what 1 had won, has these rank correlations: interference 0.87; the plain ratio of norms
0.89; ‖U₁ᵀ ΔW₂ V₁‖ / ‖ΔW₁‖, which asks for 1's columns too, 0.82; cosine and overlap of subspaces
nothing (0.15 at most). From 0.9 on, a line drawn afterwards, 1 lost all that it had won in ten
pairs of ten; below it in two of fourteen. So it is loudness that hurts. Which of two equally loud
adapters fits better, nothing here tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from lorahub_registry.progress import Progress, silent
from lorahub_registry.weights.inspect import Place
from lorahub_registry.weights.lowrank import Deltas, LowRank

_ZERO = 1e-6  # singular values below this share of the largest are float32's rounding

Both = tuple[float | None, float | None]
"""(felt by the first, felt by the second); None where that one changes nothing."""


@dataclass(frozen=True)
class Meeting:
    """Two adapters in one module.

    Attributes:
        norms: ‖ΔW₁‖, ‖ΔW₂‖.
        inner: ⟨ΔW₁, ΔW₂⟩.
        felt: ‖ΔW₂V₁‖, ‖ΔW₁V₂‖.
    """

    module: str
    norms: tuple[float, float]
    inner: float
    felt: tuple[float, float]

    @property
    def cosine(self) -> float | None:
        """−1 to 1; None where one of them changes nothing."""
        return _cosine(self.inner, self.norms)

    @property
    def interference(self) -> Both:
        """Of the second on the first, and of the first on the second."""
        return _ratio(self.felt[0], self.norms[0]), _ratio(self.felt[1], self.norms[1])


@dataclass(frozen=True)
class Pair:
    """Two adapters of those compared.

    Attributes:
        first, second: their numbers, counted from 0.
        norms: over all modules of each.
        meetings: one for each module that both change, sorted by name.
        alone: how many modules only the first, only the second changes.
    """

    first: int
    second: int
    norms: tuple[float, float]
    meetings: tuple[Meeting, ...]
    alone: tuple[int, int]

    @property
    def cosine(self) -> float | None:
        """Of the adapters as vectors of all entries; a module that one lacks is zero there."""
        return _cosine(math.fsum(m.inner for m in self.meetings), self.norms)

    @property
    def interference(self) -> Both:
        """Over the modules that both change, relative to all that an adapter changes."""
        felt = [math.hypot(*(m.felt[side] for m in self.meetings)) for side in (0, 1)]
        return _ratio(felt[0], self.norms[0]), _ratio(felt[1], self.norms[1])

    def by_layer(self) -> dict[tuple[str, int | None], Both]:
        """(stack, layer) → interference there, relative to what an adapter changes there."""
        layers: dict[tuple[str, int | None], list[Meeting]] = {}
        for meeting in self.meetings:
            place = Place.of(meeting.module)
            layers.setdefault((place.stack, place.layer), []).append(meeting)

        def ratio(there: list[Meeting], side: int) -> float | None:
            felt = math.hypot(*(m.felt[side] for m in there))
            return _ratio(felt, math.hypot(*(m.norms[side] for m in there)))

        order = sorted(layers, key=lambda at: (at[0], -1 if at[1] is None else at[1]))
        return {at: (ratio(layers[at], 0), ratio(layers[at], 1)) for at in order}


def compare(adapters: Sequence[Deltas], *, progress: Progress = silent) -> list[Pair]:
    """Every pair of ``adapters``, the first with the second, with the third, and so on.

    Raises:
        IncompatibleAdapters: a module whose shapes differ.
    """
    norms = [0.0] * len(adapters)
    meetings: dict[tuple[int, int], list[Meeting]] = {
        pair: [] for pair in combinations(range(len(adapters)), 2)
    }
    modules = sorted({name for deltas in adapters for name in deltas})
    with progress.task("Comparing", len(modules), "module") as task:
        for name in modules:
            seen = {i: _Seen(d[name]) for i, d in enumerate(adapters) if name in d}
            for i, one in seen.items():
                norms[i] = math.hypot(norms[i], one.norm)
            for i, j in combinations(seen, 2):
                meetings[i, j].append(_meeting(name, seen[i], seen[j]))
            task.advance()
    return [
        Pair(
            i,
            j,
            (norms[i], norms[j]),
            tuple(found),
            (len(adapters[i]) - len(found), len(adapters[j]) - len(found)),
        )
        for (i, j), found in meetings.items()
    ]


class _Seen:
    """A delta with its row space: ``‖ΔW x‖ = ‖C·Q_aᵀx‖``, as the columns of Q_b are orthonormal."""

    def __init__(self, delta: LowRank) -> None:
        self.delta = delta
        _, core, q_a = delta.core()
        _, s, vh = torch.linalg.svd(core)
        self.norm = float(s.norm())
        self.reads = q_a @ vh[: int((s > _ZERO * s[0]).sum())].T
        self._right = core @ q_a.T

    def felt_by(self, other: _Seen) -> float:
        """``‖ΔW V‖`` with the other's V."""
        return float((self._right @ other.reads).norm())


def _meeting(module: str, one: _Seen, other: _Seen) -> Meeting:
    inner = one.delta.inner(other.delta)
    felt = other.felt_by(one), one.felt_by(other)
    return Meeting(module, (one.norm, other.norm), inner, felt)


def _ratio(value: float, of: float) -> float | None:
    return value / of if of > 0 else None


def _cosine(inner: float, norms: tuple[float, float]) -> float | None:
    size = norms[0] * norms[1]
    return max(-1.0, min(1.0, inner / size)) if size > 0 else None
