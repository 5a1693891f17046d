"""All that is SQLite's own: connections, errors, locks, and how user text becomes a match.

The full-text table and its triggers are made by the migrations; their names are used here only.
"""

from __future__ import annotations

import json
import os
import sqlite3
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, ColumnElement, bindparam, create_engine, event, literal_column
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool, StaticPool
from sqlalchemy.sql import FromClause, column, table

from lorahub_registry.errors import RegistryError

_BUSY_SECONDS = 60.0
_WRITES = "lorareg_writes"
dumps = json.JSONEncoder(separators=(",", ":")).encode
"""JSON as it is stored: short, and pure ASCII, which takes any text."""
# What a match in each column of the full-text table counts.
_COLUMN_WEIGHTS = {"name": 10, "title": 6, "skill_names": 8, "tier": 0, "description": 1}
fts = table("adapter_fts", column("rowid"))


def open_engine(path: Path, *, writable: bool | None = None) -> Engine:
    """An engine on an existing file.

    Args:
        writable: None: as the file's permissions say.
    """
    writable = may_write(path) if writable is None else writable
    uri = _uri(path) if writable else _read_only_uri(path)

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(
            uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )

    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        creator=connect,
        poolclass=QueuePool,
        json_serializer=dumps,
    )

    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _record: object) -> None:
        for pragma in (
            "foreign_keys = ON",
            "synchronous = NORMAL",  # in WAL mode a crash loses no consistency by it
            "cache_size = -32768",
            "temp_store = MEMORY",
            "mmap_size = 268435456",
        ):
            connection.execute(f"PRAGMA {pragma}")
        if writable:
            # Nothing to do, but for a copy that was put back in its place.
            use_wal(connection)

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        # A writer takes its lock at once: one that starts as a reader cannot wait for it later.
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def may_write(path: Path) -> bool:
    """Whether the file and its folder (for the journal) may be written."""
    return _writable(path) and _writable(path.parent)


def _writable(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One consistent view of the file."""
    with explained(_path(engine)), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction: all of it, or nothing."""
    with explained(_path(engine)), engine.connect() as connection:
        connection = connection.execution_options(**{_WRITES: True})
        with connection.begin():
            yield connection


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors as ours, with what to do about them.

    Raises:
        RegistryError: the file is locked, read-only, damaged, no database, or the disk is full.
    """
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        original = error.orig if isinstance(error, DBAPIError) else error
        known = _explain(path, original)
        if known is None:
            raise
        raise known from error


def _explain(path: Path, error: object) -> RegistryError | None:
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    away = "move the file away (a new registry is made at the next command), or restore a backup"
    said = {
        sqlite3.SQLITE_BUSY: ("is in use by another process", "try again when that has finished"),
        sqlite3.SQLITE_LOCKED: ("is in use", "try again when that has finished"),
        sqlite3.SQLITE_READONLY: ("is read-only", HOME_HINT),
        sqlite3.SQLITE_PERM: ("may not be opened", HOME_HINT),
        sqlite3.SQLITE_CANTOPEN: ("cannot be opened", HOME_HINT),
        sqlite3.SQLITE_FULL: ("cannot grow: the disk is full", "make room, then run this again"),
        sqlite3.SQLITE_IOERR: ("cannot be read or written: the disk reports an error", away),
        sqlite3.SQLITE_CORRUPT: ("is damaged", away),
        sqlite3.SQLITE_NOTADB: ("is not a SQLite database", away),
    }.get(code)
    return said and RegistryError(f"the registry {path} {said[0]}", hint=said[1])


HOME_HINT = "check its permissions, or set LORAREG_HOME to a folder that you may write"


def make_home(path: Path) -> None:
    """Make the folder that holds the file.

    Raises:
        RegistryError: it cannot be made, or nothing may be written in it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryError(
            f"the registry's folder {path.parent} cannot be made: {error.strerror}",
            hint=HOME_HINT,
        ) from error
    if not _writable(path.parent):
        raise RegistryError(f"the registry's folder {path.parent} is read-only", hint=HOME_HINT)


def plain_connection(path: Path) -> sqlite3.Connection:
    """A connection to an existing file, for a look at it."""
    uri = f"{_uri(path)}?mode=rw" if may_write(path) else _read_only_uri(path)
    return sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)


