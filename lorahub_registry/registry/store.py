"""The registry as others use it: one object over one SQLite file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, TracebackType

from sqlalchemy import ColumnElement, delete, insert, select, update
from sqlalchemy.engine import Connection

from lorahub_registry.errors import RegistryError, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry import centroids as placing
from lorahub_registry.registry import columns, engine, families, lineage, lookup, migrate, reader
from lorahub_registry.registry import search as searching
from lorahub_registry.registry.marks import skill_name
from lorahub_registry.registry.records import (
    AdapterRecord,
    CentroidRecord,
    Found,
    MixtureRecord,
    Query,
    RepoKind,
    RepoRecord,
    ScoreRecord,
    SkillRecord,
    StoredAdapter,
    WeightsState,
)
from lorahub_registry.registry.schema import (
    Adapter,
    BaseFolder,
    BaseModel,
    MixtureMember,
    Repo,
    SyncCursor,
)
from lorahub_registry.registry.writer import Change, Writer
from lorahub_registry.settings import Settings


@dataclass(frozen=True)
class PutCounts:
    """What became of many records."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0


class Registry:
    """Adapters, their bases, skills, scores and lineage.

    The file is made at first use, and an older one upgraded (a copy is kept beside it). A registry
    that may not be written can be searched all the same.

    Args:
        path: the SQLite file; None: as the environment says (``LORAREG_HOME``).
        progress: is told of an upgrade.
        clock: tells the time that rows are marked with.

    Raises:
        RegistryError: the file is newer than this program, damaged, or cannot be made.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        progress: Progress = silent,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.path = Settings.from_environment().database if path is None else Path(path)
        migrate.ensure(self.path, progress)
        self._engine = engine.open_engine(self.path)
        self._clock = clock

    def close(self) -> None:
        """Let go of the file."""
        self._engine.dispose()

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Writing

    def put(self, record: AdapterRecord) -> StoredAdapter:
        """Insert or update one adapter; its identity is (repo, subfolder, revision).

        The same record twice changes nothing. Skills and scores that came from the card or a
        dataset are replaced; what the user or a measurement said stays, and so does a base that
        the user gave.
        """
        with self._writing() as connection:
            [outcome] = self._writer(connection).put([record])
            return self._load(connection, outcome.id)

    def put_many(self, records: Iterable[AdapterRecord]) -> PutCounts:
        """Insert or update many adapters: all of them, or none."""
        counts: dict[Change, int] = {"added": 0, "changed": 0, "unchanged": 0}
        with self._writing() as connection:
            for outcome in self._writer(connection).put(records):
                counts[outcome.change] += 1
        return PutCounts(**counts)

    def record_failure(self, repo: RepoRecord) -> None:
        """Remember that a repo could not be indexed, and why; its known adapters stay."""
        with self._writing() as connection:
            self._writer(connection).put_repo(repo)

    def add_mixture(
        self,
        record: AdapterRecord,
        mixture: MixtureRecord,
        fresh: Mapping[str, AdapterRecord] = MappingProxyType({}),
    ) -> StoredAdapter:
        """Insert or update a composed adapter, with what it was made of.

        A member whose ``adapter_id`` is None is looked for by its digest and its ref.

        Args:
            fresh: member name → its record, of those to be indexed along with the mixture.
        """
        with self._writing() as connection:
            *new, made = self._writer(connection).put([*fresh.values(), record])
            ids = {name: outcome.id for name, outcome in zip(fresh, new, strict=True)}
            lineage.put(connection, made.id, mixture, ids)
            return self._load(connection, made.id)

    def remove(self, ref: str) -> StoredAdapter:
        """Forget an adapter (files stay); mixtures made of it keep its name and digest.

        Raises:
            UnknownRef, AmbiguousRef: see :meth:`get`.
        """
        with self._writing() as connection:
            stored = self._load(connection, lookup.find(connection, ref))
            self._forget(connection, [stored.id])
        return stored

    def prune(self, kind: RepoKind, name: str, keep: Collection[str]) -> int:
        """Forget a repo's listed adapters in subfolders other than ``keep``; how many.

        Those whose files are here stay.
        """
        gone = (
            select(Adapter.id)
            .join(Repo, Repo.id == Adapter.repo_id)
            .where(Repo.kind == kind, Repo.name == name, Adapter.local_path.is_(None))
            .where(Adapter.subfolder.not_in(keep))
        )
        with self._writing() as connection:
            ids = list(connection.scalars(gone))
            self._forget(connection, ids, repos=False)
        return len(ids)

    def tag(self, ref: str, skills: Iterable[str], *, remove: bool = False) -> StoredAdapter:
        """Say that an adapter has skills, or has them not (whoever said so before).

        Raises:
            UsageError: an empty name.
            UnknownRef, AmbiguousRef: see :meth:`get`.
        """
        names = list(skills)
        if any(not skill_name(name) for name in names):
            raise UsageError("a skill needs a name", hint="for example: code, math, translation:de")
        with self._writing() as connection:
            id_ = lookup.find(connection, ref)
            marks = self._writer(connection).marks
            if remove:
                changed = bool(marks.remove_skills(id_, names))
            else:
                changed = marks.add_skills(id_, [SkillRecord(name, "user") for name in names])
            return self._touched(connection, id_, changed)

    def score(self, ref: str, score: ScoreRecord) -> StoredAdapter:
        """Add a score; one of the same task, metric, dataset, shots, source and revision goes.

        Raises:
            RegistryError: its value is no number.
            UnknownRef, AmbiguousRef: see :meth:`get`.
        """
        columns.check_score(score, ref)
        with self._writing() as connection:
            id_ = lookup.find(connection, ref)
            changed = self._writer(connection).marks.add_score(id_, score)
            return self._touched(connection, id_, changed)

    def set_base(self, ref: str, name: str) -> StoredAdapter:
        """Say which base an adapter sits on; that stays when it is indexed again.

        Raises:
            UsageError: an empty name.
            UnknownRef, AmbiguousRef: see :meth:`get`.
        """
        if not name.strip():
            raise UsageError("a base needs a name", hint="for example: mistralai/Mistral-7B-v0.1")
        with self._writing() as connection:
            id_ = lookup.find(connection, ref)
            changed = self._writer(connection).give_base(id_, name.strip())
            return self._touched(connection, id_, changed)

    def put_centroid(self, ref: str, centroid: CentroidRecord) -> StoredAdapter:
        """Remember where an adapter's rows lie; what was known for the same base goes.

        Raises:
            RegistryError: it names no base, or its vector is no float32s.
            UnknownRef, AmbiguousRef: see :meth:`get`.
        """
        with self._writing() as connection:
            id_ = lookup.find(connection, ref)
            placing.put(connection, id_, centroid)
            return self._load(connection, id_)

    def place_base(self, name: str, folder: Path) -> None:
        """Remember that a folder of the user's holds the base called ``name``."""
        with self._writing() as connection:
            base_id = families.Bases(connection).resolve(name)
            families.place(connection, str(folder), base_id=base_id)

    def remember_digest(self, folder: Path, stamp: str, digest: str) -> None:
        """Keep the digest of a base's tensors, as long as its files are as ``stamp`` says.

        A registry that may not be written forgets it: that costs time only.
        """
        if engine.may_write(self.path):
            with self._writing() as connection:
                families.place(connection, str(folder), stamp=stamp, digest=digest)

    # Reading

    def get(self, ref: str, *, base: str | None = None) -> StoredAdapter:
        """The adapter that ``ref`` means, with all that is known of it.

        Args:
            ref: ``owner/repo[/sub][@revision]`` (the beginning of a revision will do), a path, or
                the plain name of an adapter or mixture. Without a revision it is the row at the
                repo's current commit, else one whose files are here.
            base: where several have that plain name, only those that answer to this base count.

        Raises:
            UnknownRef: nothing is called so.
            AmbiguousRef: several are.
        """
        with engine.reading(self._engine) as connection:
            return self._load(connection, lookup.find(connection, ref, base))

    def by_id(self, adapter_id: int) -> StoredAdapter:
        """The adapter of that row, as lineage names it."""
        with engine.reading(self._engine) as connection:
            return self._load(connection, adapter_id)

    def search(self, query: Query) -> Found:
        """What the query finds.

        Raises:
            UsageError: an unknown sort key, a negative limit, an empty range.
        """
        with engine.reading(self._engine) as connection:
            return searching.search(connection, query)

    def centroids(self, *, skill: str | None = None) -> placing.Placed:
        """All known centroids and their adapters, by name; only of those with the ``skill``."""
        with engine.reading(self._engine) as connection:
            return placing.load(connection, skill)

    def list(
        self,
        *,
        kind: RepoKind | None = None,
        weights: WeightsState | None = None,
        mixtures: bool = False,
        limit: int | None = None,
    ) -> tuple[StoredAdapter, ...]:
        """Adapters by name, without their long parts (as in :class:`records.Found`).

        Args:
            mixtures: only those that were composed.
        """
        where: list[ColumnElement[bool]] = []
        if kind is not None:
            where.append(Repo.kind == kind)
        if weights is not None:
            where.append(Adapter.weights == weights)
        if mixtures:
            # What was trained has a lineage, too, and no members.
            where.append(Adapter.id.in_(select(MixtureMember.mixture_id)))
        query = (
            select(Adapter.id)
            .join(Repo, Repo.id == Adapter.repo_id)
            .where(*where)
            .order_by(Adapter.name, Adapter.id)
            .limit(limit)
        )
        with engine.reading(self._engine) as connection:
            return reader.load(connection, list(connection.scalars(query)))

    def mixtures_of(self, adapter_id: int) -> tuple[StoredAdapter, ...]:
        """The mixtures that this adapter is a member of, by name."""
        with engine.reading(self._engine) as connection:
            return reader.load(connection, lineage.made_of(connection, adapter_id))

    def base_folder(self, name: str) -> Path | None:
        """Where a base is on this machine; None where that is not known, or no longer true."""
        query = (
            select(BaseFolder.folder)
            .join(BaseModel, BaseModel.id == BaseFolder.base_id)
            .where(BaseModel.folded == name.casefold())
            .order_by(BaseFolder.folder)
        )
        with engine.reading(self._engine) as connection:
            found = [Path(folder) for folder in connection.scalars(query)]
        return next((folder for folder in found if (folder / "config.json").is_file()), None)

    def known_digest(self, folder: Path, stamp: str) -> str | None:
        """The digest of the base in ``folder``, if its files are still as ``stamp`` says."""
        query = select(BaseFolder.digest).where(
            BaseFolder.folder == str(folder), BaseFolder.stamp == stamp
        )
        with engine.reading(self._engine) as connection:
            return connection.scalar(query) or None

    def bases_matching(self, text: str) -> tuple[str, ...]:
        """The known bases that a family name, id or path takes, by name."""
        with engine.reading(self._engine) as connection:
            return families.matching(connection, text).names

    def repo(self, kind: RepoKind, name: str) -> RepoRecord | None:
        """What is known of a repo; its ``commit`` tells a sync whether it changed."""
        query = select(*reader.repo_columns(), Repo.card).where(
            Repo.kind == kind, Repo.name == name
        )
        with engine.reading(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else reader.repo_record(row, row.card)

    def commits(self, kind: RepoKind = "hub") -> Mapping[str, str]:
        """Repo → commit, of all of that kind: what a sync compares a listing with."""
        query = select(Repo.name, Repo.commit_id).where(Repo.kind == kind)
        with engine.reading(self._engine) as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def counts(self) -> dict[str, int]:
        """How many there are of each thing."""
        with engine.reading(self._engine) as connection:
            return reader.counts(connection)

    # Sync

    def cursor(self, name: str) -> str | None:
        """Where a sync of that name has to go on."""
        with engine.reading(self._engine) as connection:
            return connection.scalar(select(SyncCursor.value).where(SyncCursor.name == name))

    def set_cursor(self, name: str, value: str | None) -> None:
        """Remember where to go on; None: from the start."""
        with self._writing() as connection:
            connection.execute(delete(SyncCursor).where(SyncCursor.name == name))
            if value is not None:
                connection.execute(insert(SyncCursor).values(name=name, value=value))

    # Within a transaction

    def _writing(self) -> AbstractContextManager[Connection]:
        if not engine.may_write(self.path):
            raise RegistryError(f"the registry {self.path} is read-only", hint=engine.HOME_HINT)
        return engine.writing(self._engine)

    def _writer(self, connection: Connection) -> Writer:
        return Writer(connection, self._clock())

    def _load(self, connection: Connection, id_: int) -> StoredAdapter:
        [stored] = reader.load(connection, [id_], full=True)
        return stored

    def _touched(self, connection: Connection, id_: int, changed: bool) -> StoredAdapter:
        if changed:
            moment = {"updated_at": self._clock()}
            connection.execute(update(Adapter).where(Adapter.id == id_).values(**moment))
        return self._load(connection, id_)

    def _forget(self, connection: Connection, ids: Collection[int], *, repos: bool = True) -> None:
        places = set(connection.scalars(select(Adapter.repo_id).where(Adapter.id.in_(ids))))
        connection.execute(delete(Adapter).where(Adapter.id.in_(ids)))
        if repos:
            left = select(Adapter.id).where(Adapter.repo_id == Repo.id).exists()
            connection.execute(delete(Repo).where(Repo.id.in_(places), ~left))
