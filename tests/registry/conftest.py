"""A real registry in a fresh folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorahub_registry.registry.store import Registry


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry that was made once; the tests work on copies, which is quicker."""
    path = tmp_path_factory.mktemp("made") / "registry.sqlite"
    Registry(path).close()
    return path


@pytest.fixture
def path(empty_file: Path, tmp_path: Path) -> Path:
    """Where the test's registry is."""
    path = tmp_path / "home" / "registry.sqlite"
    path.parent.mkdir()
    path.write_bytes(empty_file.read_bytes())
    return path


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    """An empty registry."""
    with Registry(path) as opened:
        yield opened
