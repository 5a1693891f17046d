"""Inspect: an adapter's weights in numbers and as a figure, and how adapters get on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lorahub_registry.adapters.bases import BaseName, infer_base
from lorahub_registry.adapters.compat import Member, check_weights
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.dynamic import PEFT_TYPE, plain_instead
from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.api.publish import folder_of
from lorahub_registry.errors import IncompatibleAdapters, UnknownRef, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import expand, looks_like_path
from lorahub_registry.registry.index import record_of_folder
from lorahub_registry.registry.records import StoredAdapter
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.weights.compare import Pair
    from lorahub_registry.weights.inspect import Weights
    from lorahub_registry.weights.lowrank import LowRank


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        names: of the adapters, in the order asked for; pairs count from 0 in it.
        keys: their places, as the registry calls them.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    pairs: tuple[Pair, ...]


def weights(
    ref: str | Path, *, registry: Registry | None = None, progress: Progress = silent
) -> Weights:
    """Norms, effective ranks and spectra of an adapter, module by module.

    Args:
        ref: a folder, a registered name or a Hub ref that was pulled.

    Raises:
        UnknownRef: it is not on this machine.
        IncompatibleAdapters: its weights are a pickle, or no LoRA.
        BrokenAdapter: a tensor holds NaN or infinity.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return weights(ref, registry=opened, progress=progress)
    from lorahub_registry.weights.inspect import inspect

    return inspect(_load(_member(str(ref), registry, progress), progress), progress=progress)


def compare(
    refs: Sequence[str | Path], *, registry: Registry | None = None, progress: Progress = silent
) -> Comparison:
    """Cosine, shared targets and predicted interference of every pair of adapters.

    See :mod:`lorahub_registry.weights.compare` for what is computed, and how far to believe it.
    Adapters of different bases are compared and warned of.

    Args:
        refs: two or more; each a folder, a registered name or a Hub ref that was pulled.

    Raises:
        UsageError: fewer than two, or one twice.
        IncompatibleAdapters: a pickle, no LoRA, or a module whose shapes differ.
        UnknownRef, BrokenAdapter: as for :func:`weights`.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return compare(refs, registry=opened, progress=progress)
    if len(refs) < 2:
        raise UsageError("one adapter alone cannot be compared", hint="name two or more")
    members = _named([_member(str(ref), registry, progress) for ref in refs], refs)
    _same_shapes(members)
    for other in members[1:]:
        _warn_of_bases(members[0], other, progress)
    from lorahub_registry.weights.compare import compare as run

    pairs = run([_load(member, progress) for member in members], progress=progress)
    for pair in pairs:
        if not pair.meetings:
            progress.warn(
                f"{members[pair.first].name} and {members[pair.second].name} change no module in "
                "common: what they do to each other cannot be seen from their weights"
            )
    names, keys = (m.name for m in members), (m.key for m in members)
    return Comparison(tuple(names), tuple(keys), tuple(pairs))


def read(ref: str | Path, *, registry: Registry, progress: Progress = silent) -> StoredAdapter:
    """What is known of an adapter; of a folder that is not registered, what its files say (id 0).

    Raises:
        UnknownRef, AmbiguousRef: see :meth:`Registry.get`.
        AdapterError: a folder whose files are no adapter's.
    """
    folder = expand(str(ref))
    try:
        return registry.get(str(ref))
    except UnknownRef:
        if not (folder / CONFIG_NAME).is_file():
            raise
    now = datetime.now(UTC)
    return StoredAdapter(0, record_of_folder(folder, progress=progress), now, now)


def _member(ref: str, registry: Registry, progress: Progress) -> Member:
    """The adapter, its weights checked; what its deltas leave out is warned of."""
    folder, stored = expand(ref), None
    if looks_like_path(ref) or (folder / CONFIG_NAME).is_file():
        try:
            stored = registry.get(str(folder))
        except UnknownRef:
            pass
    else:
        stored = registry.get(ref)
        if stored.record.weights == "missing" and stored.record.repo.kind == "hub":
            raise UnknownRef(f"{ref}: its weights are not here", hint=f"lorareg pull {stored.ref}")
        folder = folder_of(stored.ref, registry)
    facts = read_facts(folder)
    record = stored.record if stored else None
    member = Member(
        name=record.name if record else folder.name,
        key=stored.ref if stored else str(folder),
        ref=ref,
        folder=folder,
        facts=facts,
        base=record.base.name if record else infer_base(facts.config.base)[0],
        base_digest=record.base.digest if record else None,
    )
    check_weights(member)
    kind = member.facts.config.peft_type
    if kind != "LORA":
        raise IncompatibleAdapters(
            f"{member.name}: it is {kind}, and only LoRA has deltas B·A",
            hint=plain_instead(member.folder) if kind == PEFT_TYPE else None,
        )
    return _low_rank_only(member, progress)


def _low_rank_only(member: Member, progress: Progress) -> Member:
    """``member`` without its convolutions; whatever else its ΔW = B·A does not tell is named."""
    facts = member.facts
    modules = tuple(m for m in facts.modules if m.kind != "conv")
    if not modules:
        raise IncompatibleAdapters(f"{member.name}: it adapts convolutions alone")
    left_out = list(facts.config.unsupported)
    if not left_out and facts.other_tensors:
        left_out.append(facts.other_tensors[0])
    if len(modules) < len(facts.modules):
        left_out.append(f"{len(facts.modules) - len(modules)} convolutions")
    if left_out:
        progress.warn(
            f"{member.name} has {', '.join(left_out)}: only its B·A is looked at, which is not "
            "all that it changes"
        )
    return replace(member, facts=replace(facts, modules=modules))


def _load(member: Member, progress: Progress) -> dict[str, LowRank]:
    from lorahub_registry.weights.files import load_deltas

    with progress.task(f"Reading {member.name}"):
        return load_deltas(member.folder, member.facts)


def _named(members: Sequence[Member], refs: Sequence[str | Path]) -> list[Member]:
    """Members under names no two alike: their own, or else the words that were typed."""
    folders = [m.folder.resolve() for m in members]
    for member, folder in zip(members, folders, strict=True):
        if folders.count(folder) > 1:
            raise UsageError(f"{member.name} is named twice")
    names = [m.name for m in members]
    return [
        member if names.count(member.name) == 1 else replace(member, name=str(ref))
        for member, ref in zip(members, refs, strict=True)
    ]


def _same_shapes(members: Sequence[Member]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for member in members:
        for module in member.facts.modules:
            shape = f"{module.kind} {module.fan_out}x{module.fan_in}"
            first, expected = seen.setdefault(module.name, (member.name, shape))
            if shape != expected:
                raise IncompatibleAdapters(
                    f"{module.name} is {expected} in {first} and {shape} in {member.name}",
                    hint="they were made for different bases; leave one out",
                )


def _warn_of_bases(one: Member, other: Member, progress: Progress) -> None:
    bases = (one.base or "an unknown base", other.base or "an unknown base")
    if one.base_digest and other.base_digest:
        if one.base_digest == other.base_digest:
            return
        bases = (f"{bases[0]} ({one.base_digest[:12]})", f"{bases[1]} ({other.base_digest[:12]})")
    elif one.base and other.base and BaseName.parse(one.base).same_model(
        BaseName.parse(other.base)
    ):  # fmt: skip
        return
    progress.warn(
        f"{one.name} sits on {bases[0]}, {other.name} on {bases[1]}; numbers between "
        "different bases say nothing about a mixture"
    )
