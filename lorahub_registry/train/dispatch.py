"""Which micro-batches of many adapters go through the base together.

A pass pads all its rows to the longest. Micro-batches of near lengths are put together, as long as
padding stays a small part of the pass and not more adapters are in it than allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

PADDING = 1.15
"""A pass may be so many times the tokens that its micro-batches have alone."""


class Sized(Protocol):
    """What is known of a micro-batch."""

    @property
    def adapter(self) -> int:
        """Whose it is."""

    @property
    def rows(self) -> int:
        """How many rows."""

    @property
    def width(self) -> int:
        """Positions of its longest row."""

    @property
    def packed(self) -> bool:
        """Whether several rows lie in one."""


Unit = TypeVar("Unit", bound=Sized)


def passes(units: Sequence[Unit], *, tokens: int, together: int | None = None) -> list[list[Unit]]:
    """``units`` in groups, each to be one forward, widest first.

    No two of one adapter are in a group, and packed rows, whose masks are others, not with plain.

    Args:
        tokens: most tokens in a group, padding included; one micro-batch alone may have more.
        together: most adapters in a group; None: no bound.
    """
    groups: list[list[Unit]] = []
    for unit in sorted(units, key=lambda u: -u.width):
        for group in groups:
            if _fits(unit, group, tokens, together):
                group.append(unit)
                break
        else:
            groups.append([unit])
    return groups


def _fits(unit: Unit, group: list[Unit], tokens: int, together: int | None) -> bool:
    # An adapter accumulates its micro-batches so as not to have them in memory at once.
    if any(u.adapter == unit.adapter or u.packed != unit.packed for u in group):
        return False
    padded = (sum(u.rows for u in group) + unit.rows) * group[0].width
    alone = sum(u.rows * u.width for u in group) + unit.rows * unit.width
    few = together is None or len(group) < together
    return few and padded <= min(tokens, PADDING * alone)
