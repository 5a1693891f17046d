"""What is installed: one top-level name, with its resources, that runs from anywhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from the sdist as installers do."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [found] = out.glob("*.whl")
    return found


def test_a_wheel_holds_one_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lorahub_registry"}
    assert "lorahub_registry/_data/cards/mixture.md.jinja" in names
    assert "lorahub_registry/_data/migrations/env.py" in names
    assert "lorahub_registry/py.typed" in names


def test_a_wheel_names_both_console_scripts(wheel):
    archive = zipfile.ZipFile(wheel)
    [entry] = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
    text = archive.read(entry).decode()
    assert "lorareg = lorahub_registry.cli:cli" in text
    assert "hf-lorareg = lorahub_registry.cli:cli" in text


def test_what_a_wheel_holds_runs_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    env = os.environ | {"PYTHONPATH": str(site), "LORAREG_HOME": str(tmp_path / "home")}
    script = (
        "import lorahub_registry, sys; from lorahub_registry import resources;"
        "print(lorahub_registry.__file__); print(resources.folder('cards'));"
        "from lorahub_registry.cli import cli; cli(['search', '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=empty, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    package, cards, found = done.stdout.splitlines()
    assert Path(package).is_relative_to(site)
    assert Path(cards).is_relative_to(site / "lorahub_registry" / "_data")
    assert found == "[]"
    assert (tmp_path / "home" / "registry.sqlite").is_file(), "the migrations were found"


def test_a_checkout_runs_without_being_installed(tmp_path):
    env = os.environ | {"LORAREG_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "db", "status", "--json"],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"state": "missing"' in done.stdout
