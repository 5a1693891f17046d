"""Rows into records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, cast

from sqlalchemy import func, select
from sqlalchemy.engine import Connection

from lorahub_registry.registry.records import (
    AdapterRecord,
    BaseRecord,
    FileRecord,
    MemberRecord,
    MixtureRecord,
    RepoRecord,
    ScoreRecord,
    SkillRecord,
    SkillSource,
    StoredAdapter,
)
from lorahub_registry.registry.schema import (
    Adapter,
    AdapterDetail,
    AdapterSkill,
    BaseModel,
    Mixture,
    MixtureMember,
    ModuleSet,
    Recipe,
    Repo,
    Score,
    Skill,
    TargetSet,
)

# SQLite takes more, other engines do not.
_MOST_IDS = 500
_REPO = [c for c in Repo.__table__.c if c.name not in {"id", "card"}]
_ADAPTER = [c for c in Adapter.__table__.c if c.name not in {"repo_id", "skill_names", "tier"}]


def load(
    connection: Connection, ids: Sequence[int], *, full: bool = False
) -> tuple[StoredAdapter, ...]:
    """The adapters with these ids, in that order; ids that are not there are left out.

    Args:
        full: with ``config``, ``modules``, ``files`` and the repo's ``card``, which are long.
    """
    found: dict[int, StoredAdapter] = {}
    for start in range(0, len(ids), _MOST_IDS):
        part = list(ids[start : start + _MOST_IDS])
        found |= _load(connection, part, full)
    return tuple(found[i] for i in ids if i in found)


def repo_record(row: Any, card: str) -> RepoRecord:
    """The record of a repo's row; its columns may be among others."""
    return RepoRecord(
        kind=row.repo_kind,
        name=row.repo_name,
        commit=row.repo_commit_id,
        last_modified=row.repo_last_modified,
        license=row.repo_license,
        downloads=row.repo_downloads,
        likes=row.repo_likes,
        tags=tuple(row.repo_tags),
        card=card,
        state=row.repo_state,
        error=row.repo_error,
    )


def repo_columns() -> list[Any]:
    """What :func:`repo_record` needs, the card apart."""
    return [c.label(f"repo_{c.name}") for c in _REPO]


def counts(connection: Connection) -> dict[str, int]:
    """How many there are of each thing."""
    things: dict[str, Any] = {
        "adapters": select(func.count()).select_from(Adapter),
        "local": select(func.count()).where(Adapter.local_path.is_not(None)),
        "repos": select(func.count()).select_from(Repo),
        "broken": select(func.count()).where(Repo.state == "broken"),
        "bases": select(func.count()).select_from(BaseModel),
        "skills": select(func.count()).select_from(Skill),
        "scores": select(func.count()).select_from(Score),
        "mixtures": select(func.count(MixtureMember.mixture_id.distinct())),
    }
    return {name: int(connection.scalar(query)) for name, query in things.items()}


def _load(connection: Connection, ids: list[int], full: bool) -> dict[int, StoredAdapter]:
    query = (
        select(
            *_ADAPTER,
            *repo_columns(),
            BaseModel.name.label("base_name"),
            TargetSet.targets,
            *([AdapterDetail.config, AdapterDetail.files, ModuleSet.modules, Repo.card] * full),
        )
        .join_from(Adapter, Repo, Adapter.repo_id == Repo.id)
        .join(TargetSet, Adapter.target_set_id == TargetSet.id)
        .outerjoin(BaseModel, Adapter.base_id == BaseModel.id)
        .where(Adapter.id.in_(ids))
    )
    if full:
        query = query.join(AdapterDetail, AdapterDetail.adapter_id == Adapter.id).join(
            ModuleSet, Adapter.module_set_id == ModuleSet.id
        )
    rows = connection.execute(query).all()
    skills, scores = _skills(connection, ids), _scores(connection, ids)
    lineages = mixtures(connection, ids)
    return {
        row.id: StoredAdapter(
            id=row.id,
            record=_record(row, full, tuple(skills[row.id]), tuple(scores[row.id])),
            added_at=row.added_at,
            updated_at=row.updated_at,
            mixture=lineages.get(row.id),
        )
        for row in rows
    }


