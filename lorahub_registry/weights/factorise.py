"""Low-rank factors of many matrices, one at a time, into one adapter file; goes on where it was."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.tensors import WEIGHTS_NAME
from lorahub_registry.errors import UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.weights.files import factor_keys
from lorahub_registry.weights.lowrank import LowRank, effective_rank
from lorahub_registry.weights.ranks import Ranks, Spectrum, allocate
from lorahub_registry.weights.stream.part import Part
from lorahub_registry.weights.stream.shards import Planned, Shards

Saved = tuple[Planned, Callable[[], torch.Tensor]]
"""One more tensor of the file, and what reads it."""

_FACTORS = ".factors"


@dataclass(frozen=True)
class Cut:
    """A module's ΔW, cut to a rank.

    Attributes:
        delta: in the dtype to write, on the CPU; rank 0 where ΔW is zero.
        norm: ‖ΔW‖.
        lost: ‖ΔW − B·A‖² of the factors as they are written.
        values: singular values of what was kept, descending, before it was rounded to its dtype.
        more: what else the report tells.
    """

    delta: LowRank
    norm: float
    lost: float
    values: torch.Tensor
    more: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """One module's ΔW.

    Attributes:
        shape: (fan_out, fan_in).
    """

    module: str
    kind: Literal["linear", "embedding"]
    shape: tuple[int, int]

    def cut(self, rank: int | None, energy: float | None) -> Cut:
        """The nearest of this rank, or of the smallest rank that keeps this share of energy.

        With neither, all of it; of rank 0, nothing.
        """

    def spectrum(self, count: int) -> torch.Tensor:
        """The leading singular values, at most ``count``: float64, descending."""


def factorise(
    sources: Sequence[Source],
    ranks: Ranks,
    dtype: torch.dtype,
    part: Part,
    *,
    title: str,
    progress: Progress = silent,
) -> dict[str, dict[str, Any]]:
    """Factors of every module into the part's folder, for :func:`assemble`.

    Returns:
        Module → ``kind``, ``shape`` of ΔW, ``rank``, ``norm`` of ΔW, ``kept`` (share of its
        energy), ``error`` (share of its norm; of what is written, rounding included),
        ``effective_rank`` and ``singular_values`` of what was kept.

    Raises:
        UsageError: a size that holds no rank.
    """
    (part.folder / _FACTORS).mkdir(exist_ok=True)
    chosen = _ranks(sources, ranks, dtype, part, progress)
    with progress.task(title, len(sources), "module") as task:
        for number, source in enumerate(sources):
            path = part.folder / _FACTORS / f"{number}.safetensors"
            if source.module not in part.done or not path.is_file():
                task.describe(source.module)
                rank = None if chosen is None else chosen.get(source.module, 0)
                cut = source.cut(rank, ranks.energy)
                _keep(path, cut.delta)
                part.mark(source.module, _facts(source, cut))
                part.flush()
            task.advance()
    return {source.module: part.done[source.module] for source in sources}


def assemble(
    part: Part,
    sources: Sequence[Source],
    facts: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype,
    more: Sequence[Saved] = (),
) -> dict[str, int]:
    """One file of all factors and of what else is saved; each module's rank.

    A module without a rank is left out.
    """
    layout: list[Planned] = []
    for source in sources:
        rank = facts[source.module]["rank"]
        if rank:
            a, b = factor_keys(source.module, source.kind)
            layout.append(Planned(a, dtype, (rank, source.shape[1])))
            layout.append(Planned(b, dtype, (source.shape[0], rank)))
    layout += [planned for planned, _ in more]
    with Shards(part.folder, {WEIGHTS_NAME: layout}, {WEIGHTS_NAME: {"format": "pt"}}) as shards:
        for number, source in enumerate(sources):
            if facts[source.module]["rank"]:
                factors = load_file(part.folder / _FACTORS / f"{number}.safetensors")
                for key, side in zip(factor_keys(source.module, source.kind), "ab", strict=True):
                    shards.put(key, factors[side])
        for planned, read in more:
            shards.put(planned.name, read())
        shards.finish()
    return {s.module: facts[s.module]["rank"] for s in sources if facts[s.module]["rank"]}


def nothing(shape: tuple[int, int]) -> LowRank:
    """Factors of rank 0."""
    return LowRank(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0))


def singular_values(delta: LowRank) -> torch.Tensor:
    """Of factors that share them evenly and whose columns and rows are orthogonal."""
    return (delta.a.norm(dim=1) * delta.b.norm(dim=0)).double().cpu().sort(descending=True).values


def _ranks(
    sources: Sequence[Source], ranks: Ranks, dtype: torch.dtype, part: Part, progress: Progress
) -> dict[str, int] | None:
    """Module → its rank; None where each module's own energy decides, or all of it stays."""
    if ranks.energy is not None or ranks.rank == "full":
        return None
    least = {s.module: min(s.shape) for s in sources}
    if ranks.rank is not None:
        return {name: min(int(ranks.rank), full) for name, full in least.items()}
    assert ranks.max_bytes is not None
    cost = {s.module: sum(s.shape) * dtype.itemsize for s in sources}
    if ranks.max_bytes < min(cost.values()):
        raise UsageError(
            f"{ranks.max_bytes} bytes hold no rank of any module: the cheapest takes "
            f"{min(cost.values())}",
            hint="raise --max-size",
        )
    deep = 4 * max(1, ranks.max_bytes // sum(cost.values()))
    known = {name: min(deep, full) for name, full in least.items()}
    todo = list(sources)
    spectra: dict[str, Spectrum] = {}
    while True:
        with progress.task("Spectra", len(todo), "module") as task:
            for source in todo:
                mark = f"{source.module} to {known[source.module]}"
                if mark not in part.done:
                    part.mark(mark, source.spectrum(known[source.module]).tolist())
                    part.flush()
                values = [v for v in part.done[mark] if v > 0]
                whole = len(values) < known[source.module] or len(values) == least[source.module]
                spectra[source.module] = Spectrum(values, cost[source.module], whole)
                task.advance()
        found, short = allocate(spectra, ranks.max_bytes)
        if not short:
            return found
        todo = [s for s in sources if s.module in short]
        known |= {name: min(2 * known[name], least[name]) for name in short}


def _facts(source: Source, cut: Cut) -> dict[str, Any]:
    share = cut.lost / cut.norm**2 if cut.norm else 0.0
    return {
        "kind": source.kind,
        "shape": list(source.shape),
        "rank": cut.delta.rank,
        "norm": cut.norm,
        "kept": max(0.0, 1 - share),
        "error": math.sqrt(share),
        "effective_rank": effective_rank(cut.values),
        **cut.more,
        "singular_values": cut.values.tolist(),
    }


def _keep(path: Path, delta: LowRank) -> None:
    save_file({"a": delta.a.contiguous(), "b": delta.b.contiguous()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
