"""A pickle becomes safetensors in a child process, or is refused; nothing of it ever runs here."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorahub_registry
from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.errors import BrokenAdapter, ForeignFormat, OutputError, UnknownRef
from lorahub_registry.weights.convert import convert
from lorahub_registry.weights.files import load_deltas
from tests import tiny
from tests.adapters.making import Q, adapter

KEY = f"base_model.model.{Q}.lora_%s.weight"


def pickled(folder: Path, content: Any = None, **more: Any) -> Path:
    """An adapter whose weights are a ``.bin``."""
    adapter(folder, **more)
    (folder / "adapter_model.safetensors").unlink()
    if content is None:
        content = {KEY % "A": torch.ones(4, 8), KEY % "B": torch.ones(8, 4)}
    if isinstance(content, bytes):
        (folder / "adapter_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "adapter_model.bin")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_a_pickle_becomes_the_same_adapter(
    tiny_llama: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_llama.adapter("patterns")
    folder = tmp_path / "old"
    shutil.copytree(source, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    # All views of one storage, which safetensors cannot hold as they are.
    whole = torch.cat([tensor.flatten() for tensor in tensors.values()])
    parts = whole.split([tensor.numel() for tensor in tensors.values()])
    views = {n: p.view_as(t) for (n, t), p in zip(tensors.items(), parts, strict=True)}
    torch.save(views, folder / "adapter_model.bin")
    before = (folder / "adapter_model.bin").read_bytes()
    # What the child imports comes from the installation, not from where we are or PYTHONPATH.
    canary = tmp_path / "canary"
    (tmp_path / "torch.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    facts = convert(folder)

    assert not canary.exists()
    assert facts == read_facts(folder)
    assert (folder / "adapter_model.bin").read_bytes() == before
    new, old = load_deltas(folder, facts), load_deltas(source, read_facts(source))
    assert new.keys() == old.keys()
    assert all(torch.equal(new[n].b, old[n].b) and torch.equal(new[n].a, old[n].a) for n in old)
    assert (folder / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    assert files(folder) == ["README.md", "adapter_config.json", "adapter_model.bin",
                             "adapter_model.safetensors"]  # fmt: skip


@pytest.mark.parametrize("legacy", [True, False], ids=["plain pickle", "torch.save"])
def test_a_pickle_that_would_run_code_runs_none(tmp_path: Path, legacy: bool) -> None:
    canary = tmp_path / "canary"
    content = {KEY % "A": torch.ones(4, 8), "evil": Canary(canary)}
    folder = pickled(tmp_path / "x", pickle.dumps(content) if legacy else content)
    with pytest.raises(BrokenAdapter, match="cannot be read as tensors") as caught:
        convert(folder)
    assert not canary.exists()
    assert "safetensors" in (caught.value.hint or "")
    assert files(folder) == ["adapter_config.json", "adapter_model.bin"]


def test_reading_facts_runs_none_of_it_either(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = pickled(tmp_path / "x", pickle.dumps(Canary(canary)))
    assert read_facts(folder).weights == "pickle"
    assert not canary.exists()


def test_what_holds_more_than_named_tensors_is_refused(tmp_path: Path) -> None:
    folder = pickled(tmp_path, {KEY % "A": torch.ones(4, 8), "epoch": 5})
    with pytest.raises(BrokenAdapter, match="something else than named tensors"):
        convert(folder)
    assert files(folder) == ["adapter_config.json", "adapter_model.bin"]


def test_tensors_that_are_not_the_configs_are_refused_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(source: Path, target: Path, *_: Any) -> None:
        save_file({KEY % "A": torch.ones(16, 8), KEY % "B": torch.ones(8, 16)}, target)

    monkeypatch.setattr("lorahub_registry.weights.convert._run", child)
    folder = pickled(tmp_path)
    with pytest.raises(BrokenAdapter, match="rank 16, but"):
        convert(folder)
    assert files(folder) == ["adapter_config.json", "adapter_model.bin"]


def test_a_child_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    folder = pickled(tmp_path)
    with pytest.raises(BrokenAdapter, match="not read within 0 s") as caught:
        convert(folder, timeout_s=1e-3)
    assert "--timeout" in (caught.value.hint or "")
    assert files(folder) == ["adapter_config.json", "adapter_model.bin"]


@pytest.mark.skipif(os.name != "posix" or not Path("/proc").is_dir(), reason="limits are Linux's")
def test_a_child_that_takes_too_much_memory_is_refused(tmp_path: Path) -> None:
    tall = {KEY % "A": torch.ones(4, 8), KEY % "B": torch.ones(4 << 20, 4)}
    with pytest.raises(BrokenAdapter):
        convert(pickled(tmp_path, tall), memory=16 << 20)
    assert files(tmp_path) == ["adapter_config.json", "adapter_model.bin"]


def test_safetensors_that_are_there_are_not_written_over(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    before = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(OutputError, match="is there already"):
        convert(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_a_folder_without_pickle_has_nothing_to_convert(tmp_path: Path) -> None:
    folder = pickled(tmp_path)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UnknownRef, match=r"no adapter_model\.bin"):
        convert(folder)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sherryxzhao__lora_alpaca__output", "cannot be read as tensors"),
        ("wujindou__BLOOM-LORA", "merged LoRA of PEFT before 0.3"),
        ("Inishpy__lerobot-libero", None),
    ],
)
def test_the_wild_pickles_are_refused_by_name(
    data: Path, tmp_path: Path, name: str, said: str | None
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for source in (data / "adapters" / "wild" / name).iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    before = files(folder)
    if said is None:
        with pytest.raises(ForeignFormat, match="no 'peft_type'"):
            convert(folder)
    else:
        with pytest.raises(BrokenAdapter, match=said):
            convert(folder)
    assert files(folder) == before


def test_convert_is_the_only_place_that_unpickles() -> None:
    package = Path(lorahub_registry.__file__).parent
    unpicklers = ("torch.load", "pickle.load", "import pickle", "import dill", "import joblib",
                  "allow_pickle=True", "weights_only=False", "trust_remote_code=True")  # fmt: skip
    found = {
        (path.relative_to(package).as_posix(), word)
        for path in package.rglob("*.py")
        for word in unpicklers
        if word in path.read_text("utf-8")
    }
    assert found == {("weights/convert.py", "torch.load")}
    assert "weights_only=True" in (package / "weights" / "convert.py").read_text("utf-8")
