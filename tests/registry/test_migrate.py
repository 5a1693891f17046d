"""From any older file to the newest, without losing a row; and never half way."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from lorahub_registry import resources
from lorahub_registry.errors import RegistryError
from lorahub_registry.registry import migrate
from lorahub_registry.registry.engine import open_engine
from lorahub_registry.registry.records import Query
from lorahub_registry.registry.schema import Base
from lorahub_registry.registry.store import Registry
from tests.registry.make_revision import REVISIONS, contents
from tests.registry.making import adapter

NEXT = """
import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "{after}"
branch_labels = None
depends_on = None


def upgrade():
    with op.batch_alter_table("repo") as batch:
        batch.add_column(sa.Column("added", sa.String(), nullable=True))
        batch.alter_column("license", new_column_name="licence")
    {then}
"""


class Talk:
    """Collects what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def scripts(folder: Path, then: str = "pass") -> Path:
    """A copy of the migrations with one more, that rebuilds a table with children."""
    copy = folder / "migrations"
    shutil.copytree(resources.folder("migrations"), copy)
    text = NEXT.format(after=migrate.REVISIONS[-1], then=then)
    (copy / "versions" / "0003_next.py").write_text(text, encoding="utf-8")
    return copy


def revision_file(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "registry.sqlite"
    path.parent.mkdir()
    shutil.copy(REVISIONS / f"{migrate.REVISIONS[-1]}.sqlite", path)
    return path


def test_the_revisions_that_are_known_are_those_there_are() -> None:
    config = Config()
    config.set_main_option("script_location", str(resources.folder("migrations")))
    steps = ScriptDirectory.from_config(config).walk_revisions()
    assert tuple(reversed([step.revision for step in steps])) == migrate.REVISIONS


def test_every_revision_has_its_file() -> None:
    assert [p.stem for p in sorted(REVISIONS.glob("*.sqlite"))] == list(migrate.REVISIONS)


def test_migrations_import_nothing_of_the_package() -> None:
    for script in resources.folder("migrations").rglob("*.py"):
        code = script.read_text(encoding="utf-8")
        assert "import lorahub" not in code
        assert "from lorahub" not in code


def test_the_tables_are_what_the_models_say(path: Path) -> None:
    engine = open_engine(path)
    with engine.connect() as connection:

        def ours(thing: Any, name: str | None, kind: str, *_: Any) -> bool:
            return not (kind == "table" and (name or "").startswith("adapter_fts"))

        context = MigrationContext.configure(
            connection,
            opts={
                "include_object": ours,
                "compare_type": True,
                "compare_server_default": True,
                "target_metadata": Base.metadata,
            },
        )
        assert compare_metadata(context, Base.metadata) == []
        names = {
            index["name"]
            for table in Base.metadata.tables
            for index in connection.dialect.get_indexes(connection, table)
        }
    engine.dispose()
    assert names >= {str(i.name) for t in Base.metadata.tables.values() for i in t.indexes}


@pytest.mark.parametrize("revision", migrate.REVISIONS)
def test_an_old_file_is_upgraded_and_loses_nothing(tmp_path: Path, revision: str) -> None:
    path = tmp_path / "registry.sqlite"
    shutil.copy(REVISIONS / f"{revision}.sqlite", path)
    kept = json.loads((REVISIONS / f"{revision}.json").read_text(encoding="utf-8"))
    with Registry(path) as registry:
        now = contents(path)
        for table, rows in kept.items():
            assert len(now[table]) == len(rows), table
        assert {a.record.name for a in registry.list()} == {"code-lora", "sql", "zog", "mix"}
        assert registry.get("zog").record.base.how == "given"
        found = registry.search(Query(base="mistral-7b", skills=("code",), text="bob"))
        assert [a.record.name for a in found.adapters] == ["code-lora"]
        assert registry.cursor("hub") == "page 3"
        lineage = registry.get("mix").mixture
        assert lineage is not None
        assert [m.coefficient for m in lineage.members] == [0.7, None]
    if revision == migrate.REVISIONS[-1]:
        assert now == kept


def test_an_upgrade_keeps_a_copy_says_so_and_spares_the_children(tmp_path: Path) -> None:
    path, talk = revision_file(tmp_path), Talk()
    before = contents(path)
    known = (*migrate.REVISIONS, "0003")
    migrate.upgrade(path, scripts=scripts(tmp_path), known=known, progress=talk)  # type: ignore[arg-type]
    after = contents(path)
    # A rebuilt table must not take along the rows that point to it.
    assert {t: len(rows) for t, rows in after.items()} == {t: len(r) for t, r in before.items()}
    assert after["repo"][0]["licence"] is not None or after["repo"][-1]["licence"] is not None
    copy = path.with_name(f"registry-{migrate.REVISIONS[-1]}.backup.sqlite")
    assert contents(copy) == before
    assert [line for line in talk.lines if migrate.REVISIONS[-1] in line and str(copy) in line]
    assert migrate.status(copy).state == "current"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    "then",
    [
        "raise ValueError('half way')",
        "op.execute('UPDATE adapter SET repo_id = 999')",
        "op.execute('SELECT nonsense')",
        "import sys; sys.exit(3)",
    ],
)
def test_a_failed_upgrade_leaves_the_old_state(tmp_path: Path, then: str) -> None:
    path = revision_file(tmp_path)
    before = contents(path)
    with pytest.raises(BaseException):  # noqa: B017
        migrate.upgrade(path, scripts=scripts(tmp_path, then), known=(*migrate.REVISIONS, "0003"))
    assert contents(path) == before
    assert migrate.status(path).state == "current"
    with closing(sqlite3.connect(path)) as connection:
        left = "SELECT count(*) FROM sqlite_master WHERE name LIKE '_alembic_tmp%'"
        assert connection.execute(left).fetchone() == (0,)
    with Registry(path) as registry:
        registry.put(adapter("new/one"))
        assert registry.search(Query(text="bob")).total == 1


