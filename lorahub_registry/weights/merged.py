"""The rows of a merged weight: ``W + Σ cᵢsᵢBᵢAᵢ`` in float32, rounded once, and what that lost.

Sums are made and rounded on one device, tile by tile: what it holds is the terms and a few tiles.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorahub_registry.errors import BaseModelError, IncompatibleAdapters
from lorahub_registry.weights.lowrank import weighted_sum
from lorahub_registry.weights.stream.adapter import AdapterFile
from lorahub_registry.weights.stream.checkpoint import BLOCK, Checkpoint

TILE = 1 << 18
"""Elements that are computed at once: they stay in the cache, and since every tensor has the same
tiles however it is cut into blocks, neither blocks nor workers change a bit."""


@dataclass(frozen=True)
class Change:
    """What is done to one parameter.

    Attributes:
        module: whose it is, as the report names it.
        turned: its rows are the delta's columns: of Conv1D and embeddings.
        parts: (adapter, module there) of each delta; the adapter by its place among them.
        whole: key of the first adapter's tensor that takes the parameter's place.
        added: key of its tensor that is added, and times what (a bias of LoRA's own).
        magnitude: key of DoRA's magnitudes, [fan_out] (arXiv:2402.09353).
    """

    module: str = field(compare=False)
    turned: bool = False
    parts: tuple[tuple[int, str], ...] = ()
    whole: str | None = None
    added: tuple[str, float] | None = None
    magnitude: str | None = None


@dataclass(frozen=True)
class _Terms:
    left: torch.Tensor | None = None  # [rows, ranks]
    right: torch.Tensor | None = None  # [ranks, columns]
    added: torch.Tensor | None = None  # [rows]
    magnitude: torch.Tensor | None = None  # [rows]; of a turned weight the factor of its [columns]


class Merged:
    """One tensor of the base with its change, made in blocks by several threads.

    Args:
        name: of the base's tensor.
        device: where it is computed; one that has float64.

    Attributes:
        blocks: (begin, end) of its rows; of whole tiles.
    """

    def __init__(
        self,
        source: Checkpoint,
        name: str,
        change: Change,
        adapters: Sequence[AdapterFile],
        device: str = "cpu",
    ) -> None:
        self._source, self._name, self._change = source, name, change
        self._device = device
        self._adapters, self._stored = adapters, source.tensors[name]
        shape = self._stored.shape
        self._tile = max(1, TILE * shape[0] // max(1, self._stored.info.elements))
        step = self._tile * max(1, BLOCK // TILE)
        self.blocks = [(n, min(n + step, shape[0])) for n in range(0, shape[0], step)]
        self._left = len(self.blocks)
        self._lock = threading.Lock()
        self._terms: _Terms | None = None
        self._tiles: dict[int, tuple[float, float, bool]] = {}
        # Float32 holds every number of the narrower types; a float64 base keeps its own.
        self._dtype = torch.promote_types(self._stored.dtype, torch.float32)

    def make(self, begin: int, end: int) -> torch.Tensor:
        """The merged rows, of the base's dtype, on the CPU.

        Raises:
            BaseModelError: the base holds NaN or infinity, or its dtype cannot hold the sum.
            IncompatibleAdapters: DoRA would divide by a norm of zero.
        """
        with self._lock:
            terms = self._terms = self._terms or self._read()
        out = torch.empty((end - begin, *self._stored.shape[1:]), dtype=self._stored.dtype)
        for first in range(begin, end, self._tile):
            last = min(first + self._tile, end)
            self._one(terms, first, last, out[first - begin : last - begin])
        del terms
        with self._lock:
            self._left -= 1
            if not self._left:
                self._terms = None
        return out

    def facts(self) -> dict[str, Any]:
        """The delta's norm, what rounding took of it (relative), and whether any number changed."""
        norm, lost = (math.sqrt(math.fsum(t[i] for t in self._tiles.values())) for i in (0, 1))
        return {
            "module": self._change.module,
            "delta_norm": norm,
            "rounding_error": lost / norm if norm else 0.0,
            "changed": any(changed for *_, changed in self._tiles.values()),
        }

    def _one(self, terms: _Terms, first: int, last: int, out: torch.Tensor) -> None:
        base = self._source.rows(self._name, first, last)
        was = self._wide(base)
        new, delta = self._sum(terms, first, last, was)
        if terms.magnitude is not None:
            if self._change.turned:
                new = new * terms.magnitude
            else:
                norm = torch.linalg.vector_norm(new, dim=1)
                self._divides(norm, first)
                new = new * (terms.magnitude[first:last] / norm)[:, None]
            delta = None
        delta = new - was if delta is None else delta
        rounded = new.to(out.dtype)
        out.copy_(rounded)
        # (rounded − W) − Δ: what the dtype could not hold of the delta.
        error = rounded.to(self._dtype, copy=True).sub_(was).sub_(delta).flatten()
        delta = delta.flatten()
        norm2, error2 = float(torch.dot(delta, delta)), float(torch.dot(error, error))
        if not math.isfinite(norm2 + error2):
            self._explain(base, out)
        # Where no number changed the error is −Δ itself, bit by bit.
        self._tiles[first] = norm2, error2, error2 != norm2

    def _sum(
        self, terms: _Terms, first: int, last: int, was: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sum, and the delta where that is all that is added to the base's rows."""
        if self._change.whole is not None:
            start = self._wide(self._adapters[0].rows(self._change.whole, first, last))
        else:
            start = was
        delta = terms.added[first:last] if terms.added is not None else None
        if terms.left is not None and terms.right is not None:
            delta = terms.left[first:last] @ terms.right
        new = start if delta is None else start + delta
        return new, None if start is not was else delta

    def _read(self) -> _Terms:
        change, adapters = self._change, self._adapters
        left = right = added = magnitude = None
        if change.parts:
            deltas = [{"": adapters[i].delta(module)} for i, module in change.parts]
            both = weighted_sum(deltas, [adapters[i].coefficient for i, _ in change.parts])[""]
            both = both.to("cpu", self._dtype)
            left, right = (both.a.T, both.b.T) if change.turned else (both.b, both.a)
            left, right = (t.contiguous().to(self._device) for t in (left, right))
        if change.added is not None:
            key, factor = change.added
            added = self._wide(adapters[0].rows(key)) * factor
        terms = _Terms(left, right, added)
        if change.magnitude is None:
            return terms
        magnitude = self._wide(adapters[0].rows(change.magnitude)).flatten()
        if change.turned:
            norm = self._column_norms(terms)
            self._divides(norm, 0)
            magnitude = magnitude / norm
        return _Terms(left, right, added, magnitude)

    def _column_norms(self, terms: _Terms) -> torch.Tensor:
        """‖W + ΔW‖ of every column: an output of Conv1D, a dimension of an embedding."""
        total = torch.zeros(self._stored.shape[1], dtype=torch.float64, device=self._device)
        rows = self._stored.shape[0]
        for first in range(0, rows, self._tile):
            last = min(first + self._tile, rows)
            was = self._wide(self._source.rows(self._name, first, last))
            total += self._sum(terms, first, last, was)[0].double().square().sum(0)
            self._source.forget(self._name, first, last)
        return total.sqrt().to(self._dtype)

    def _wide(self, rows: torch.Tensor) -> torch.Tensor:
        """On the device, in the type of the sums; they travel as they are stored."""
        return rows.to(self._device).to(self._dtype)

    def _divides(self, norm: torch.Tensor, first: int) -> None:
        zero = torch.nonzero(norm == 0).flatten()
        if zero.numel():
            what = "column" if self._change.turned else "row"
            raise IncompatibleAdapters(
                f"{self._change.module}: {what} {first + int(zero[0])} of W + ΔW is all zero, and "
                "DoRA divides by its norm",
                hint="PEFT makes NaN of it, too: is it the base that the adapter was trained on?",
            )

    def _explain(self, base: torch.Tensor, out: torch.Tensor) -> None:
        where = f"{self._stored.file}: {self._name}"
        if not torch.isfinite(base.to(self._dtype)).all():
            raise BaseModelError(
                f"{where} holds NaN or infinity",
                hint="its training diverged, or the file is damaged",
            )
        kind = str(out.dtype).removeprefix("torch.")
        raise BaseModelError(
            f"{where}: with the delta added it is beyond what {kind} holds",
            hint="are the coefficients what you mean? A base in bfloat16 holds larger numbers",
        )
