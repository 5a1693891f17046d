"""The command line as its users meet it: a folder to work in, a registry, a Hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from lorahub_registry.cli import cli
from lorahub_registry.registry.store import Registry
from tests import tiny
from tests.hub.conftest import hub, logged_in, told, waits  # noqa: F401  (fixtures)

ROOT = Path(__file__).resolve().parents[2]
NO_HUB = "http://127.0.0.1:9"  # nobody listens there


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit status."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, all of it, as JSON that every parser takes."""

        def refuse(name: str) -> None:
            raise ValueError(f"{name} is not JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def lines(self) -> list[str]:
        """Standard output by lines."""
        return self.out.splitlines()


class Lorareg:
    """Runs ``lorareg …`` in this process."""

    def __call__(self, *words: object, code: int = 0, input: str | None = None) -> Done:
        """Run it; the test fails where the exit status is not ``code``."""
        runner = CliRunner()
        result = runner.invoke(cli, [str(w) for w in words], input=input, prog_name="lorareg")
        done = Done(result.exit_code, result.stdout, result.stderr)
        assert done.code == code, f"exit {done.code}\n{done.out}\n{done.err}"
        assert "Traceback" not in done.out + done.err
        return done

    def fails(self, *words: object, code: int = 1) -> str:
        """Run what has to fail without any data; what it says on stderr."""
        done = self(*words, code=code)
        assert done.out == ""
        return done.err


def child(*words: object, **options: Any) -> Done:
    """Run ``lorareg …`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "lorahub_registry", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **options,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry that was made once; tests work on copies, which is quicker."""
    path = tmp_path_factory.mktemp("made") / "registry.sqlite"
    Registry(path).close()
    return path


@pytest.fixture
def database(own_home: None, empty_file: Path) -> Path:
    """The test's own registry, empty."""
    home = Path(os.environ["LORAREG_HOME"])
    home.mkdir()
    return Path(shutil.copy(empty_file, home))


@pytest.fixture(autouse=True)
def alone(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Hub unless a test asks for one, nobody logged in, and a folder to stand in."""
    monkeypatch.setenv("HF_ENDPOINT", NO_HUB)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    desk = tmp_path / "desk"
    desk.mkdir()
    monkeypatch.chdir(desk)


@pytest.fixture
def lorareg() -> Lorareg:
    """``lorareg …``."""
    return Lorareg()


def write_rows(path: Path, rows: list[tuple[str, str]]) -> None:
    """A .jsonl of input and output."""
    lines = [json.dumps({"input": prompt.strip(), "output": answer}) for prompt, answer in rows]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


@dataclass(frozen=True)
class Kitchen:
    """A folder with a tiny base, adapters of it, rows, and the recipes that are written there."""

    folder: Path
    tiny: tiny.Tiny

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def recipe(self, **changes: Any) -> Path:
        """A recipe of two adapters, learned in a few steps, with ``changes``."""
        data: dict[str, Any] = {
            "version": 1,
            "name": "blend",
            "base": "./tiny-llama",
            "adapters": ["./loras/plain", "./loras/wide"],
            "method": {"type": "learn", "budget": 4},
            "data": {"train": {"path": "train.jsonl"}, "test": {"path": "test.jsonl"}},
            "output": {"path": "out/blend"},
            "license": "apache-2.0",
            **changes,
        }
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False), "utf-8")
        return path

    def lora(self, kind: str, name: str | None = None) -> Path:
        """A copy of a PEFT adapter of this kind (see ``tiny.KINDS``) in ``loras/``."""
        target = self.folder / "loras" / (name or kind)
        shutil.copytree(self.tiny.adapter(kind), target)
        return target

    @property
    def out(self) -> Path:
        """Where its recipes write."""
        return self.folder / "out" / "blend"

    def results(self) -> dict[str, Any]:
        """What the mixture's results say."""
        return json.loads((self.out / "results.json").read_text("utf-8"))


@pytest.fixture
def kitchen(tiny_llama: tiny.Tiny, tmp_path: Path) -> Kitchen:
    """Everything for a mixture that takes a blink; the folder one stands in."""
    made = Kitchen(tmp_path / "desk", tiny_llama)
    shutil.copytree(tiny_llama.folder, made / "tiny-llama")
    for kind in ("plain", "wide"):
        made.lora(kind)
    rows = tiny.rows(20)
    write_rows(made / "train.jsonl", rows[:10])
    write_rows(made / "test.jsonl", rows[10:])
    return made


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of an ``adapter_config.json``."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def edit_tensors(
    folder: Path, change: Callable[[dict[str, Any]], Mapping[str, Any] | None]
) -> None:
    """Change an adapter's tensors."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(change(tensors) or tensors), path, metadata={"format": "pt"})


def tree(folder: Path) -> list[str]:
    """Everything below a folder, hidden things too."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
