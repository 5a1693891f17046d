"""Puts adapters into the registry: many at once, each either new, changed or the same.

A chunk of records is looked up together. Those that are new go in by a few bulk inserts; the
others are compared with their rows one by one, and written only where something differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import func, select, update
from sqlalchemy.engine import Connection

from lorahub_registry.registry import columns
from lorahub_registry.registry.engine import dumps, insert_many
from lorahub_registry.registry.families import Bases
from lorahub_registry.registry.marks import Marks
from lorahub_registry.registry.records import AdapterRecord, RepoRecord
from lorahub_registry.registry.schema import (
    Adapter,
    AdapterDetail,
    Repo,
)
from lorahub_registry.registry.shared import SharedLists

Change = Literal["added", "changed", "unchanged"]
Row = dict[str, Any]
_CHUNK = 500


@dataclass(frozen=True)
class Outcome:
    """What became of one record."""

    id: int
    change: Change


@dataclass
class _Repo:
    """A repo's row while its adapters are written."""

    id: int
    commit: str
    downloads: int
    fresh: bool


@dataclass
class _Fresh:
    """Rows that wait for the bulk insert."""

    adapters: list[Row] = field(default_factory=list)
    details: list[Row] = field(default_factory=list)
    skills: list[Row] = field(default_factory=list)
    scores: list[Row] = field(default_factory=list)


