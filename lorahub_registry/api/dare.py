"""DARE: a tuned model, or an adapter, with most of its change dropped and the rest rescaled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorahub_registry.adapters.compat import Member, check_sum
from lorahub_registry.adapters.facts import digest_of
from lorahub_registry.api.extract import run, two_models
from lorahub_registry.api.factored import read_ranks
from lorahub_registry.api.inspect import member_of
from lorahub_registry.api.output import (
    check_output,
    new_folder,
    report_head,
    resumable,
    write_report,
)
from lorahub_registry.errors import IncompatibleAdapters, UnknownRef, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import expand
from lorahub_registry.registry.index import record_of_folder
from lorahub_registry.registry.records import BaseRecord, StoredAdapter
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.weights.dare import Drop
    from lorahub_registry.weights.lowrank import LowRank
    from lorahub_registry.weights.stream.pairs import Models

_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Dropped:
    """What was written.

    Attributes:
        report: what ``lorareg.json`` holds, but the list of files.
        stored: an adapter's entry in the registry; None of a model.
    """

    path: Path
    report: dict[str, Any]
    stored: StoredAdapter | None = None


def dare(
    base: str,
    tuned: str,
    out: str | Path,
    *,
    rate: float = 0.85,
    strategy: Literal["random", "magnitude"] = "random",
    rescale: bool = True,
    seed: int = 0,
    to_lora: int | Literal["full"] | None = None,
    force: bool = False,
    workers: int | None = None,
    registry: Registry | None = None,
    progress: Progress = silent,
) -> Dropped:
    """Write ``base + rescale · mask · (tuned − base)``, in the tuned model's files and types.

    Of every parameter that both have, in float32, some rows at a time; a run that is stopped goes
    on where it was. Rows of tokens that only the tuned model has are copied. See
    :class:`lorahub_registry.weights.dare.Drop` for the masks (arXiv:2311.03099).

    Args:
        base, tuned: folders, Hub ids or family names; pulled where needed.
        rate: the share of entries that are dropped, in [0, 1).
        strategy: ``random``, or ``magnitude`` for the smallest of every tensor.
        rescale: divide what stays by ``1 − rate``.
        seed: of the random masks.
        to_lora: write no model but a LoRA of this rank of the dropped difference, as
            :func:`lorahub_registry.api.extract.extract` does.
        force: replace what an earlier run wrote to ``out``.
        workers: threads; as many as there are cores by default. The result is the same for any.

    Raises:
        UsageError: a rate or seed that is none.
        BaseModelError: no model there, they are of different architectures or are one, one is
            quantized or holds NaN, or a rescaled number is more than its type holds.
        OutputError: the place cannot be written.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return dare(
                base, tuned, out, rate=rate, strategy=strategy, rescale=rescale, seed=seed,
                to_lora=to_lora, force=force, workers=workers, registry=opened, progress=progress,
            )  # fmt: skip
    from lorahub_registry.weights.dare import Drop
    from lorahub_registry.weights.extract import How

    drop, out = Drop(rate, strategy, rescale, seed), expand(str(out))
    check_output(out, force=force)
    with two_models(base, tuned, registry, progress) as (models, first, second):
        report = _head(drop) | {"base": first.facts.named, "tuned": second.facts.named}
        if to_lora is not None:
            how = How(read_ranks(to_lora, None, None), seed=seed)
            made = run(
                models, first, second, out, how, dtype="auto", include=(), exclude=(), rest="tell",
                plot_to=None, force=force, registry=registry, progress=progress, head=report,
                change=lambda pair, delta: drop.apply(pair.name, delta),
            )  # fmt: skip
            return Dropped(made.path, dict(made.report), made.adapter)
        key = report | {"base": first.key, "tuned": second.key}
        return _drop_models(models, drop, out, report, key, force, workers, progress)


def _drop_models(
    models: Models,
    drop: Drop,
    out: Path,
    report: dict[str, Any],
    key: dict[str, Any],
    force: bool,
    workers: int | None,
    progress: Progress,
) -> Dropped:
    from lorahub_registry.weights.drop import drop_model
    from lorahub_registry.weights.papers import copy_papers

    with resumable(out, key, force=force, progress=progress) as part:
        report["tensors"] = drop_model(models, drop, part, workers=workers, progress=progress)
        report["total"] = _total(report["tensors"])
        copy_papers(models.tuned.folder, part.folder)
        write_report(part.folder, report)
    return Dropped(out, report)


