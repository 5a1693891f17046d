"""Merge: adapters into a full model of their own, without ever holding a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry.adapters.compat import Member, check_base, check_sum, plain_taken
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.tensors import file_sha256
from lorahub_registry.api.bases import ResolvedBase, resolve_base
from lorahub_registry.api.device import streaming_device
from lorahub_registry.api.output import check_output, report_head, resumable, write_report
from lorahub_registry.api.resolve import resolve_refs
from lorahub_registry.errors import IncompatibleAdapters, NotApplied, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import expand
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.weights.merge import Plan
    from lorahub_registry.weights.stream.checkpoint import Checkpoint

_ALONE = frozenset({"use_dora", "bias", "lora_bias", "modules_to_save"})
_LOST = 0.05  # of the delta: from here on the user is warned
_THREADS = 4  # beside a device, where each has a cuBLAS workspace of its own, of up to 32 MiB
_WHOLE_ONLY = "merge it alone and with coefficient 1, or leave it out"


def merge(
    base: str | Path,
    adapters: Mapping[str, float] | Sequence[tuple[str, float]],
    out: str | Path,
    *,
    check: bool = False,
    device: str = "cpu",
    force: bool = False,
    registry: Registry | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write ``W + Σ cᵢsᵢBᵢAᵢ`` as a model with the base's shards, names and types.

    The sum is computed in float32 and rounded once. An adapter alone with coefficient 1 may also
    have DoRA, biases and saved modules. A killed run goes on where it was.

    Args:
        base: a folder, a Hub id, or a family name that the registry knows.
        adapters: (ref, coefficient) of each: a folder, a registered name or a Hub ref.
        check: load the result and compare its logits with the unmerged model's, in float32.
        device: where sums are made and rounded: ``cpu``, ``cuda``, or ``auto``, which is CUDA where
            there is one. Another device may round another way, in the last place.
        force: replace a model that an earlier run wrote there.

    Returns:
        What ``lorareg.json`` in the folder holds.

    Raises:
        UsageError: no adapter, one twice, or coefficients that leave nothing.
        IncompatibleAdapters: what cannot be merged, by name; shapes that do not fit.
        BaseModelError: no base there, a shard missing, or it is quantised; no such device.
        OutputError: the place cannot be written, or holds something.
        NotApplied: the result would be the base, or is not what it should be.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return merge(
                base, adapters, out, check=check, device=device, force=force, registry=opened,
                progress=progress,
            )  # fmt: skip
    terms = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
    _check_terms(terms)
    device = streaming_device(device)
    out = expand(str(out)).absolute()
    check_output(out, force=force)
    resolved = resolve_refs(
        [ref for ref, _ in terms], beside=Path.cwd(), registry=registry, progress=progress
    )
    members = [replace(m, coefficient=c) for m, (_, c) in zip(resolved.members, terms, strict=True)]
    _check_kinds(members)
    found = resolve_base(str(base), registry=registry, hashed=False, progress=progress)
    assert found.folder is not None
    check_output(out, force=force, made_of=[found.folder, *(m.folder for m in members)])
    # Shapes are checked against the model itself, which knows tied and turned ones.
    notes = check_base(members, replace(found.facts, shapes={}), allow=True)
    notes += _silent_biases(members)
    notes += plain_taken(members, "merged")
    for note in notes:
        progress.warn(note)
    return _write(
        out, found, members, notes, check=check, device=device, force=force, progress=progress
    )


def _check_terms(terms: Sequence[tuple[str, float]]) -> None:
    if not terms:
        raise UsageError("there is no adapter to merge", hint="--adapter REF")
    for ref, coefficient in terms:
        if not math.isfinite(coefficient):
            raise UsageError(f"{ref}: {coefficient} is no coefficient")
    if all(coefficient == 0 for _, coefficient in terms):
        raise UsageError("every coefficient is 0: the result would be the base")


def _check_kinds(members: Sequence[Member]) -> None:
    """Whether all of what the adapters change can be merged.

    Raises:
        IncompatibleAdapters: the first that cannot be, and why.
    """
    if len(members) == 1 and members[0].coefficient == 1:
        facts = members[0].facts
        rest = [f for f in facts.config.unsupported if f.partition("=")[0] not in _ALONE]
        config = replace(facts.config, unsupported=tuple(rest))
        plain = replace(facts, config=config, other_tensors=())
        check_sum([replace(members[0], facts=plain)])
        return
    try:
        check_sum(members)
    except IncompatibleAdapters as error:
        for member in members:
            config = member.facts.config
            if {f.partition("=")[0] for f in config.unsupported} & _ALONE:
                raise IncompatibleAdapters(str(error), hint=_WHOLE_ONLY) from None
        raise


def _silent_biases(members: Sequence[Member]) -> list[str]:
    """Who says that biases were trained, and holds none."""
    return [
        f"{m.name}: its config says bias: {m.facts.config.bias}, and it holds no bias; the base's "
        "are kept"
        for m in members
        if m.facts.config.bias != "none"
        and not any(name.endswith("bias") for name in m.facts.other_tensors)
    ]


def _write(
    out: Path,
    base: ResolvedBase,
    members: Sequence[Member],
    notes: list[str],
    *,
    check: bool,
    device: str,
    force: bool,
    progress: Progress,
) -> dict[str, Any]:
    from lorahub_registry.weights.merge import plan
    from lorahub_registry.weights.merged import TILE
    from lorahub_registry.weights.papers import copy_papers
    from lorahub_registry.weights.stream.adapter import AdapterFile
    from lorahub_registry.weights.stream.checkpoint import Checkpoint
    from lorahub_registry.weights.stream.rewrite import rewrite
    from lorahub_registry.weights.stream.work import cores

    assert base.folder is not None
    kind = device.split(":")[0]
    key = {
        "command": "merge",
        "versions": report_head("merge", "transformers")["versions"],
        "tile": TILE,
        "device": kind,
        "base": base.key,
        "adapters": [[m.digest, file_sha256(m.folder / CONFIG_NAME), m.coefficient]
                     for m in members],
    }  # fmt: skip
    files = [AdapterFile(m.name, m.folder, m.facts, float(m.coefficient or 0)) for m in members]
    with Checkpoint(base.folder) as source:
        planned = plan(source, files, base=base.facts.name)
        for file in files:
            with progress.task(f"Checking {file.name}"):
                if not file.check() and not file.facts.other_tensors:
                    raise NotApplied(
                        f"{file.name}: every delta of it is 0: it changes nothing",
                        hint="was it trained, and saved after that?",
                    )
        if planned.untied:
            note = (
                f"embeddings of {base.facts.name} are tied, and the adapter changes one end: "
                f"{', '.join(planned.untied)} is written apart, tie_word_embeddings: false"
            )
            progress.warn(note)
            notes.append(note)
            _count(source, planned)
        with resumable(out, key, force=force, progress=progress) as part:
            tensors = planned.rewrites(source, files, device)
            rewrite(
                part,
                planned.layout,
                source,
                tensors,
                lambda name, begin, end: source.forget(planned.origin(name), begin, end),
                title=f"Merging into {base.facts.name}",
                workers=None if kind == "cpu" else min(_THREADS, cores()),
                progress=progress,
            )
            report = _report(base, members, planned, part.done, kind, notes, progress)
            copy_papers(base.folder, part.folder)
            if planned.config is not None:
                text = json.dumps(planned.config, indent=2) + "\n"
                (part.folder / "config.json").write_text(text, "utf-8")
            if check:
                from lorahub_registry.api.merge_check import check_merged

                report["check"] = check_merged(part.folder, base, members, progress=progress)
            write_report(part.folder, report)
    return report


def _count(source: Checkpoint, planned: Plan) -> None:
    """What is no longer tied is counted as a parameter of its own in the index, too."""
    if source.index and isinstance(source.index.get("total_parameters"), int):
        added = sum(
            math.prod(tensor.shape)
            for tensors in planned.layout.values()
            for tensor in tensors
            if tensor.name in planned.untied
        )
        total = source.index["total_parameters"] + added
        source.index = {**source.index, "total_parameters": total}


def _report(
    base: ResolvedBase,
    members: Sequence[Member],
    planned: Plan,
    done: Mapping[str, Any],
    device: str,
    notes: list[str],
    progress: Progress,
) -> dict[str, Any]:
    """What was done, in numbers; what the base's type could not hold is warned of.

    Raises:
        NotApplied: no number changed.
    """
    changed = {name: facts for name, facts in done.items() if facts is not None}
    if not any(facts["changed"] for facts in changed.values()):
        raise NotApplied(
            f"the result would be the base, bit by bit: {planned.dtype} holds nothing of the delta",
            hint="use the adapter beside the base, unmerged, or a base in float32",
        )
    norm = math.sqrt(math.fsum(f["delta_norm"] ** 2 for f in changed.values()))
    lost = math.sqrt(
        math.fsum((f["delta_norm"] * f["rounding_error"]) ** 2 for f in changed.values())
    )
    error = lost / norm
    if error > _LOST:
        notes.append(
            f"{planned.dtype} keeps {1 - error:.0%} of the delta: what is smaller than its steps "
            "is lost in rounding"
        )
        progress.warn(notes[-1])
    return {
        **report_head("merge", "transformers"),
        "base": base.facts.named,
        "adapters": [
            {
                "name": m.name,
                "ref": m.ref,
                "revision": m.revision or None,
                "digest": m.digest,
                "coefficient": m.coefficient,
            }
            for m in members
        ],
        "dtype": planned.dtype,
        "device": device,
        "delta_norm": norm,
        "rounding_error": error,
        "untied": list(planned.untied),
        "notes": notes,
        "modules": {
            name: {key: facts[key] for key in ("module", "delta_norm", "rounding_error")}
            for name, facts in sorted(changed.items())
        },
        "check": None,
    }
