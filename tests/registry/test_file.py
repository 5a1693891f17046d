"""The file itself: damaged, foreign, in the way, read-only; and what opening it costs."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lorahub_registry.errors import RegistryError
from lorahub_registry.registry.records import Query, ScoreRecord
from lorahub_registry.registry.store import Registry
from tests.registry.making import adapter


@pytest.fixture
def powerless() -> Iterator[None]:
    """Permissions count, also where the tests run as root."""
    if not hasattr(os, "geteuid"):
        pytest.skip("no such permissions here")
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_the_environment_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAREG_HOME", str(tmp_path / "a" / "b c?%"))
    with Registry() as registry:
        registry.put(adapter())
        assert registry.path == tmp_path / "a" / "b c?%" / "registry.sqlite"
    assert Registry().counts()["adapters"] == 1


def test_what_is_no_database_is_told(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    path.write_text("this is a text, and not a short one either" * 100)
    with pytest.raises(RegistryError, match="not a SQLite database") as caught:
        Registry(path)
    assert caught.value.hint
    assert path.read_text().startswith("this is a text")


def test_somebody_elses_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE photos (id)")
    before = path.read_bytes()
    with pytest.raises(RegistryError, match="not a registry"):
        Registry(path)
    assert path.read_bytes() == before


def test_an_empty_file_is_made_a_registry(tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite").touch()
    assert Registry(tmp_path / "registry.sqlite").counts()["adapters"] == 0


def test_damage_is_told(path: Path) -> None:
    with Registry(path) as registry:
        registry.put_many(adapter(f"o/r{i}") for i in range(200))
    # The first pages say what tables there are; what the tables hold is lost.
    whole = path.read_bytes()
    path.write_bytes(whole[: 20 * 4096] + b"\xa5" * (len(whole) - 20 * 4096))
    with pytest.raises(RegistryError, match="damaged"):
        Registry(path).search(Query(text="writes", base="mistral", skills=("code",)))


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("in the way")
    with pytest.raises(RegistryError, match="cannot be made") as caught:
        Registry(tmp_path / "home" / "registry.sqlite")
    assert "LORAREG_HOME" in (caught.value.hint or "")


def test_a_folder_in_place_of_the_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite").mkdir()
    with pytest.raises(RegistryError, match="cannot be opened"):
        Registry(tmp_path / "registry.sqlite")


def open_to_all(folder: Path) -> None:
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.getuid() and parent.parent != parent:
            parent.chmod(parent.stat().st_mode | 0o055)


def test_a_home_that_may_not_be_written_is_told(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    open_to_all(home)
    home.chmod(0o555)
    request.getfixturevalue("powerless")
    for path in (home / "registry.sqlite", home / "below" / "registry.sqlite"):
        with pytest.raises(RegistryError, match=r"read-only|cannot be made") as caught:
            Registry(path)
        assert "LORAREG_HOME" in (caught.value.hint or "")


@pytest.mark.parametrize("unfinished", [False, True], ids=["closed", "left open"])
def test_a_read_only_registry_can_be_searched_but_not_changed(
    path: Path, request: pytest.FixtureRequest, unfinished: bool
) -> None:
    with Registry(path) as registry:
        registry.put(adapter())
        registry.search(Query(text="warm"))
    writer = Registry(path)
    if unfinished:
        writer.put(adapter("bob/second"))
    else:
        writer.close()
    open_to_all(path.parent)
    for file in path.parent.iterdir():
        file.chmod(0o444)
    path.parent.chmod(0o555)
    request.getfixturevalue("powerless")
    with Registry(path) as registry:
        assert registry.search(Query(base="mistral-7b")).total == 1 + unfinished
        assert registry.get("code-lora").record.rank == 16
        for change in (
            lambda: registry.put(adapter("bob/z")),
            lambda: registry.remove("code-lora"),
            lambda: registry.score("code-lora", ScoreRecord("t", "m", 1.0)),
        ):
            with pytest.raises(RegistryError, match="read-only"):
                change()
    writer.close()


def test_opening_and_searching_imports_nothing_heavy(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from lorahub_registry.registry.store import Registry\n"
        "from lorahub_registry.registry.records import Query\n"
        "with Registry(Path(sys.argv[1])) as r: r.search(Query(base='mistral-7b', text='x'))\n"
        "heavy = {'torch', 'transformers', 'peft', 'huggingface_hub', 'pydantic', 'click',\n"
        "         'alembic', 'numpy', 'rich', 'jinja2'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
