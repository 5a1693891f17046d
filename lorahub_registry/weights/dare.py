"""DARE, Drop And REscale (arXiv:2311.03099): which entries of a delta stay, and by what they grow.

Random masks are counters: entry i of the tensor called ``name`` takes the i-th 32 bits of a stream
that is begun anew, from the seed, the name and the number of the chunk, every 2²⁰ entries. So they
depend on neither shards, order, blocks of rows, threads nor device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.random import SFC64
from numpy.typing import NDArray

from lorahub_registry.errors import UsageError

Strategy = Literal["random", "magnitude"]
CHUNK = 1 << 20
"""Entries between two seeds of a random mask: a change of it changes every mask."""
PIECE = 1 << 17
"""Entries that are worked on at a time: what a core's cache holds of them in float32."""

_WORDS = 1 << 32  # values that an entry's 32 bits take
Deltas = Callable[[], Iterator[torch.Tensor]]
"""A tensor's delta from its first entry to its last: flat float32 pieces, anew for every call."""


@dataclass(frozen=True)
class Limit:
    """What stays by magnitude: all above ``size``, and those of this very size before ``first``.

    Attributes:
        size: of the smallest that stay.
        first: the index of the first entry of that size that does not stay.
    """

    size: float
    first: int

    def mask(self, delta: torch.Tensor, begin: int) -> torch.Tensor:
        """Which of the flat ``delta`` stay, bool; entry ``begin`` of the tensor is its first."""
        sizes = delta.abs()
        if self.first <= begin:
            return sizes > self.size
        kept = sizes >= self.size
        if self.first < begin + delta.numel():
            rest = slice(self.first - begin, None)
            kept[rest] = sizes[rest] > self.size
        return kept


