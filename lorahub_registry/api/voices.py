"""How loud each adapter of a dynamic mixture speaks at each token of one text, and its colours."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

TIE = 1e-6
"""Who is ahead by no more than this is not ahead: it is what float32 leaves of equal gates."""

# Okabe and Ito's, which the colour-blind tell apart, without the black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#7F3C8D")
OTHERS = "#999999"

Line = tuple[float | None, ...]
"""A coefficient for each adapter; None where it does not sit."""


@dataclass(frozen=True)
class Run:
    """Tokens in a row at which the same adapter is the loudest.

    Attributes:
        adapter: its number; None where none is.
        start, stop: of the text's tokens.
        coefficients: each adapter's mean over them.
    """

    adapter: int | None
    start: int
    stop: int
    coefficients: Line


@dataclass(frozen=True)
class Voices:
    """What a dynamic mixture says while it reads one text.

    A token's coefficients are those in force while it is read, so they shape what comes after it.
    The **loudest** adapter at a token is the one with the largest coefficient there, as it is
    applied: nothing is taken off, whatever level a gate started from. A negative coefficient takes
    an adapter off, which is no speaking; where none is above zero, or two are equal, nobody is the
    loudest.

    Attributes:
        adapters: their names.
        tokens: the text, piece by piece; a letter of several tokens stands at the last.
        prompt: how many of them are the prompt's; the rest is the answer.
        layers: layer (``""`` for modules in none) → for each token a coefficient for each adapter,
            the mean over the layer's modules on which it sits; None for tokens that the layer does
            not read, as an encoder does not read the answer.
    """

    adapters: tuple[str, ...]
    tokens: tuple[str, ...]
    prompt: int
    layers: Mapping[str, Sequence[Line | None]]

    def at(self, layers: Collection[str] | None = None) -> list[Line]:
        """Each token's coefficients: the mean over these layers, or over all."""
        chosen = [self.layers[name] for name in (self.layers if layers is None else layers)]
        return [
            mean([line for one in chosen if (line := one[i]) is not None], len(self.adapters))
            for i in range(len(self.tokens))
        ]

    def means(self) -> dict[str, Line]:
        """Layer → each adapter's mean over the tokens that the layer reads."""
        return {
            name: mean([line for line in lines if line is not None], len(self.adapters))
            for name, lines in self.layers.items()
        }

    def matching(self, layer: str) -> list[str]:
        """The layers that are called so: by their whole name or by their number."""
        if layer in self.layers:
            return [layer]
        return [name for name in self.layers if name.rpartition(".")[2] == layer]


def mean(lines: Sequence[Line], adapters: int) -> Line:
    """Each adapter's mean over the lines in which it has a coefficient."""
    found: list[float | None] = []
    for i in range(adapters):
        there = [value for line in lines if (value := line[i]) is not None]
        found.append(sum(there) / len(there) if there else None)
    return tuple(found)


def loudest(line: Line) -> tuple[int | None, float]:
    """(The loudest adapter's number, how far it is ahead of the next, or of zero).

    (None, 0.0) where nobody is the loudest; see :class:`Voices`.
    """
    order = sorted(((value, -i) for i, value in enumerate(line) if value is not None), reverse=True)
    if not order:
        return None, 0.0
    lead = order[0][0] - max(0.0, order[1][0] if len(order) > 1 else 0.0)
    return (-order[0][1], lead) if lead > TIE else (None, 0.0)


def runs(lines: Sequence[Line], *, cut: int = 0) -> list[Run]:
    """The text as runs of tokens with one loudest adapter; none goes over token ``cut``."""
    found = []
    keyed = ((loudest(line)[0], i >= cut) for i, line in enumerate(lines))
    for (adapter, _), group in groupby(enumerate(keyed), key=lambda one: one[1]):
        numbers = [i for i, _ in group]
        own = lines[numbers[0] : numbers[-1] + 1]
        found.append(Run(adapter, numbers[0], numbers[-1] + 1, mean(own, len(own[0]))))
    return found


def strengths(lines: Sequence[Line]) -> list[float]:
    """How strong each token's colour is, 0 to 1: how far its loudest adapter is ahead.

    1 is the text's largest lead. Where one adapter leads from end to end this still shows where
    the others come near.
    """
    leads = [loudest(line)[1] for line in lines]
    most = max(leads, default=0.0)
    return [lead / most if most else 0.0 for lead in leads]


def colours(adapters: int, lines: Iterable[Line]) -> list[str]:
    """A colour for each adapter, #RRGGBB; of more than eight those that lead most, others grey."""
    if adapters <= len(PALETTE):
        return list(PALETTE[:adapters])
    first = [loudest(line)[0] for line in lines]
    ranked = sorted(range(adapters), key=lambda i: (-first.count(i), i))[: len(PALETTE)]
    named = dict(zip(sorted(ranked), PALETTE, strict=True))
    return [named.get(i, OTHERS) for i in range(adapters)]


def shade(colour: str, strength: float) -> str:
    """``colour`` as a ground that black letters are read on: paler, the weaker."""
    part = 0.15 + 0.55 * strength
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - part * (255 - value)):02X}" for value in parts)