def migration_connection(path: Path) -> sqlite3.Connection:
    """A connection that makes the file where it is missing; transactions are the caller's."""
    return sqlite3.connect(
        _uri(path), uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )


@contextmanager
def borrowed(connection: sqlite3.Connection) -> Iterator[Connection]:
    """A connection that has a transaction open already, as SQLAlchemy's.

    What is done by it is neither committed nor rolled back here.
    """
    engine = create_engine("sqlite://", creator=lambda: connection, poolclass=StaticPool)
    # The transaction's end is the owner's: SQLAlchemy's own never reaches the file.
    for name in ("do_begin", "do_commit", "do_rollback"):
        setattr(engine.dialect, name, _leave)
    with engine.connect() as lent, lent.begin():
        yield lent


def _leave(_connection: object) -> None:
    pass


def use_wal(connection: sqlite3.Connection) -> None:
    """Readers and the one writer no longer wait for each other. A property of the file.

    Where it cannot be switched on (another process holds the file, a network folder), nothing is
    lost but that.
    """
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError:
        pass


def copy(path: Path, to: Path) -> None:
    """A consistent copy of the file, also while others read and write it."""
    with (
        explained(path),
        closing(plain_connection(path)) as source,
        closing(sqlite3.connect(to)) as target,
    ):
        source.backup(target)
        # A copy is one file: it must not want a journal beside it.
        target.execute("PRAGMA journal_mode = DELETE")


def insert_many(
    connection: Connection, table: FromClause, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Insert rows that all have the same columns, as fast as the driver takes them.

    The driver's own call: SQLAlchemy's handling of each value would double the time.
    """
    if not rows:
        return
    names = list(rows[0])
    values = []
    for name in names:
        impl = table.c[name].type.dialect_impl(connection.dialect)
        process = impl.bind_processor(connection.dialect)
        column_values = [row[name] for row in rows]
        values.append(column_values if process is None else list(map(process, column_values)))
    quoted = ", ".join(f'"{name}"' for name in names)
    marks = ", ".join("?" * len(names))
    sql = f'INSERT INTO "{table.description}" ({quoted}) VALUES ({marks})'
    connection.exec_driver_sql(sql, list(zip(*values, strict=True)))


def match_expression(text: str, *, prefix: bool = False) -> str | None:
    """What to look for in the full-text table; None where the text holds no word.

    Each word is quoted, so that nothing in it is taken for an operator; ``mistral-7b`` becomes
    the phrase "mistral 7b". Characters of which the index makes no word are left out: a phrase
    without one would match nothing.

    Args:
        prefix: the last word may go on.
    """
    cut = ["".join(c if _in_word(c) else " " for c in word).split() for word in text.split()]
    # Marks belong to the letter before them; without one they are no word either.
    words = [[part for part in parts if any(_starts_word(c) for c in part)] for parts in cut]
    phrases = ['"' + " ".join(parts) + '"' for parts in words if parts]
    if not phrases:
        return None
    if prefix:
        phrases[-1] += "*"
    return " AND ".join(phrases)


def _starts_word(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LN" or category == "Co"


def _in_word(character: str) -> bool:
    return _starts_word(character) or unicodedata.category(character)[0] == "M"


def matches() -> ColumnElement[bool]:
    """The condition that a full-text row matches what is bound as ``words``."""
    return literal_column("adapter_fts").op("MATCH", is_comparison=True)(bindparam("words"))


def relevance() -> ColumnElement[float]:
    """How well a row matches: the smaller, the better."""
    return literal_column(
        f"bm25(adapter_fts, {', '.join(str(w) for w in _COLUMN_WEIGHTS.values())})"
    )


def _path(engine: Engine) -> Path:
    return Path(engine.url.database or "")


def _uri(path: Path) -> str:
    return path.absolute().as_uri()


def _read_only_uri(path: Path) -> str:
    # In WAL mode even a reader writes, beside the file. Where that is not allowed and nobody has
    # left anything there, the file may be read as one that does not change.
    uri = f"{_uri(path)}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        journal = path.with_name(path.name + "-wal")
        if path.is_file() and not (journal.exists() and journal.stat().st_size):
            return uri + "&immutable=1"
    return uri
