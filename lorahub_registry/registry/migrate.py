"""From no file, or an older one, to the newest revision: all of it or nothing.

Which revision a file has is one SELECT; Alembic is imported only where something is to be done.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorahub_registry import resources
from lorahub_registry.errors import RegistryError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry import engine as sql

REVISIONS = ("0001", "0002")
"""Every revision of ``migrations/versions``, oldest first (a test compares them)."""

State = Literal["missing", "older", "current", "newer"]


@dataclass(frozen=True)
class Status:
    """Where a file stands.

    Attributes:
        revision: its own; None where there is no file yet, or an empty one.
        head: the newest that this program knows.
    """

    path: Path
    revision: str | None
    head: str

    @property
    def state(self) -> State:
        """What is to be done: make it, upgrade it, use it, or update this program."""
        if self.revision is None:
            return "missing"
        if self.revision == self.head:
            return "current"
        return "older" if self.revision in REVISIONS else "newer"


def status(path: Path) -> Status:
    """Read the file's revision.

    Raises:
        RegistryError: it is damaged, or no registry.
    """
    return Status(path, _revision(path), REVISIONS[-1])


def ensure(path: Path, progress: Progress = silent) -> Status:
    """A file that this program can use: made or upgraded where needed.

    Raises:
        RegistryError: it is newer than this program, damaged, or cannot be written.
    """
    found = status(path)
    if found.state == "newer":
        raise RegistryError(
            f"the registry {path} is of revision {found.revision}, newer than this lorareg knows "
            f"({found.head})",
            hint="update lorareg: pip install --upgrade lorareg",
        )
    if found.state == "current":
        return found
    if found.state == "older" and not sql.may_write(path):
        raise RegistryError(
            f"the registry {path} is of an older revision ({found.revision}) and read-only, so "
            "it cannot be upgraded",
            hint="run any lorareg command once as somebody who may write it",
        )
    upgrade(path, progress=progress)
    return status(path)


def upgrade(
    path: Path,
    *,
    to: str = "head",
    scripts: Path | None = None,
    known: Sequence[str] = REVISIONS,
    progress: Progress = silent,
) -> None:
    """Bring the file to revision ``to``; an older file is copied beside itself first.

    Safe beside other processes: the first one does it, the others wait and find it done.

    Args:
        scripts: folder of the migrations, where they are not this program's own.
        known: their revisions, oldest first.

    Raises:
        RegistryError: it failed; the file is as it was.
    """
    sql.make_home(path)
    wanted = known[-1] if to == "head" else to
    with sql.explained(path), closing(sql.migration_connection(path)) as connection:
        # The lock is taken before the revision is read, and off goes what would delete rows
        # when a table is rebuilt: a transaction ignores that switch.
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("BEGIN IMMEDIATE")
        try:
            revision = _revision_of(connection, path)
            if revision != wanted:
                if revision is not None:
                    kept = path.with_name(f"{path.stem}-{revision}.backup{path.suffix}")
                    backup(path, kept)
                    progress.say(
                        f"upgrading the registry from {revision} to {wanted}; "
                        f"{kept} is a copy of it"
                    )
                _run(connection, path, wanted, scripts or resources.folder("migrations"))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        sql.use_wal(connection)


def backup(path: Path, to: Path) -> None:
    """Write a consistent copy of the registry; ``to`` is replaced at once, or left alone.

    Raises:
        RegistryError: there is nothing to copy, or it cannot be written.
    """
    if not path.is_file():
        raise RegistryError(
            f"there is no registry at {path} to copy", hint="nothing to back up yet"
        )
    if to.is_dir() or (to.exists() and to.samefile(path)):
        raise RegistryError(f"{to} cannot hold a copy of the registry", hint="name another file")
    part = None
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=to.parent, prefix=to.name, suffix=".part")
        os.close(handle)
        sql.copy(path, Path(part))
        shutil.copymode(path, part)
        with open(part, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(part, to)
        part = None
    except OSError as error:
        raise RegistryError(
            f"the copy {to} cannot be written: {error.strerror}", hint="name another place"
        ) from error
    finally:
        if part is not None:
            Path(part).unlink(missing_ok=True)


def _run(connection: sqlite3.Connection, path: Path, to: str, scripts: Path) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    # Absolute, as a folder's name may hold the separator of lists.
    config.set_main_option("path_separator", "newline")
    with sql.borrowed(connection) as borrowed:
        config.attributes["connection"] = borrowed
        try:
            command.upgrade(config, to)
        except CommandError as error:
            raise RegistryError(f"the registry {path} cannot be upgraded: {error}") from error
    broken = connection.execute("PRAGMA foreign_key_check").fetchall()
    if broken:
        tables = ", ".join(sorted({row[0] for row in broken}))
        raise RegistryError(
            f"the registry {path} cannot be upgraded: {len(broken)} rows of {tables} would point "
            "to nothing",
            hint="it was left as it was; please report this",
        )


def _revision(path: Path) -> str | None:
    try:
        if path.stat().st_size == 0:
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RegistryError(f"the registry {path} cannot be read: {error.strerror}") from error
    with sql.explained(path), closing(sql.plain_connection(path)) as connection:
        return _revision_of(connection, path)


def _revision_of(connection: sqlite3.Connection, path: Path) -> str | None:
    try:
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError:
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables:
            return None
        row = None
    if row is None:
        raise RegistryError(
            f"{path} is a SQLite file, but not a registry of lorareg",
            hint="set LORAREG_HOME to another folder, or move the file away",
        )
    return str(row[0])
