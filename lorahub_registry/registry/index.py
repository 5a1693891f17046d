"""From files to records: what is known of an adapter becomes what the registry stores."""

from __future__ import annotations

from pathlib import Path

from lorahub_registry.adapters.bases import infer_base
from lorahub_registry.adapters.dynamic import folder_to_run
from lorahub_registry.adapters.facts import AdapterFacts, digest_of, read_facts
from lorahub_registry.adapters.readme import Card, read_card
from lorahub_registry.adapters.skills import find_skills
from lorahub_registry.adapters.tensors import file_sha256
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry.records import (
    AdapterRecord,
    BaseRecord,
    FileRecord,
    RepoRecord,
    ScoreRecord,
    SkillRecord,
    WeightsState,
)


def record_of(
    facts: AdapterFacts,
    *,
    repo: RepoRecord,
    card: Card,
    subfolder: str = "",
    revision: str = "",
    name: str | None = None,
    base: str | None = None,
    digest: str | None = None,
    local_path: Path | None = None,
    files: tuple[FileRecord, ...] = (),
) -> AdapterRecord:
    """The record of one adapter.

    Args:
        card: its own card, or its repo's.
        name: what it is called; by default its last folder's or its repo's name.
        base: the base's name as the user gave it, over what the config says.
    """
    config = facts.config
    label = name or (subfolder or repo.name).rsplit("/", 1)[-1]
    named = (label, repo.name.rsplit("/", 1)[-1]) if repo.kind == "hub" else (label,)
    return AdapterRecord(
        repo=repo,
        base=_base(facts, card, base),
        name=label,
        subfolder=subfolder,
        revision=revision,
        peft_type=config.peft_type,
        task_type=config.task_type,
        rank=facts.rank,
        ranks=facts.ranks,
        alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        targets=facts.targets,
        parameters=facts.parameters,
        dtype=facts.dtype,
        bytes=facts.bytes,
        digest=digest,
        local_path=str(local_path) if local_path else None,
        weights=_state(facts, local_path),
        description=card.description or card.title,
        config=config.raw,
        modules=tuple(
            {"name": m.name, "kind": m.kind, "rank": m.rank, "in": m.fan_in, "out": m.fan_out}
            for m in facts.modules
        ),
        files=files,
        skills=tuple(
            SkillRecord(skill, "dataset" if source == "dataset" else "card", evidence)
            for skill, source, evidence in find_skills(card, named)
        ),
        scores=tuple(
            ScoreRecord(task=task, dataset=dataset, metric=metric, value=value, source="card")
            for task, dataset, metric, value in card.scores
        ),
    )


def record_of_folder(
    folder: Path,
    *,
    base: str | None = None,
    name: str | None = None,
    progress: Progress = silent,
) -> AdapterRecord:
    """The record of an adapter in a local folder; reads its tensors once, for the digest.

    Raises:
        AdapterError: see :func:`lorahub_registry.adapters.facts.read_facts`.
    """
    facts = read_facts(folder)
    card = card_beside(folder)
    return record_of(
        facts,
        repo=RepoRecord(kind="local", name=str(folder), license=card.license),
        card=card,
        name=name,
        base=base,
        digest=digest_of(folder, progress=progress),
        local_path=folder,
        files=files_of(folder),
    )


def card_beside(folder: Path) -> Card:
    """The card in ``folder``; an empty one where there is none."""
    path = folder / "README.md"
    return read_card(path.read_text("utf-8", errors="replace") if path.is_file() else "")


def files_of(folder: Path) -> tuple[FileRecord, ...]:
    """The files in ``folder``, with those of the mixture that decides: size and SHA-256.

    Pickles are hashed, never loaded.
    """
    here = [folder, folder_to_run(folder)] if folder_to_run(folder) != folder else [folder]
    paths = sorted(p for place in here for p in place.iterdir() if p.is_file())
    return tuple(
        FileRecord(p.relative_to(folder).as_posix(), p.stat().st_size, file_sha256(p))
        for p in paths
        if not p.name.startswith(".")
    )


def _state(facts: AdapterFacts, local_path: Path | None) -> WeightsState:
    if facts.weights == "pickle":
        return "pickle"
    if local_path is None:
        return "listed"
    return "local" if facts.weights == "safetensors" else "missing"


def _base(facts: AdapterFacts, card: Card, given: str | None) -> BaseRecord:
    declared = facts.config.base
    if given:
        return BaseRecord(given, "given", declared)
    name, how = infer_base(declared)
    if how != "declared" and card.base:
        # The card often knows what the config's local path hides.
        of_card, how_card = infer_base(card.base)
        if how_card == "declared":
            name, how = of_card, "inferred"
    return BaseRecord(name, how, declared, revision=facts.config.base_revision)