@dataclass(frozen=True)
class Drop:
    """Which entries of every tensor's delta are dropped.

    Attributes:
        rate: the share of entries that are dropped, in [0, 1).
        strategy: ``random``, each entry with this probability; or ``magnitude``, the smallest of
            every tensor: exactly ``round((1 − rate)·entries)`` stay, of equal ones the first.
        rescale: those that stay are divided by the share that stays, so that under ``random`` the
            mean over seeds is the delta.
        seed: of the random masks.

    Raises:
        UsageError: a rate or a seed that is none.
    """

    rate: float
    strategy: Strategy = "random"
    rescale: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UsageError(
                f"the rate is {self.rate:g}: it has to be in [0, 1)",
                hint="0.85 drops 85% of the entries",
            )
        if self.seed < 0:
            raise UsageError(f"the seed is {self.seed}: it cannot be below 0")

    @property
    def below(self) -> int:
        """An entry stays where its 32 random bits are below this."""
        return max(1, round((1 - self.rate) * _WORDS))

    @property
    def scale(self) -> float:
        """What those that stay are multiplied by."""
        if not self.rescale:
            return 1.0
        # By the probability that is drawn with, which is the asked one to 2⁻³³.
        return _WORDS / self.below if self.strategy == "random" else 1 / (1 - self.rate)

    def limit(self, entries: int, deltas: Deltas) -> Limit | None:
        """What decides over a tensor of so many entries; None where chance alone does."""
        if self.strategy == "random":
            return None
        return _limit(round((1 - self.rate) * entries), entries, deltas)

    def masks(
        self, name: str, begin: int, end: int, limit: Limit | None = None
    ) -> Iterator[tuple[int, int, Callable[[torch.Tensor], torch.Tensor]]]:
        """(first, last, mask) of pieces of the flat tensor, in order, from ``begin`` to ``end``.

        Args:
            name: of the parameter, or the module.
            limit: see :meth:`limit`, for this tensor.

        ``mask`` takes the piece's flat float32 delta and tells which of it stay, bool; it is to be
        called before the next piece is taken.
        """
        if limit is not None:
            for first in range(begin, end, PIECE):
                last = min(first + PIECE, end)
                yield first, last, partial(limit.mask, begin=first)
            return
        for first, last, bits in _words(self.seed, name, begin, end):
            yield first, last, partial(_under, bits=bits, below=self.below)

    def apply(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """``matrix`` with entries dropped and the others rescaled, in place.

        The same entries as where a model is streamed: ``name`` is the parameter's name in the
        loaded model (:attr:`Pair.name`), and the matrix lies as it is stored there.

        Args:
            matrix: [rows, columns] or any other shape, float32, contiguous, on any device.
        """
        self.thin(name, matrix)
        return matrix

    def thin(self, name: str, matrix: torch.Tensor) -> int:
        """What :meth:`apply` does; how many entries stay."""
        flat = matrix.view(-1)

        def pieces() -> Iterator[torch.Tensor]:
            return iter(flat.split(CHUNK))

        limit, kept = self.limit(flat.numel(), pieces), 0
        for first, last, mask in self.masks(name, 0, flat.numel(), limit):
            piece = flat[first:last]
            stays = mask(piece)
            kept += int(torch.count_nonzero(stays))
            piece.mul_(stays).mul_(self.scale)
        return kept


def _under(delta: torch.Tensor, bits: NDArray[np.int32], below: int) -> torch.Tensor:
    if below == _WORDS:
        return torch.ones_like(delta, dtype=torch.bool)
    # The bits are read as signed; numpy compares several times faster than torch.
    return torch.from_numpy(bits < np.int32(below - (1 << 31))).to(delta.device)


def _words(
    seed: int, name: str, begin: int, end: int
) -> Iterator[tuple[int, int, NDArray[np.int32]]]:
    """(first, last, int32 bits) of pieces of the stream from entry ``begin`` to ``end``."""
    for chunk in range(begin // CHUNK, -(-end // CHUNK)):
        text = "\0".join([str(seed), name, str(chunk)]).encode()
        stream = SFC64(int.from_bytes(hashlib.sha256(text).digest(), "big"))
        at, stop = chunk * CHUNK, min(end, (chunk + 1) * CHUNK)
        while at < stop:
            last = min(at + PIECE, stop)
            # The stream has no way to skip: what lies before ``begin`` is drawn, too.
            raw = stream.random_raw((last - at + 1) // 2).view(np.int32)
            first = max(at, begin)
            if first < last:
                yield first, last, raw[first - at : last - at]
            at = last


def _limit(keep: int, entries: int, deltas: Deltas) -> Limit:
    """What lets exactly ``keep`` entries stay: a histogram of sizes in two steps, without a sort.

    The bits of floats that are not negative, read as whole numbers, are in the floats' own order.
    """
    if keep == 0:
        return Limit(math.inf, 0)
    if keep == entries:
        return Limit(0.0, entries)
    high = torch.zeros(1 << 15, dtype=torch.int64)
    for delta in deltas():
        high += _counts(_bits(delta) >> 16, 1 << 15)
    top, left = _bin(high, keep)
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for delta in deltas():
        bits = _bits(delta)
        low += _counts(bits[bits >> 16 == top] & 0xFFFF, 1 << 16)
    bottom, left = _bin(low, left)
    size = float(torch.tensor(top << 16 | bottom, dtype=torch.int32).view(torch.float32))
    if left == int(low[bottom]):
        return Limit(size, entries)
    at = 0
    for delta in deltas():
        equal = np.flatnonzero(_bits(delta) == (top << 16 | bottom))
        if left < equal.size:
            return Limit(size, at + int(equal[left]))
        left -= equal.size
        at += delta.numel()
    raise AssertionError("the deltas changed between two readings")


def _bits(delta: torch.Tensor) -> NDArray[np.int32]:
    """As numpy's, which takes half of torch's time to select."""
    bits: NDArray[np.int32] = delta.abs().cpu().numpy().view(np.int32)
    return bits


def _counts(values: NDArray[np.int32], bins: int) -> torch.Tensor:
    return torch.bincount(torch.from_numpy(values), minlength=bins)


def _bin(counts: torch.Tensor, keep: int) -> tuple[int, int]:
    """The bin that the ``keep``-th largest is in, and how many of that bin stay."""
    above = counts.flip(0).cumsum(0)  # of this bin and those above it
    place = int((above < keep).sum())
    before = int(above[place - 1]) if place else 0
    return counts.numel() - 1 - place, keep - before
