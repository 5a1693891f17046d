"""Which rank each module gets: one for all, by a share of energy, or where a size buys most."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """How ranks are chosen; one of the three.

    Attributes:
        rank: this one everywhere, or ``full``; at most what a module's matrix has.
        energy: the smallest that keeps this share of the module's squared Frobenius norm.
        max_bytes: of all factors together; each rank goes where it keeps most energy per byte.
    """

    rank: int | str | None = None
    energy: float | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class Spectrum:
    """A module's leading singular values, descending, and what one of its ranks costs.

    Attributes:
        whole: no further direction holds anything, or there is none.
    """

    values: Sequence[float]
    cost: int
    whole: bool


def allocate(spectra: Mapping[str, Spectrum], max_bytes: int) -> tuple[dict[str, int], list[str]]:
    """Ranks that keep most energy within ``max_bytes``, and modules whose spectrum was too short.

    Each next rank is the one with the most energy per byte of all that are left and fit. As
    singular values fall, that is the best choice up to what the last rank leaves over. Where a
    module's known values are used up and more may follow, it is named: ask again with more.
    """
    ranks = dict.fromkeys(spectra, 0)
    heap = [(-_worth(s, 0), name) for name, s in spectra.items() if s.values]
    heapq.heapify(heap)
    short, left = [], max_bytes
    while heap:
        worth, name = heapq.heappop(heap)
        spectrum = spectra[name]
        if worth == 0 or spectrum.cost > left:
            continue
        ranks[name] += 1
        left -= spectrum.cost
        if ranks[name] < len(spectrum.values):
            heapq.heappush(heap, (-_worth(spectrum, ranks[name]), name))
        elif not spectrum.whole:
            short.append(name)
    return {name: rank for name, rank in ranks.items() if rank}, sorted(short)


def _worth(spectrum: Spectrum, rank: int) -> float:
    return spectrum.values[rank] ** 2 / spectrum.cost
