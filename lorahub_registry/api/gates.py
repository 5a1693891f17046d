"""Weights: published LoRA-Flow gates and their adapters, made a dynamic mixture."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from lorahub_registry.adapters.base_files import BaseFacts, base_digest, read_base
from lorahub_registry.adapters.bases import BaseName
from lorahub_registry.adapters.compat import Member, check_base, check_sum
from lorahub_registry.adapters.facts import digest_of, read_facts
from lorahub_registry.adapters.tensors import file_sha256
from lorahub_registry.api.bases import ResolvedBase
from lorahub_registry.api.gates_papers import (
    agreed_license,
    enter,
    member_facts,
    routing_facts,
    write_papers,
)
from lorahub_registry.api.output import check_output, new_folder, report_head
from lorahub_registry.errors import BaseModelError, IncompatibleAdapters, UnknownRef, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import AdapterRef, expand, looks_like_path, safe_path
from lorahub_registry.registry.index import card_beside, record_of
from lorahub_registry.registry.records import BaseRecord, RepoRecord, StoredAdapter
from lorahub_registry.registry.store import Registry
from lorahub_registry.settings import Settings

PUBLISHED = "Bowen232/LoRA-Flow"
TEMPERATURES = {"zh_math": 1.1, "ru_math": 1.1}
"""Of the published gates that were trained with another temperature than 1; their file does not
say so."""


@dataclass(frozen=True)
class Gated:
    """What was written.

    Attributes:
        report: what ``results.json`` holds.
    """

    path: Path
    report: dict[str, Any]
    stored: StoredAdapter


@dataclass(frozen=True)
class _Source:
    """A Hub repo at a commit, or a folder (``repo`` and ``commit`` are None)."""

    folder: Path
    repo: str | None = None
    commit: str | None = None
    start: str = ""

    def ref(self, path: str) -> str | None:
        """``owner/name/path``; None for what is in a folder of the user's, which is never named."""
        return "/".join(p for p in (self.repo, self.start, path) if p) if self.repo else None


