"""What an adapter's weights look like: how large each delta is, and how many directions it uses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from lorahub_registry.progress import Progress, silent
from lorahub_registry.weights.lowrank import Deltas, LowRank, effective_rank


@dataclass(frozen=True)
class Place:
    """Where in a model a module stands, by its name.

    Attributes:
        stack: what stands before the layer's number (``model.layers``); ``""`` without a number.
        layer: the first number in the name; None without one.
        kind: what stands after it (``self_attn.q_proj``), or the whole name.
    """

    stack: str
    layer: int | None
    kind: str

    @classmethod
    def of(cls, module: str) -> Place:
        """Of a dotted name."""
        parts = module.split(".")
        for n, part in enumerate(parts[:-1]):
            if part.isascii() and part.isdigit():
                return cls(".".join(parts[:n]), int(part), ".".join(parts[n + 1 :]))
        return cls("", None, module)


@dataclass(frozen=True)
class ModuleWeights:
    """One module's delta in numbers.

    Attributes:
        rank: of the factors.
        shape: (fan_out, fan_in).
        singular_values: of ΔW, descending, at most ``rank`` many; the leading ones where ΔW is a
            matrix that was cut to this rank.
        norm: Frobenius norm of ΔW.
        effective_rank: see :meth:`LowRank.effective_rank`.
    """

    name: str
    rank: int
    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    norm: float
    effective_rank: float

    @property
    def energy_by_rank(self) -> tuple[float, ...]:
        """Entry r-1: the share of ‖ΔW‖² that its best approximation of rank r keeps."""
        return energy_by_rank([self])


@dataclass(frozen=True)
class Weights:
    """An adapter's deltas in numbers; modules sorted by name."""

    modules: tuple[ModuleWeights, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm over all modules."""
        return math.hypot(*(m.norm for m in self.modules))

    @property
    def effective_rank(self) -> float:
        """The mean module's."""
        return sum(m.effective_rank for m in self.modules) / max(1, len(self.modules))

    @property
    def energy_by_rank(self) -> tuple[float, ...]:
        """Entry r-1: the share of the whole ‖ΔW‖² that stays if every module is cut to rank r."""
        return energy_by_rank(self.modules)


def inspect(deltas: Deltas, *, progress: Progress = silent) -> Weights:
    """Norms, spectra and effective ranks of an adapter, from its factors."""
    with progress.task("Looking at weights", len(deltas), "module") as task:
        modules = []
        for name, delta in sorted(deltas.items()):
            modules.append(_module(name, delta))
            task.advance()
    return Weights(tuple(modules))


@dataclass(frozen=True)
class Row:
    """The modules of one kind through the layers of their stack.

    Attributes:
        label: the shortest end of their names that tells them apart from other kinds.
        layers: the numbers of all layers that are adapted in that stack; (None,) outside of layers.
        modules: the module in each of these layers; None where this kind is not adapted there.
    """

    label: str
    layers: tuple[int | None, ...]
    modules: tuple[str | None, ...]


def by_kind(modules: Iterable[str]) -> list[Row]:
    """Modules as rows of one kind each, sorted by stack and kind."""
    rows: dict[tuple[str, str], dict[int | None, str]] = {}
    layers: dict[str, set[int | None]] = {}
    for name in modules:
        place = Place.of(name)
        rows.setdefault((place.stack, place.kind), {})[place.layer] = name
        if place.layer is not None:
            layers.setdefault(place.stack, set()).add(place.layer)
    labels = _labels(rows)
    made = []
    for (stack, kind), there in sorted(rows.items()):
        columns = [None] if None in there else sorted(layers[stack], key=lambda n: n or 0)
        found = tuple(there.get(layer) for layer in columns)
        made.append(Row(labels[stack, kind], tuple(columns), found))
    return made


def energy_by_rank(modules: Sequence[ModuleWeights]) -> tuple[float, ...]:
    """Shares of the energy of all ``modules`` together, cut to rank 1, 2, …; empty for zeros."""
    total = math.fsum(m.norm**2 for m in modules)
    if not total > 0:
        return ()
    shares, kept = [], 0.0
    for r in range(max(len(m.singular_values) for m in modules)):
        kept += math.fsum(m.singular_values[r] ** 2 for m in modules if r < len(m.singular_values))
        shares.append(min(1.0, kept / total))
    return tuple(shares)


def rank_for(share: float, shares: Sequence[float]) -> int:
    """The smallest rank that keeps this share of the energy; 0 where there is none."""
    return next((r for r, kept in enumerate(shares, 1) if kept >= share - 1e-12), len(shares))


def _labels(kinds: Collection[tuple[str, str]]) -> dict[tuple[str, str], str]:
    ends = Counter((stack, end) for stack, kind in kinds for end in _ends(kind))
    stacks = [set(stack.split(".")) for stack in {stack for stack, _ in kinds if stack}]
    common = set.intersection(*stacks) if stacks else set()
    labels = {}
    for stack, kind in kinds:
        end = next(e for e in _ends(kind) if ends[stack, e] == 1 or e == kind)
        own = [part for part in stack.split(".") if part not in common] if len(stacks) > 1 else []
        labels[stack, kind] = " ".join([".".join(own), end]).strip()
    seen = Counter(labels.values())
    full = {at: f"{at[0]}.*.{at[1]}" for at in kinds if seen[labels[at]] > 1}
    return labels | full


def _ends(kind: str) -> list[str]:
    """``a.b.c`` → c, b.c, a.b.c."""
    parts = kind.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def _module(name: str, delta: LowRank) -> ModuleWeights:
    return replace(of_values(name, delta.shape, delta.singular_values()), rank=delta.rank)


def of_values(name: str, shape: tuple[int, int], values: torch.Tensor) -> ModuleWeights:
    """A module's delta by all of its singular values, descending; its rank is how many."""
    norm, found = float(values.double().norm()), tuple(values.tolist())
    return ModuleWeights(name, len(found), shape, found, norm, effective_rank(values))
