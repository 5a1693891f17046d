"""Weights: an adapter of another rank."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lorahub_registry.adapters.compat import check_sum, plain_taken
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.tensors import file_sha256
from lorahub_registry.api.factored import (
    Factored,
    dtype_name,
    named,
    read_ranks,
    write_factored,
)
from lorahub_registry.api.output import report_head
from lorahub_registry.api.resolve import resolve_refs
from lorahub_registry.errors import NotApplied, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry.store import Registry


def resize(
    ref: str | Path,
    out: str | Path,
    *,
    rank: int | Literal["full"] | None = None,
    energy: float | None = None,
    max_bytes: int | None = None,
    dtype: str = "auto",
    plot_to: Path | None = None,
    force: bool = False,
    registry: Registry | None = None,
    progress: Progress = silent,
) -> Factored:
    """Write an adapter whose deltas are the nearest of another rank; α is that rank.

    Args:
        ref: a folder, a registered name or a Hub ref; pulled where needed.
        rank, energy, max_bytes: see :func:`lorahub_registry.api.extract.extract`; ``full`` keeps
            all, with α and the rank made one.
        dtype: of the factors; ``auto``: as they are stored.

    Raises:
        IncompatibleAdapters: it is no plain LoRA, so that its deltas are not all of it.
        NotApplied: it changes nothing, or its factors are more than ``dtype`` holds.
        UsageError, UnknownRef, BrokenAdapter, OutputError: as their names say.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return resize(
                ref, out, rank=rank, energy=energy, max_bytes=max_bytes, dtype=dtype,
                plot_to=plot_to, force=force, registry=opened, progress=progress,
            )  # fmt: skip
    from lorahub_registry.weights.files import DTYPES
    from lorahub_registry.weights.resize import Stored
    from lorahub_registry.weights.stream.adapter import AdapterFile

    if rank is None and energy is None and max_bytes is None:
        raise UsageError(
            "resize wants a rank, a share of energy or a size", hint="--rank, --energy, --max-size"
        )
    ranks = read_ranks(rank, energy, max_bytes)
    found = resolve_refs([str(ref)], beside=Path.cwd(), registry=registry, progress=progress)
    [member] = found.members
    check_sum([member])
    for note in plain_taken([member], "resized"):
        progress.warn(note)
    base = found.records[member.name].base
    file = AdapterFile(member.name, member.folder, member.facts)
    with progress.task(f"Checking {member.name}"):
        if not file.check():
            raise NotApplied(f"{member.name} changes nothing: all its deltas are zero")
    kind = dtype if dtype != "auto" else dtype_name(file.dtype(member.facts.modules[0].key_a))
    facts = {
        **report_head("resize"),
        "adapter": {"name": member.name, "digest": member.digest},
        "base": {"name": base.name, "revision": base.revision},
        "options": {**named(ranks), "dtype": kind},
    }
    return write_factored(
        Path(out),
        [Stored(file, m.name, DTYPES[kind]) for m in member.facts.modules],
        ranks,
        DTYPES[kind],
        facts,
        base=base,
        known={"skills": found.records[member.name].skills},
        task_type=member.facts.config.task_type or "CAUSAL_LM",
        fan_in_fan_out=member.facts.config.fan_in_fan_out,
        made_of=[member.folder],
        key={"config": file_sha256(member.folder / CONFIG_NAME)},
        title="Resizing",
        plot_to=plot_to,
        force=force,
        registry=registry,
        progress=progress,
    )