def convert_gates(
    source: str | Path,
    gate: str,
    adapters: Sequence[str],
    *,
    out: str | Path | None = None,
    base: str | None = None,
    temperature: float | None = None,
    license: str | None = None,
    force: bool = False,
    timeout_s: float = 600.0,
    registry: Registry | None = None,
    progress: Progress = silent,
) -> Gated:
    """Make a dynamic mixture of published LoRA-Flow gates (arXiv:2402.11455) and their adapters.

    Pickles, of gates and of adapters, are read in a child process as :func:`convert` reads them.
    ``softmax(W x / temperature) + b`` decides on entering each layer, from the residual stream,
    how loud each adapter speaks in it.

    The folder has a card, a lock and its facts, and the registry an entry with its lineage, as
    what ``compose`` makes; nothing is measured.

    Args:
        source: a folder, or a Hub ref, of which only what is named is pulled.
        gate: the gates' file in it.
        adapters: the adapters' folders in it, in the order of the gates' lines: the language, then
            the task.
        out: by default, the name of the gates' file without its ending, here.
        base: the base's name, over what the adapters say; or its folder, and then the adapters are
            held against its shapes.
        temperature: by default 1, or what published gates are known to have been trained with.
        license: the mixture's; by default what the adapters' cards say, where they agree.
        force: replace what an earlier run wrote to ``out``.
        registry: where the mixture is entered; None: the default one.

    Raises:
        UsageError: no adapters, one twice, or a temperature that is none.
        UnknownRef, HubError: something named is not there.
        BrokenAdapter: a pickle or an adapter is damaged, or the file holds no gates.
        IncompatibleAdapters: gates and adapters do not belong together, the adapters are of
            different bases, or hold what a sum of deltas does not express.
        BaseModelError: nothing says which base the adapters sit on.
        OutputError: the place cannot be written.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return convert_gates(
                source, gate, adapters, out=out, base=base, temperature=temperature,
                license=license, force=force, timeout_s=timeout_s, registry=opened,
                progress=progress,
            )  # fmt: skip
    from lorahub_registry.weights.convert import convert
    from lorahub_registry.weights.dynamic import Origin
    from lorahub_registry.weights.files import load_deltas
    from lorahub_registry.weights.gates import (
        check_count,
        exact_dtype,
        list_of_layers,
        plain_coefficients,
        read_gates,
        write_gated,
    )

    gate, names = _inside(gate), [_inside(a) for a in adapters]
    _check(names, temperature, license)
    place = expand(str(out or PurePosixPath(gate).stem or "gates"))
    check_output(place, force=force)
    found = _find(str(source), gate, names, progress)
    folders = [found.folder / name for name in names]
    check_output(place, force=force, made_of=[*folders, (found.folder / gate).parent])
    heat = _temperature(temperature, gate, found.repo, progress)

    where = f"{found.repo}/{gate}" if found.repo else str(found.folder / gate)
    gates = read_gates(found.folder / gate, timeout_s=timeout_s)
    check_count(gates, len(names), where=where)
    with new_folder(place, force=force) as part, ExitStack() as stack:
        members, bases = [], []
        for name, label, folder in zip(names, _labels(found, names), folders, strict=True):
            if read_facts(folder).weights == "pickle":
                # Beside what is written: there is room for it, and it goes in any case.
                into = Path(stack.enter_context(TemporaryDirectory(dir=part, prefix=".")))
                with progress.task(f"Converting {label}"):
                    convert(folder, into=into, timeout_s=timeout_s)
                member, said = _member(found, name, label, into, folder)
            else:
                member, said = _member(found, name, label, folder, folder)
            members.append(member)
            bases.append(said)
        check_sum(members)
        task_type = members[0].facts.config.task_type or "CAUSAL_LM"
        layers = list_of_layers(members, gates, where=where)
        found_base = _base(base, members, bases, progress)
        at = found_base.facts
        with progress.task("Reading adapters", len(members), "adapter") as task:
            experts = []
            for member in members:
                experts.append(load_deltas(member.folder, member.facts))
                task.advance()
        stack.close()
        coefficients, dtype = plain_coefficients(gates, layers), exact_dtype(members, experts)
        with progress.task(f"Writing {place.name}"):
            write_gated(
                part,
                gates,
                layers,
                experts,
                [Origin(m.name, m.ref or None, m.revision or None, m.digest) for m in members],
                base=at.name,
                base_revision=at.revision,
                task_type=task_type,
                temperature=heat,
                dtype=dtype,
                all_modules={name.removesuffix(".weight") for name in at.shapes},
            )
        told, notes = agreed_license(license, members, card_beside(found.folder).license)
        facts = {
            "kind": "converted",
            "name": place.name,
            "base": at.named,
            "seq2seq": task_type == "SEQ_2_SEQ_LM",
            "method": {"type": "lora_flow"},
            "made_by": _command(found, gate, names, heat),
            "gates": _gate_facts(found, gate)
            | {
                "layers": gates.layers,
                "width": gates.width,
                "biases": gates.biased,
                "temperature": heat,
            },
            "members": [
                member_facts(member) | {"coefficient": mean}
                for member, *each in zip(members, *coefficients.values(), strict=True)
                for mean in [fmean(each)]
            ],
            "routing": routing_facts([m.name for m in members], coefficients, heat),
            "output": {"dtype": dtype},
            "license": told,
            "datasets": [],
            "notes": notes,
            "versions": report_head("convert")["versions"],
        }
        write_papers(part, facts)
    if told is None:
        progress.warn(
            "its licence is unknown, and the unknown is not published: --license ID says it"
        )
    if found_base.folder is not None and "/" not in at.name:
        registry.place_base(at.name, found_base.folder)
    return Gated(place, facts, enter(place, facts, registry))


def _command(source: _Source, gate: str, adapters: Sequence[str], temperature: float) -> str:
    """What made it, as one would type it; of a folder of the user's, only names."""
    words = ["lorareg", "convert"]
    if source.repo:
        start = "/".join(p for p in (source.repo, source.start) if p)
        words += [f"{start}@{source.commit}", "--gate", gate, "--adapters", *adapters]
    else:
        names = _labels(source, adapters)
        words += ["FOLDER", "--gate", PurePosixPath(gate).name, "--adapters", *names]
    return shlex.join([*words, "--temperature", f"{temperature:g}"])


def _gate_facts(source: _Source, gate: str) -> dict[str, Any]:
    return {
        "ref": source.ref(gate),
        "revision": source.commit,
        # Outside a repo the path may say whose machine this is.
        "file": gate if source.repo else PurePosixPath(gate).name,
        "sha256": file_sha256(source.folder / gate),
        "pickle": PurePosixPath(gate).suffix != ".safetensors",
    }


def _inside(path: str) -> str:
    """A path in the source, as the Hub writes it; ``""`` is the source itself."""
    written = PurePath(path).as_posix()
    return "" if written == "." else written


def _check(adapters: Sequence[str], temperature: float | None, license: str | None) -> None:
    if not adapters:
        raise UsageError(
            "gates choose among adapters, and none is named",
            hint="--adapters LANGUAGE TASK, in the order of the gates' lines",
        )
    for name in adapters:
        if adapters.count(name) > 1:
            raise UsageError(f"the adapter {name or '.'} is named twice")
    if temperature is not None and not (0 < temperature < math.inf):
        raise UsageError(f"a temperature of {temperature:g}: it is to be above 0")
    if license is not None and not license.strip():
        raise UsageError("a licence without a name", hint="--license apache-2.0, or leave it out")


