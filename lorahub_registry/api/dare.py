"""DARE: a tuned model, or an adapter, with most of its change dropped and the rest rescaled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorahub_registry.adapters.compat import check_single, check_sum
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.facts import read_config
from lorahub_registry.adapters.tensors import file_sha256
from lorahub_registry.api.device import streaming_device
from lorahub_registry.api.extract import run, two_models
from lorahub_registry.api.factored import (
    Beside,
    Modules,
    dtype_name,
    read_ranks,
    write_factored,
)
from lorahub_registry.api.output import check_output, report_head, resumable, write_report
from lorahub_registry.api.resolve import resolve_refs
from lorahub_registry.errors import IncompatibleAdapters, NotApplied, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import expand
from lorahub_registry.registry.records import StoredAdapter
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.weights.dare import Drop
    from lorahub_registry.weights.stream.pairs import Models
    from lorahub_registry.weights.stream.part import Part


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
    device: str = "cpu",
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
        to_lora: write no model but a LoRA of this rank (``full`` loses nothing) of the dropped
            difference, as :func:`lorahub_registry.api.extract.extract` does.
        device: where that LoRA is computed: ``cpu``, ``cuda``, or ``auto``, which is CUDA where
            there is one. The same entries are dropped on each. A model is dropped on the CPU.
        force: replace what an earlier run wrote to ``out``.
        workers: threads; as many as there are cores by default. The result is the same for any.

    Raises:
        UsageError: a rate, seed or rank that is none; a device, and no LoRA to compute there.
        IncompatibleAdapters: a MixLoRA, LoRAMoE or MoLA in place of a model.
        BaseModelError: no model there, they are of different architectures or are one, one is
            quantized or holds NaN, or a rescaled number is more than its type holds; no such
            device.
        OutputError: the place cannot be written.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return dare(
                base, tuned, out, rate=rate, strategy=strategy, rescale=rescale, seed=seed,
                to_lora=to_lora, device=device, force=force, workers=workers, registry=opened,
                progress=progress,
            )  # fmt: skip
    from lorahub_registry.weights.dare import Drop
    from lorahub_registry.weights.extract import How

    drop, out, how = Drop(rate, strategy, rescale, seed), expand(str(out)), None
    if to_lora is not None:
        ranks = read_ranks(to_lora, None, None)
        how = How(ranks, device=streaming_device(device), seed=seed)
    elif device not in {"auto", "cpu"}:
        raise UsageError(
            f"a model is not dropped on {device}: its masks are made on the CPU, and the disk "
            "decides how long it takes",
            hint="leave --device out; a LoRA of the dropped change (--to-lora) is computed there",
        )
    check_output(out, force=force)
    for ref in (base, tuned):
        folder = expand(ref)
        if (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file():
            # Of another adapter its reader says that it can be merged.
            check_single(folder.name, ref, folder, read_config(folder).peft_type)
    with two_models(base, tuned, registry, progress) as (models, first, second):
        folders = [models.base.folder, models.tuned.folder]
        check_output(out, force=force, made_of=folders)
        report = _head(drop) | {"base": first.facts.named, "tuned": second.facts.named}
        if how is not None:
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
    device: str = "cpu",
    force: bool = False,
    registry: Registry | None = None,
    progress: Progress = silent,
) -> Dropped:
    """Write the adapter with entries of every module's ΔW = B·A dropped, and enter it.

    What is left of ΔW is no longer of low rank: it is truncated to a rank again, and the report
    states the error of that and of rounding it to the adapter's type, as a share of the dropped
    delta's norm. One module is in memory at a time; a run that is stopped goes on where it was.

    Args:
        ref: a folder, a registered name or a Hub ref; pulled where needed.
        rank: of every module; its own by default.
        device: where ΔW is formed and truncated.

    Others as for :func:`dare`.

    Raises:
        UnknownRef: there is none.
        IncompatibleAdapters: B·A is not all of it, or it changes nothing.
        BaseModelError: no such device.
        NotApplied: nothing stays, or the factors of what does are more than their type holds.
        UsageError, OutputError: as for :func:`dare`.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return dare_adapter(
                ref, out, rate=rate, strategy=strategy, rescale=rescale, seed=seed, rank=rank,
                device=device, force=force, registry=opened, progress=progress,
            )  # fmt: skip
    from lorahub_registry.weights.dare import Drop
    from lorahub_registry.weights.files import DTYPES
    from lorahub_registry.weights.ranks import Ranks
    from lorahub_registry.weights.stream.adapter import AdapterFile
    from lorahub_registry.weights.thin import Thinned

    drop, out = Drop(rate, strategy, rescale, seed), expand(str(out))
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}: it has to be 1 or more")
    device = streaming_device(device)
    check_output(out, force=force)
    found = resolve_refs([str(ref)], beside=Path.cwd(), registry=registry, progress=progress)
    [member] = found.members
    check_sum([member])
    config, base = member.facts.config, found.records[member.name].base
    file = AdapterFile(member.name, member.folder, member.facts)
    with progress.task(f"Checking {member.name}"):
        if not file.check():
            raise IncompatibleAdapters(f"{member.name} changes nothing: there is nothing to drop")
    kind = dtype_name(file.dtype(member.facts.modules[0].key_a))
    head = _head(drop)
    head["options"] |= {"rank": rank, "dtype": kind, "device": device.split(":")[0]}

    def total(part: Part, modules: Modules) -> Beside:
        if not any(m["norm"] for m in modules.values()):
            raise NotApplied(
                f"{member.name}: no entry that is not zero stays of it",
                hint="take a lower --rate",
            )
        return Beside({"total": _total({name: m["drop"] for name, m in modules.items()})})

    text = f"DARE of {member.name}: {rate:.4g} of the entries dropped, strategy {strategy}"
    made = write_factored(
        out,
        [Thinned(file, m.name, drop, DTYPES[kind], device) for m in member.facts.modules],
        # Without a rank each module keeps its own.
        Ranks("full" if rank is None else rank),
        DTYPES[kind],
        head
        | {
            "adapter": {"name": member.name, "digest": member.digest},
            "base": {"name": base.name, "revision": base.revision, "digest": base.digest},
        },
        base=base,
        task_type=config.task_type or "CAUSAL_LM",
        fan_in_fan_out=config.fan_in_fan_out,
        made_of=[member.folder],
        key={"config": file_sha256(member.folder / CONFIG_NAME)},
        title="Dropping",
        beside=total,
        known={"description": text, "skills": (), "scores": ()},
        force=force,
        registry=registry,
        progress=progress,
    )
    return Dropped(made.path, dict(made.report), made.adapter)


def _head(drop: Drop) -> dict[str, Any]:
    """What of a report is known before any work; all that decides the output is among it."""
    return report_head("dare", "numpy", "transformers") | {
        "paper": "arXiv:2311.03099",
        "options": asdict(drop),
        "scale": drop.scale,
    }


def _total(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    energy = math.fsum(p["norm"] ** 2 for p in parts.values())
    kept = math.fsum((p["energy_kept"] or 0) * p["norm"] ** 2 for p in parts.values())
    return {
        "kept": sum(p["kept"] for p in parts.values()),
        "entries": sum(p["entries"] for p in parts.values()),
        "energy_kept": kept / energy if energy else None,
        "norm": math.sqrt(energy),
    }