def test_rows_that_would_point_to_nothing_are_told(tmp_path: Path) -> None:
    path = revision_file(tmp_path)
    bad = scripts(tmp_path, "op.execute('UPDATE adapter SET repo_id = 999 + id')")
    with pytest.raises(RegistryError, match="rows of adapter would point to nothing"):
        migrate.upgrade(path, scripts=bad, known=(*migrate.REVISIONS, "0003"))


def test_a_newer_file_tells_to_update(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    assert migrate.status(path).state == "newer"
    with pytest.raises(RegistryError, match="9999, newer than this lorareg") as caught:
        Registry(path)
    assert "pip install --upgrade lorareg" in (caught.value.hint or "")


def test_an_older_file_is_upgraded_when_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = revision_file(tmp_path), tmp_path / "package"
    scripts(folder, "op.execute('SELECT 1')")
    monkeypatch.setattr(resources, "folder", lambda name: folder / name)
    monkeypatch.setattr(migrate, "REVISIONS", ("0001", "0002", "0003"))
    monkeypatch.setitem(migrate.upgrade.__kwdefaults__, "known", ("0001", "0002", "0003"))
    talk = Talk()
    assert migrate.ensure(path, talk).state == "current"  # type: ignore[arg-type]
    assert len(talk.lines) == 1
    assert migrate.ensure(path, talk).revision == "0003"  # type: ignore[arg-type]
    assert len(talk.lines) == 1


def test_two_processes_may_be_first_at_once(tmp_path: Path) -> None:
    path = tmp_path / "home" / "registry.sqlite"
    code = (
        "import sys; from pathlib import Path; sys.stdin.read(1)\n"
        "from lorahub_registry.registry.store import Registry\n"
        "from tests.registry.making import adapter\n"
        "with Registry(Path(sys.argv[1])) as r:\n"
        "    for i in range(20): r.put(adapter(f'{sys.argv[2]}/r{i}'))\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), name],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("ann", "bob", "cyd")
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go")
        child.stdin.flush()
    for child in children:
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors
    with Registry(path) as registry:
        assert registry.counts()["adapters"] == 60


def test_a_copy_replaces_its_target_at_once_or_not(path: Path, tmp_path: Path) -> None:
    to = tmp_path / "kept" / "copy.sqlite"
    with Registry(path) as registry:
        registry.put(adapter())
        migrate.backup(path, to)
        assert contents(to) == contents(path)
        registry.put(adapter("bob/y"))
        migrate.backup(path, to)
    assert len(contents(to)["adapter"]) == 2
    assert [p.name for p in to.parent.iterdir()] == ["copy.sqlite"]
    for bad in (path, to.parent, to / "below"):
        with pytest.raises(RegistryError):
            migrate.backup(path, bad)
    with pytest.raises(RegistryError, match="no registry"):
        migrate.backup(tmp_path / "nowhere", to)
    assert len(contents(to)["adapter"]) == 2


def test_a_copy_that_is_put_back_is_a_registry_again(path: Path, tmp_path: Path) -> None:
    with Registry(path) as registry:
        registry.put(adapter())
    migrate.backup(path, tmp_path / "copy.sqlite")
    path.unlink()
    shutil.move(tmp_path / "copy.sqlite", path)
    with Registry(path) as registry:
        assert registry.search(Query(text="code")).total == 1
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