def _record(
    row: Any, full: bool, skills: tuple[SkillRecord, ...], scores: tuple[ScoreRecord, ...]
) -> AdapterRecord:
    return AdapterRecord(
        repo=repo_record(row, row.card if full else ""),
        base=BaseRecord(
            name=row.base_name,
            how=row.base_how,
            declared=row.declared_base,
            revision=row.base_revision,
            digest=row.base_digest,
        ),
        name=row.name,
        subfolder=row.subfolder,
        revision=row.revision,
        peft_type=row.peft_type,
        task_type=row.task_type,
        rank=row.rank,
        ranks={int(rank): n for rank, n in row.ranks.items()},
        alpha=row.alpha,
        use_rslora=row.use_rslora,
        use_dora=row.use_dora,
        targets=tuple(row.targets),
        parameters=row.parameters,
        dtype=row.dtype,
        bytes=row.bytes,
        digest=row.digest,
        local_path=row.local_path,
        weights=row.weights,
        description=row.description,
        config=row.config if full else {},
        modules=tuple(row.modules) if full else (),
        files=tuple(FileRecord(*file) for file in row.files) if full else (),
        skills=skills,
        scores=scores,
    )


def _skills(connection: Connection, ids: Iterable[int]) -> defaultdict[int, list[SkillRecord]]:
    found: defaultdict[int, list[SkillRecord]] = defaultdict(list)
    query = (
        select(AdapterSkill.adapter_id, Skill.name, AdapterSkill.source, AdapterSkill.evidence)
        .join(Skill, Skill.id == AdapterSkill.skill_id)
        .where(AdapterSkill.adapter_id.in_(ids))
        .order_by(Skill.name, AdapterSkill.source)
    )
    for row in connection.execute(query):
        found[row[0]].append(SkillRecord(row[1], cast(SkillSource, row[2]), row[3]))
    return found


def _scores(connection: Connection, ids: Iterable[int]) -> defaultdict[int, list[ScoreRecord]]:
    found: defaultdict[int, list[ScoreRecord]] = defaultdict(list)
    columns = [getattr(Score, name) for name in ScoreRecord.__dataclass_fields__]
    query = (
        select(Score.adapter_id, *columns)
        .where(Score.adapter_id.in_(ids))
        .order_by(Score.task, Score.metric, Score.dataset, Score.few_shot, Score.source, Score.id)
    )
    for adapter_id, *score in connection.execute(query):
        found[adapter_id].append(ScoreRecord(*score))
    return found


def mixtures(connection: Connection, ids: Iterable[int]) -> dict[int, MixtureRecord]:
    """The lineage of those adapters that were composed."""
    rows = connection.execute(
        select(
            Mixture.adapter_id,
            Mixture.name,
            Mixture.method,
            Recipe.yaml,
            Recipe.digest,
            Mixture.seed,
            Mixture.verdict,
        )
        .join(Recipe, Recipe.id == Mixture.recipe_id)
        .where(Mixture.adapter_id.in_(ids))
    ).all()
    if not rows:
        return {}
    columns = [getattr(MixtureMember, name) for name in MemberRecord.__dataclass_fields__]
    members: defaultdict[int, list[MemberRecord]] = defaultdict(list)
    query = (
        select(MixtureMember.mixture_id, *columns)
        .where(MixtureMember.mixture_id.in_([row.adapter_id for row in rows]))
        .order_by(MixtureMember.mixture_id, MixtureMember.position)
    )
    for mixture_id, *member in connection.execute(query):
        members[mixture_id].append(MemberRecord(*member))
    return {
        row.adapter_id: MixtureRecord(
            name=row.name,
            method=row.method,
            recipe_yaml=row.yaml,
            recipe_digest=row.digest,
            seed=row.seed,
            verdict=row.verdict,
            members=tuple(members[row.adapter_id]),
        )
        for row in rows
    }