class Writer:
    """Writes within one transaction, whose lock it relies on: ids are counted here.

    Args:
        now: the moment that new and changed rows are marked with.
    """

    def __init__(self, connection: Connection, now: datetime) -> None:
        self._connection = connection
        self._now = now
        self._bases = Bases(connection)
        self._lists = SharedLists(connection)
        self.marks = Marks(connection)
        self._next_repo = self._count(Repo.id)
        self._next_adapter = self._count(Adapter.id)

    def put(self, records: Iterable[AdapterRecord]) -> Iterator[Outcome]:
        """Insert or update, in order; identity is (repo, subfolder, revision)."""
        for chunk in _chunks(records):
            yield from self._put_chunk(chunk)

    def put_repo(self, record: RepoRecord) -> None:
        """Insert or update a repo alone."""
        self._repos([record])

    def give_base(self, adapter_id: int, name: str) -> bool:
        """Put an adapter on the base called ``name``, and whether that is another than before."""
        base_id = self._bases.resolve(columns.clean(name))
        new = {"base_id": base_id, "base_how": "given"}
        old = select(Adapter.base_id, Adapter.base_how).where(Adapter.id == adapter_id)
        if tuple(self._connection.execute(old).one()) == tuple(new.values()):
            return False
        self._update(adapter_id, new | {"family_id": self._bases.family_of(base_id)})
        return True

    def _put_chunk(self, chunk: Sequence[AdapterRecord]) -> list[Outcome]:
        repos = self._repos([record.repo for record in chunk])
        there = self._there([repo.id for repo in repos.values() if not repo.fresh])
        fresh = _Fresh()
        outcomes = []
        for record in chunk:
            repo = repos[record.repo.kind, record.repo.name]
            rows = there.get((repo.id, columns.clean(record.subfolder)), {})
            row = self._own_row(record, repo, rows)
            if row is not None:
                outcomes.append(self._revise(record, repo, row, rows))
                continue
            superseded = bool(rows) and record.revision != repo.commit and repo.commit in rows
            id_ = self._add(fresh, record, repo, superseded)
            outcomes.append(Outcome(id_, "added"))
            if rows:
                self._flush(fresh)
                self._supersede(record, repo, id_, rows)
        self._flush(fresh)
        return outcomes

    # Repos

    def _repos(self, records: Sequence[RepoRecord]) -> dict[tuple[str, str], _Repo]:
        wanted = {(r.kind, r.name): columns.repo_columns(r) for r in records}
        names = [row["name"] for row in wanted.values()]
        query = select(Repo.__table__).where(Repo.name.in_(names))
        old = {
            (row["kind"], row["name"]): row for row in self._connection.execute(query).mappings()
        }
        found: dict[tuple[str, str], _Repo] = {}
        new = []
        for key, row in wanted.items():
            known = old.get((row["kind"], row["name"]))
            if known is None:
                new.append({"id": self._next_repo, **row})
                found[key] = _Repo(self._next_repo, row["commit_id"], row["downloads"] or 0, True)
                self._next_repo += 1
                continue
            changed = columns.merged_repo(dict(known), row)
            if changed:
                self._connection.execute(
                    update(Repo).where(Repo.id == known["id"]).values(**changed)
                )
            now = dict(known) | changed
            found[key] = _Repo(now["id"], now["commit_id"], now["downloads"] or 0, False)
        insert_many(self._connection, Repo.__table__, new)
        return found

    # Adapters

    def _there(self, repo_ids: list[int]) -> dict[tuple[int, str], dict[str, Row]]:
        """(repo, subfolder) → revision → row."""
        found: dict[tuple[int, str], dict[str, Row]] = {}
        if repo_ids:
            query = select(Adapter.__table__).where(Adapter.repo_id.in_(repo_ids))
            for row in self._connection.execute(query).mappings():
                rows = found.setdefault((row["repo_id"], row["subfolder"]), {})
                rows[row["revision"]] = dict(row)
        return found

    def _own_row(self, record: AdapterRecord, repo: _Repo, rows: dict[str, Row]) -> Row | None:
        """The row that this record updates.

        When the repo has moved on, the row of a listed adapter moves with it, and with it what
        the user said of it. One whose files are here stays: something may be made of those.
        """
        if record.revision in rows or record.revision != repo.commit:
            return rows.get(record.revision)
        movable = [row for row in rows.values() if row["local_path"] is None]
        return movable[0] if movable else None

    def _add(self, fresh: _Fresh, record: AdapterRecord, repo: _Repo, superseded: bool) -> int:
        id_ = self._next_adapter
        self._next_adapter += 1
        row = self._columns(record)
        skills = self.marks.skills_of(record)
        row |= {
            "id": id_,
            "repo_id": repo.id,
            "downloads": repo.downloads,
            "superseded": superseded,
            "skill_names": "\n".join(sorted({name for name, _source in skills})),
            "added_at": self._now,
            "updated_at": self._now,
        }
        fresh.adapters.append(row)
        fresh.details.append({"adapter_id": id_, **columns.detail_columns(record)})
        fresh.skills += self.marks.skill_rows(id_, row["family_id"], repo.downloads, skills)
        fresh.scores += self.marks.score_rows(id_, self.marks.scores_of(record))
        return id_

    def _flush(self, fresh: _Fresh) -> None:
        for table, rows in (
            (Adapter, fresh.adapters),
            (AdapterDetail, fresh.details),
        ):
            insert_many(self._connection, table.__table__, rows)
            rows.clear()
        self.marks.insert(fresh.skills, fresh.scores)
        fresh.skills.clear()
        fresh.scores.clear()

    def _revise(
        self, record: AdapterRecord, repo: _Repo, row: Row, rows: dict[str, Row]
    ) -> Outcome:
        new = self._columns(record)
        detail = columns.detail_columns(record)
        same_bytes = bool(record.revision) and row["revision"] == record.revision
        old_detail = self._detail(row["id"])
        if same_bytes:
            new = columns.keep_known(row, new, self._lists.modules(()))
            detail["config"] = detail["config"] or old_detail["config"]
            detail["files"] = columns.keep_files(old_detail["files"], detail["files"])
        if row["base_how"] == "given" and new["base_how"] != "given":
            new |= {name: row[name] for name in ("base_id", "family_id", "base_how")}
        new["superseded"] = record.revision != repo.commit and repo.commit in rows
        changed = {name: value for name, value in new.items() if value != row[name]}
        marked = False
        if changed:
            self._update(row["id"], changed)
        if dumps(detail) != dumps(old_detail):
            marked = True
            self._connection.execute(
                update(AdapterDetail).where(AdapterDetail.adapter_id == row["id"]).values(**detail)
            )
        if "digest" in changed and row["digest"] is not None:
            self.marks.forget_measured(row["id"])  # of other tensors
        marked |= self.marks.revise(row["id"], new["family_id"], repo.downloads, record)
        if not (changed or marked):
            return Outcome(row["id"], "unchanged")
        self._update(row["id"], {"updated_at": self._now})
        return Outcome(row["id"], "changed")

    def _supersede(
        self, record: AdapterRecord, repo: _Repo, id_: int, rows: dict[str, Row]
    ) -> None:
        """A new row beside older ones: those are history now, and what the user said goes on."""
        if record.revision == repo.commit:
            for row in rows.values():
                self._update(row["id"], {"superseded": True})
        newest = max(rows.values(), key=lambda row: (row["updated_at"], row["id"]))
        self.marks.copy_user_skills(newest["id"], id_)

    def _columns(self, record: AdapterRecord) -> Row:
        row = columns.adapter_columns(record)
        base_id = None
        if record.base.name:
            base_id = self._bases.resolve(columns.clean(record.base.name))
            if record.base.how != "given":
                self._bases.declare(base_id, row["declared_base"])
        row["base_id"] = base_id
        row["family_id"] = None if base_id is None else self._bases.family_of(base_id)
        row["target_set_id"] = self._lists.targets(record.targets)
        row["module_set_id"] = self._lists.modules(record.modules)
        return row

    def _detail(self, adapter_id: int) -> Row:
        query = select(AdapterDetail.config, AdapterDetail.files).where(
            AdapterDetail.adapter_id == adapter_id
        )
        return dict(self._connection.execute(query).mappings().one())

    def _update(self, adapter_id: int, values: Row) -> None:
        self._connection.execute(update(Adapter).where(Adapter.id == adapter_id).values(**values))

    def _count(self, column: Any) -> int:
        return int(self._connection.scalar(select(func.coalesce(func.max(column), 0))) or 0) + 1


def _chunks(records: Iterable[AdapterRecord]) -> Iterator[list[AdapterRecord]]:
    """Cut so that no chunk holds one adapter twice: each sees what the one before has written."""
    chunk: list[AdapterRecord] = []
    seen: set[tuple[str, str, str]] = set()
    for record in records:
        key = (record.repo.kind, record.repo.name, record.subfolder)
        if key in seen or len(chunk) == _CHUNK:
            yield chunk
            chunk, seen = [], set()
        chunk.append(record)
        seen.add(key)
    if chunk:
        yield chunk
