"""Adapters that are made module by module: ranks chosen, factors written, checked, indexed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.api.output import check_output, resumable, write_report
from lorahub_registry.api.plot import plot
from lorahub_registry.errors import NotApplied, UsageError
from lorahub_registry.progress import Progress
from lorahub_registry.refs import expand
from lorahub_registry.registry.index import record_of_folder
from lorahub_registry.registry.records import BaseRecord, StoredAdapter
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    import torch

    from lorahub_registry.weights.factorise import Saved, Source
    from lorahub_registry.weights.ranks import Ranks
    from lorahub_registry.weights.stream.part import Part

Modules = Mapping[str, Mapping[str, Any]]
"""Module → its facts, see :func:`lorahub_registry.weights.factorise.factorise`."""

_GOOD = 0.9  # below this share of the energy, a reader is warned


@dataclass(frozen=True)
class Factored:
    """An adapter that was made.

    Attributes:
        report: what ``lorareg.json`` in its folder holds.
    """

    adapter: StoredAdapter
    path: Path
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Beside:
    """What an adapter has besides its factors.

    Attributes:
        told: more of the report.
        tensors: saved along, with PEFT's ``bias`` and ``modules_to_save`` that name them.
    """

    told: Mapping[str, Any]
    tensors: Sequence[Saved] = ()
    bias: str = "none"
    modules_to_save: Sequence[str] = ()


def write_factored(
    out: Path,
    sources: Sequence[Source],
    ranks: Ranks,
    dtype: torch.dtype,
    facts: Mapping[str, Any],
    *,
    base: BaseRecord,
    task_type: str,
    title: str,
    key: Mapping[str, Any],
    made_of: Sequence[Path],
    all_modules: Collection[str] = (),
    fan_in_fan_out: bool = False,
    known: Mapping[str, Any] | None = None,
    beside: Callable[[Part, Modules], Beside] = lambda part, modules: Beside({}),
    plot_to: Path | None = None,
    force: bool,
    registry: Registry,
    progress: Progress,
) -> Factored:
    """Cut every source, write the adapter, index it.

    Args:
        facts: what the report opens with; with ``key`` all that decides the result is in it.
        made_of: folders that are read.
        known: fields of its record that its files do not tell.
        beside: asked when all modules are cut.

    Raises:
        NotApplied: what was written would do something else, or nothing.
        OutputError: the place cannot be written.
    """
    from lorahub_registry.weights.factorise import assemble, factorise
    from lorahub_registry.weights.files import save_config

    out = expand(str(out)).absolute()
    check_output(out, force=force, made_of=made_of)
    whole = {**facts, **key, "modules": [source.module for source in sources]}
    with resumable(out, whole, force=force, progress=progress, unit="pieces") as part:
        modules = factorise(sources, ranks, dtype, part, title=title, progress=progress)
        more = beside(part, modules)
        told = {**_summary(modules), **more.told}
        written = assemble(part, sources, modules, dtype, more.tensors)
        save_config(
            part.folder,
            written,
            base=base.name or base.declared or "",
            base_revision=base.revision,
            task_type=task_type,
            all_modules=all_modules,
            fan_in_fan_out=fan_in_fan_out,
            bias=more.bias,
            modules_to_save=more.modules_to_save,
        )
        _check_applies(part.folder, written)
        # Spectra are for the figure.
        plain = {n: {k: v for k, v in m.items() if k != _LONG} for n, m in modules.items()}
        report = {**facts, **told, "modules": plain}
        write_report(part.folder, report)
    _warn(modules, ranks, report, progress)
    record = record_of_folder(out, progress=progress)
    stored = registry.put(replace(record, base=base, **(known or {})))
    if plot_to is not None:
        plot(_as_weights(modules), plot_to, title=out.name)
    return Factored(stored, out, report)


_LONG = "singular_values"


def read_ranks(
    rank: int | Literal["full"] | None, energy: float | None, max_bytes: int | None
) -> Ranks:
    """What decides the ranks; 64 where nothing is said.

    Raises:
        UsageError: more than one is given, or one that holds nothing.
    """
    from lorahub_registry.weights.ranks import Ranks

    if sum(value is not None for value in (rank, energy, max_bytes)) > 1:
        raise UsageError("rank, energy and size each decide the ranks", hint="give one of them")
    if isinstance(rank, int) and rank < 1:
        raise UsageError(f"rank {rank} holds nothing", hint="1 or more, or full")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"{energy:g} is no share of energy", hint="above 0, at most 1")
    if max_bytes is not None and max_bytes < 1:
        raise UsageError(f"{max_bytes} bytes hold nothing", hint="for example 100MB")
    return Ranks(64 if energy is None and max_bytes is None and rank is None else rank,
                 energy, max_bytes)  # fmt: skip


def named(ranks: Ranks) -> dict[str, Any]:
    """The one that decides, for the report."""
    given = {"rank": ranks.rank, "energy": ranks.energy, "max_bytes": ranks.max_bytes}
    return {name: value for name, value in given.items() if value is not None}


def dtype_name(dtype: torch.dtype) -> str:
    """The factors' type where tensors of ``dtype`` are cut; float32 where none keeps adapters."""
    from lorahub_registry.weights.files import DTYPES

    return next((name for name, known in DTYPES.items() if known == dtype), "float32")


def _summary(modules: Modules) -> dict[str, Any]:
    """All modules together; none has a norm: nothing was kept of nothing."""
    energy = math.fsum(m["norm"] ** 2 for m in modules.values())
    if not energy:
        return {}
    lost = math.fsum((m["error"] * m["norm"]) ** 2 for m in modules.values())
    changed = [name for name, m in modules.items() if m["norm"]]
    return {
        "kept": max(0.0, 1 - lost / energy),
        "error": math.sqrt(lost / energy),
        "worst": min(changed, key=lambda name: modules[name]["kept"]),
    }


def _warn(modules: Modules, ranks: Ranks, report: Mapping[str, Any], progress: Progress) -> None:
    if isinstance(ranks.rank, int):
        small = [m for m in modules.values() if m["norm"] and m["rank"] < ranks.rank]
        if small:
            progress.say(
                f"{len(small)} of {len(modules)} modules have no {ranks.rank} directions: they are "
                "kept whole"
            )
    if ranks.energy is not None:
        under = [n for n, m in modules.items() if m["kept"] < ranks.energy - 1e-9]
        if under:
            progress.warn(
                f"{len(under)} of {len(modules)} modules keep less than {ranks.energy:g} of their "
                f"energy once their factors are rounded ({under[0]}): --dtype float32 keeps it"
            )
    if report["kept"] < _GOOD:
        progress.warn(
            f"the factors keep {100 * report['kept']:.0f}% of the energy: a higher rank keeps "
            "more, see lorareg.json by module"
        )


def _check_applies(folder: Path, ranks: Mapping[str, int]) -> None:
    """Whether PEFT, reading what was written, adds B·A to just these modules.

    Raises:
        NotApplied: it would add something else.
    """
    found = {m.name: (m.rank, m.scaling) for m in read_facts(folder).modules}
    if found != {name: (rank, 1.0) for name, rank in ranks.items()}:
        raise NotApplied(f"{folder.name}: the written config does not mean what was computed")


def _as_weights(modules: Modules) -> Any:
    from lorahub_registry.weights.inspect import ModuleWeights, Weights

    found = [
        ModuleWeights(
            name, m["rank"], (m["shape"][0], m["shape"][1]), tuple(m[_LONG]), m["norm"],
            m["effective_rank"],
        )
        for name, m in sorted(modules.items())
    ]  # fmt: skip
    return Weights(tuple(found))