def _find(source: str, gate: str, adapters: Sequence[str], progress: Progress) -> _Source:
    """Where the files are, on this machine now."""
    folder = expand(source)
    if folder.is_dir() or looks_like_path(source):
        if not folder.is_dir():
            raise UnknownRef(f"{source}: no such folder")
        return _Source(folder)
    ref = AdapterRef.parse(source)
    for path in (gate, *filter(None, adapters)):
        if not safe_path(path):
            raise UsageError(f"{path!r} is no path in a repo", hint="name it as the repo does")
    from lorahub_registry.hub.parts import pull_parts

    settings = Settings.from_environment()
    got = pull_parts(ref, [gate], adapters, settings=settings, progress=progress)
    return _Source(got.folder, got.repo, got.commit, ref.subfolder)


def _temperature(given: float | None, gate: str, repo: str | None, progress: Progress) -> float:
    known = TEMPERATURES.get(PurePosixPath(gate).stem)
    if given is not None:
        return given
    if known is None:
        return 1.0
    name = PurePosixPath(gate).name
    if repo is None:
        progress.warn(
            f"the temperature is taken as 1; {PUBLISHED}'s {name} was trained with {known:g}: if "
            f"this is it, --temperature {known:g}"
        )
        return 1.0
    if repo.lower() != PUBLISHED.lower():
        return 1.0
    progress.say(f"{repo}: {name} was trained with a temperature of {known:g}, which is taken")
    return known


def _labels(source: _Source, adapters: Sequence[str]) -> list[str]:
    """What the adapters are called: their folders' last parts, no two alike."""
    labels: list[str] = []
    for path in adapters:
        name = (path or source.repo or "").rsplit("/", 1)[-1]
        if source.repo is None:  # the path may end in "..", or be the folder itself
            name = expand(str(source.folder / path)).name
        label, number = name, 2
        while label in labels:
            label, number = f"{name}-{number}", number + 1
        labels.append(label)
    return labels


def _member(
    source: _Source, path: str, label: str, folder: Path, beside: Path
) -> tuple[Member, BaseRecord]:
    """An adapter, and the base that it or a card says it sits on.

    Args:
        folder: where its safetensors are.
        beside: where it stands in the source, with its card.
    """
    facts, digest = read_facts(folder), digest_of(folder)
    card = card_beside(beside if (beside / "README.md").is_file() else source.folder)
    subfolder = "/".join(p for p in (source.start, path) if p)
    kind, place = ("hub", source.repo) if source.repo else ("local", str(beside))
    record = record_of(
        facts,
        repo=RepoRecord(kind, place or ""),  # type: ignore[arg-type]
        card=card,
        subfolder=subfolder if source.repo else "",
        revision=source.commit or "",
        digest=digest,
    )
    member = Member(
        name=label,
        key=str(beside),
        ref=source.ref(path) or "",
        folder=folder,
        facts=facts,
        base=record.base.name,
        digest=digest,
        # PEFT writes a card of its own beside an adapter, which says nothing of this.
        license=card.license or card_beside(source.folder).license,
        revision=source.commit or "",
    )
    return member, record.base


def _base(
    given: str | None, members: Sequence[Member], said: Sequence[BaseRecord], progress: Progress
) -> ResolvedBase:
    """The base by its name; with a folder, shapes and digest where the user gave one."""
    if given is not None:
        folder = expand(given)
        if looks_like_path(given) or (folder / "config.json").is_file():
            facts = read_base(folder)
            check_base([replace(member, base=facts.name) for member in members], facts)
            digest = base_digest(folder, progress=progress)
            return ResolvedBase(replace(facts, digest=digest), folder)
        name, _, pin = given.partition("@")
        return ResolvedBase(BaseFacts(name, revision=pin or None), None)
    for member, base in zip(members, said, strict=True):
        if base.name is None:
            silent_ = f"its config says {base.declared!r}" if base.declared else "it is silent"
            raise BaseModelError(
                f"{member.name} does not say which base it was made for ({silent_})",
                hint="name it: --base ID",
            )
        first = said[0].name or ""
        if not BaseName.parse(base.name).same_model(BaseName.parse(first)):
            raise IncompatibleAdapters(
                f"{members[0].name} was made for {first}, and {member.name} for {base.name}",
                hint="if you know that it is one and the same: --base ID",
            )
    # A name that somebody wrote says more than one found in a path.
    best = min(said, key=lambda base: base.how != "declared")
    if best.how == "inferred":
        progress.say(f"base inferred as {best.name} (config: {best.declared!r})")
    revisions = {base.revision for base in said}
    revision = revisions.pop() if len(revisions) == 1 else None
    return ResolvedBase(BaseFacts(best.name or "", revision=revision), None)
