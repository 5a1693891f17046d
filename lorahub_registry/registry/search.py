"""Search: by base, skill, text, rank, targets and scores, within milliseconds at a million rows.

Each search is one or a few walks along an index in the order asked for, ended at the limit:

* without text: of every base that the family name takes, its most used adapters (with that
  skill); what the bases give is merged;
* with text: the best matches by BM25. A word that is in too many adapters to weigh them all is
  looked for among the most used ones first, a quarter as used at each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, case, exists, func, or_, select
from sqlalchemy.engine import Connection
from sqlalchemy.orm import aliased

from lorahub_registry.errors import UsageError
from lorahub_registry.registry import families
from lorahub_registry.registry.engine import fts, match_expression, matches, relevance
from lorahub_registry.registry.marks import skill_name
from lorahub_registry.registry.reader import load
from lorahub_registry.registry.records import Found, Query
from lorahub_registry.registry.schema import (
    TIERS,
    Adapter,
    AdapterSkill,
    Mixture,
    Repo,
    Score,
    Skill,
    TargetName,
)

COUNTED = 1000
"""How far results are counted; more than that is ``Found.more``."""
_WEIGHED = 3000
_LESS_IS_BETTER = ("nll", "loss", "perplexity", "ppl", "bpb", "wer", "cer", "ter", "mae", "rmse")
_SORTS = ("downloads", "updated", "rank", "name")
_LEAST_PREFIX = 3
_ALL = 2**31


def search(connection: Connection, query: Query) -> Found:
    """What ``query`` finds.

    Raises:
        UsageError: an unknown sort key, a negative limit, a range upside down.
    """
    _check(query)
    taken = None if query.base is None else families.matching(connection, query.base)
    bases = () if taken is None else taken.names
    plan = _plan(connection, query, taken)
    if plan is None:
        return Found((), 0, bases)
    ids, total = (_by_text if query.text.strip() else _by_index)(connection, query, plan)
    return Found(load(connection, ids), min(total, COUNTED), bases, more=total > COUNTED)


def _check(query: Query) -> None:
    low, high = query.rank
    if query.limit < 0:
        raise UsageError(f"a limit of {query.limit} makes no sense")
    if low is not None and high is not None and low > high:
        raise UsageError(f"no rank is at least {low} and at most {high}")
    if query.sort not in {None, *_SORTS} and not _score_sort(query):
        names = ", ".join([*_SORTS, "score:TASK"])
        raise UsageError(f"cannot sort by {query.sort!r}", hint=f"sort by one of: {names}")


def _score_sort(query: Query) -> str | None:
    kind, _, name = (query.sort or "").partition(":")
    return name.strip() or None if kind == "score" else None


@dataclass(frozen=True)
class _Plan:
    """A query with its names looked up.

    Attributes:
        bases: None where any will do.
        of_repo: a condition is on the repo.
    """

    bases: families.Taken | None
    of_repo: bool
    skills: tuple[int, ...]
    where: tuple[ColumnElement[bool], ...]


def _plan(connection: Connection, query: Query, bases: families.Taken | None) -> _Plan | None:
    """None where something that must be there is in no adapter."""
    names = list(dict.fromkeys(skill_name(name) for name in query.skills))
    found = select(Skill.id).where(Skill.name.in_(names))
    skills = tuple(connection.scalars(found)) if names else ()
    if (bases is not None and not bases.names) or len(skills) < len(names):
        return None
    where: list[ColumnElement[bool]] = [Adapter.superseded.is_(False)]
    low, high = query.rank
    if low is not None:
        where.append(Adapter.rank >= low)
    if high is not None:
        where.append(Adapter.rank <= high)
    if query.peft_type is not None:
        kind = query.peft_type.upper()
        # A composed mixture's own record is that of the plain LoRA in its root.
        composed = select(Mixture.adapter_id).where(func.upper(Mixture.method) == kind)
        where.append(or_(func.upper(Adapter.peft_type) == kind, Adapter.id.in_(composed)))
    if query.license is not None:
        where.append(func.lower(Repo.license) == query.license.lower())
    if query.targets:
        wanted = set(query.targets)
        sets = (
            select(TargetName.set_id)
            .where(TargetName.name.in_(wanted))
            .group_by(TargetName.set_id)
            .having(func.count() == len(wanted))
        )
        where.append(Adapter.target_set_id.in_(sets))
    for name, least in query.min_scores.items():
        # Of errors and losses it is the most that is allowed.
        reached = case(
            (Score.metric.in_(_LESS_IS_BETTER), Score.value <= least), else_=Score.value >= least
        )
        enough = select(Score.adapter_id).where(_scored(name), reached)
        where.append(Adapter.id.in_(enough))
    return _Plan(bases, query.license is not None, skills, tuple(where))


def _scored(name: str) -> ColumnElement[bool]:
    """A score of that task, of that metric, or of ``task/metric``."""
    either = or_(Score.task == name, Score.metric == name)
    task, slash, metric = name.rpartition("/")
    return or_(either, and_(Score.task == task, Score.metric == metric)) if slash else either


def _has(skills: tuple[int, ...]) -> Iterator[ColumnElement[bool]]:
    for skill in skills:
        other = aliased(AdapterSkill)
        has = exists().where(other.adapter_id == Adapter.id, other.skill_id == skill)
        yield has.correlate(Adapter)


def _filtered(plan: _Plan) -> Select[Any]:
    """The ids that a plan takes, for an order that no index has."""
    query = (
        select(Adapter.id)
        .join(Repo, Repo.id == Adapter.repo_id)
        .where(*plan.where, *_has(plan.skills))
    )
    if plan.bases is None:
        return query
    of_family = Adapter.family_id.in_(plan.bases.families)
    if not plan.bases.single:
        return query.where(of_family)
    return query.where(or_(of_family, Adapter.base_id.in_(list(plan.bases.single))))


def _by_index(connection: Connection, query: Query, plan: _Plan) -> tuple[list[int], int]:
    walks = list(_walks(plan))
    total = 0
    for walk in walks:
        total += _count(connection, walk, most=COUNTED - min(total, COUNTED))
    if query.sort not in {None, "downloads"}:
        return _sorted(connection, _filtered(plan), query), total
    found: list[tuple[int, int]] = []
    for walk in walks:
        used, id_ = walk.selected_columns
        rows = connection.execute(walk.order_by(used.desc(), id_.desc()).limit(query.limit))
        found += [(row[0], row[1]) for row in rows]
    return [row[1] for row in sorted(found, reverse=True)[: query.limit]], total


def _walks(plan: _Plan) -> Iterator[Select[Any]]:
    """What a plan takes, as walks along an index that has the most used ones last.

    There is one for each family, and for each base that is taken alone.
    """
    query: Any = select(Adapter.downloads, Adapter.id).where(*plan.where)
    if plan.of_repo:
        query = query.join(Repo, Repo.id == Adapter.repo_id)
    family: Any = Adapter.family_id
    if plan.skills:
        family = AdapterSkill.family_id
        # One adapter may have a skill from several sources.
        query = (
            query.join(AdapterSkill, AdapterSkill.adapter_id == Adapter.id)
            .where(AdapterSkill.skill_id == plan.skills[0], *_has(plan.skills[1:]))
            .with_only_columns(AdapterSkill.downloads, AdapterSkill.adapter_id)
            .distinct()
        )
    if plan.bases is None:
        yield query
        return
    for id_ in plan.bases.families:
        yield query.where(family == id_)
    for base_id, id_ in plan.bases.single.items():
        yield query.where(family == id_, Adapter.base_id == base_id)


def _by_text(connection: Connection, query: Query, plan: _Plan) -> tuple[list[int], int]:
    """Whole words first; where those do not fill the answer, the last word may go on."""
    words = query.text
    ids, total = _matching(connection, query, plan, match_expression(words))
    if len(ids) < query.limit and len(words.split()[-1]) >= _LEAST_PREFIX:
        more = match_expression(words, prefix=True)
        ids, total = _matching(connection, query, plan, more)
    return ids, total


def _matching(
    connection: Connection, query: Query, plan: _Plan, words: str | None
) -> tuple[list[int], int]:
    if words is None:
        return [], 0
    everywhere = _count(connection, select(fts.c.rowid).where(matches()), words, _WEIGHED)
    by_rank = query.sort is None and everywhere <= _WEIGHED
    columns = [fts.c.rowid, relevance().label("distance")] if by_rank else [fts.c.rowid]
    # The limit keeps SQLite from turning this around, and asking of each adapter whether it
    # matches.
    hits = select(*columns).where(matches()).limit(_ALL).subquery()
    rows = _filtered(plan).join(hits, hits.c.rowid == Adapter.id)
    total = _count(connection, rows, words)
    if by_rank:
        best = rows.order_by(hits.c.distance, Adapter.id.desc()).limit(query.limit)
        return list(connection.scalars(best, {"words": words})), total
    if everywhere <= _WEIGHED or query.sort not in {None, "downloads"}:
        return _sorted(connection, rows, query, words), total
    ids: list[int] = []
    for tier in (*(f"zztier{n}" for n in reversed(TIERS)), None):
        among = words if tier is None else f'{words} AND "{tier}"'
        ids = _sorted(connection, rows, query, among)
        if len(ids) >= min(query.limit, total):
            break
    return ids, total


def _sorted(
    connection: Connection, rows: Select[Any], query: Query, words: str | None = None
) -> list[int]:
    bound = {} if words is None else {"words": words}
    used = (Adapter.downloads.desc(), Adapter.id.desc())
    if score := _score_sort(query):
        good = case((Score.metric.in_(_LESS_IS_BETTER), -Score.value), else_=Score.value)
        best = (
            select(Score.adapter_id, func.max(good).label("good"))
            .where(_scored(score))
            .group_by(Score.adapter_id)
            .subquery()
        )
        scored = rows.join(best, best.c.adapter_id == Adapter.id)
        scored = scored.order_by(best.c.good.desc(), *used).limit(query.limit)
        ids = list(connection.scalars(scored, bound))
        if len(ids) < query.limit:
            # Those without that score come after all that have it.
            rest = rows.where(Adapter.id.not_in(select(best.c.adapter_id))).order_by(*used)
            ids += connection.scalars(rest.limit(query.limit - len(ids)), bound)
        return ids
    keys: tuple[Any, ...] = used
    if query.sort == "updated":
        keys = (func.coalesce(Repo.last_modified, Adapter.updated_at).desc(), Adapter.id.desc())
    elif query.sort == "rank":
        keys = (Adapter.rank.desc().nulls_last(), *used)
    elif query.sort == "name":
        keys = (func.lower(Adapter.name), Adapter.name, Adapter.id)
    return list(connection.scalars(rows.order_by(*keys).limit(query.limit), bound))


def _count(
    connection: Connection, rows: Select[Any], words: str | None = None, most: int = COUNTED
) -> int:
    """How many rows there are; ``most + 1`` stands for more than ``most``."""
    some = rows.order_by(None).limit(most + 1).subquery()
    bound = {} if words is None else {"words": words}
    return int(connection.scalar(select(func.count()).select_from(some), bound) or 0)