def dare_adapter(
    ref: str | Path,
    out: str | Path,
    *,
    rate: float = 0.85,
    strategy: Literal["random", "magnitude"] = "random",
    rescale: bool = True,
    seed: int = 0,
    rank: int | None = None,
    force: bool = False,
    registry: Registry | None = None,
    progress: Progress = silent,
) -> Dropped:
    """Write the adapter with entries of every module's ΔW = B·A dropped, and enter it.

    What is left of ΔW is no longer of low rank: it is truncated to a rank again, and the report
    states the error of that, as a share of the dropped delta's norm.

    Args:
        ref: a folder, a registered name or a Hub ref that was pulled.
        rank: of every module; its own by default.

    Others as for :func:`dare`.

    Raises:
        UnknownRef: it is not on this machine.
        IncompatibleAdapters: B·A is not all of it, or it changes nothing.
        UsageError, OutputError: as for :func:`dare`.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return dare_adapter(
                ref, out, rate=rate, strategy=strategy, rescale=rescale, seed=seed, rank=rank,
                force=force, registry=opened, progress=progress,
            )  # fmt: skip
    from lorahub_registry.weights.dare import Drop
    from lorahub_registry.weights.files import load_deltas, save_adapter

    drop, out = Drop(rate, strategy, rescale, seed), expand(str(out))
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}: it has to be 1 or more")
    check_output(out, force=force)
    member = member_of(str(ref), registry)
    check_sum([member])
    facts, base = member.facts, _base_of(member, registry)
    deltas = load_deltas(member.folder, facts)
    made, modules = _drop_all(deltas, drop, rank, progress)
    total = _total(modules)
    if not total["norm"]:
        raise IncompatibleAdapters(f"{member.name} changes nothing: there is nothing to drop")
    lost = math.hypot(*(m["truncation_error"] * m["dropped_norm"] for m in modules.values()))
    left = math.hypot(*(m["dropped_norm"] for m in modules.values()))
    total["truncation_error"] = lost / left if left else 0.0
    report = _head(drop) | {
        "adapter": {"name": member.name, "digest": digest_of(member.folder)},
        "base": {"name": base.name, "revision": base.revision, "digest": base.digest},
        "modules": modules,
        "total": total,
    }
    with new_folder(out, force=force) as folder:
        save_adapter(
            folder,
            made,
            base=base.name or "",
            base_revision=base.revision,
            task_type=facts.config.task_type or "CAUSAL_LM",
            dtype=_DTYPES.get(facts.dtype or "", "float32"),
            fan_in_fan_out=facts.config.fan_in_fan_out,
        )
        write_report(folder, report)
    record = record_of_folder(out)
    text = f"DARE of {member.name}: {rate:.4g} of the entries dropped, strategy {strategy}"
    record = replace(record, base=base, description=text, skills=(), scores=())
    return Dropped(out, report, registry.put(record))


def _drop_all(
    deltas: Mapping[str, LowRank], drop: Drop, rank: int | None, progress: Progress
) -> tuple[dict[str, LowRank], dict[str, dict[str, Any]]]:
    """Module → its dropped and truncated delta, and what is told of it; one dense at a time."""
    import torch
    from torch.linalg import vector_norm

    from lorahub_registry.weights.truncate import truncate_dense

    made, told = {}, {}
    with progress.task("Dropping", len(deltas), "module") as task:
        for name, delta in sorted(deltas.items()):
            dense = delta.dense()
            norm, entries = float(vector_norm(dense, dtype=torch.float64)), dense.numel()
            kept = drop.thin(name, dense)
            left = float(vector_norm(dense, dtype=torch.float64))
            cut = truncate_dense(dense, rank=rank or delta.rank, seed=drop.seed)
            made[name] = replace(cut.delta, kind=delta.kind)
            told[name] = {
                "kept": kept,
                "entries": entries,
                "energy_kept": (left / drop.scale / norm) ** 2 if norm else None,
                "norm": norm,
                "dropped_norm": left,
                "rank": cut.delta.rank,
                "truncation_error": cut.error,
            }
            task.advance()
    return made, told


def _head(drop: Drop) -> dict[str, Any]:
    """What of a report is known before any work; all that decides the output is among it."""
    return report_head("dare", "numpy", "transformers") | {
        "paper": "arXiv:2311.03099",
        "options": asdict(drop),
        "scale": drop.scale,
    }


def _base_of(member: Member, registry: Registry) -> BaseRecord:
    """As the registry knows it, or as its own config says."""
    try:
        return registry.get(member.key).record.base
    except UnknownRef:
        return record_of_folder(member.folder).base


def _total(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    energy = math.fsum(p["norm"] ** 2 for p in parts.values())
    kept = math.fsum((p["energy_kept"] or 0) * p["norm"] ** 2 for p in parts.values())
    return {
        "kept": sum(p["kept"] for p in parts.values()),
        "entries": sum(p["entries"] for p in parts.values()),
        "energy_kept": kept / energy if energy else None,
        "norm": math.sqrt(energy),
    }
