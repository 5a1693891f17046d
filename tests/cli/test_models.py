"""What extract, dare and merge have in common: models from the Hub, and disks that are full."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorahub_registry.weights.stream.part import unfinished
from tests.cli.conftest import ROOT
from tests.weights import two


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def pair(tmp_path):
    """A model and one that was tuned from it, of several shards."""
    base = two.model("Llama")
    return (
        two.save(base, tmp_path / "plain", max_shard_size="20KB"),
        two.save(two.tuned(base), tmp_path / "tuned"),
    )


def test_models_of_the_hub_are_pulled_and_pinned(lorareg, hub, pair, tmp_path):
    repos = [hub.add_repo(f"me/{f.name}", files(f)) for f in pair]
    names = {"--base": "me/plain", "--tuned": "me/tuned"}
    words = [word for item in names.items() for word in item]
    made = lorareg("extract", *words, "--rank", "4", "--out", tmp_path / "lora", "--json").json
    for side, name, repo in zip(("base", "tuned"), names.values(), repos, strict=True):
        assert made["report"][side]["name"] == name
        assert made["report"][side]["revision"] == repo.head.oid
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/plain"
    assert config["revision"] == made["report"]["base"]["revision"]
    lorareg("dare", *words, "--out", tmp_path / "thin")
    lorareg("merge", "--base", "me/plain", "--adapter", "lora", "--out", tmp_path / "merged")
    for name in ("thin", "merged"):
        report = (tmp_path / name / "lorareg.json").read_text()
        assert json.loads(report)["base"]["name"] == "me/plain"
        assert str(tmp_path) not in report
    assert sorted(p.name for p in (tmp_path / "merged").glob("*.safetensors")) == sorted(
        p.name for p in pair[0].glob("*.safetensors")
    )
    # What was pulled stands in the cache: nothing is asked for again.
    asked = len(hub.requests)
    lorareg("compare", "me/plain", "me/tuned", "--format", "quiet")
    assert not [r for r in hub.requests[asked:] if "safetensors" in r.path]


@pytest.mark.parametrize("command", ["dare", "merge", "extract"])
def test_a_full_disk_is_told_and_the_old_output_stays(lorareg, tmp_path, command):
    model = two.model("Llama", hidden_size=128, intermediate_size=344)
    base = str(two.save(model, tmp_path / "plain"))
    tuned = str(two.save(two.tuned(model), tmp_path / "tuned"))
    lorareg("extract", "--base", base, "--tuned", tuned, "--rank", "8", "--out", tmp_path / "lora")
    out = tmp_path / "out"
    words = {
        "dare": ["--base", base, "--tuned", tuned],
        "merge": ["--base", base, "--adapter", str(tmp_path / "lora")],
        "extract": ["--base", base, "--tuned", tuned, "--rest", "ignore"],
    }[command]
    lorareg(command, *words, "--out", out)
    before = files(out)
    done = subprocess.run(
        [sys.executable, "-m", "lorahub_registry", command, *words, "--out", str(out), "--force"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # No file may grow beyond this: what a disk without room answers, but for the number.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000)),
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert files(out) == before
    # With room again the same command does it, from wherever it was.
    lorareg(command, *words, "--out", out, "--force")
    assert not unfinished(out).exists()


def test_tensors_that_no_module_has_are_told(lorareg, pair, tmp_path):
    folders = [two.save(two.model("Llama"), tmp_path / name) for name in ("one", "other")]
    for folder, size in zip(folders, (1.0, 2.0), strict=True):
        tensors = load_file(folder / "model.safetensors")
        tensors |= {"draft.weight": torch.full((3, 3), size), "draft.count": torch.arange(3)}
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * size
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = lorareg("compare", *folders).err
    assert "draft.weight: no module of other has it under that name" in said
    words = "extract", "--base", folders[0], "--tuned", folders[1], "--out", tmp_path / "lora"
    for rest in ("error", "save"):
        assert "draft.weight: no module" in lorareg.fails(*words, "--rest", rest)
    with torch.no_grad():
        tensors = load_file(folders[1] / "model.safetensors")
        for layer in range(2):
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"] += 1e-2
        save_file(tensors, folders[1] / "model.safetensors", metadata={"format": "pt"})
    assert lorareg(*words, "--json").json["report"]["unknown"] == ["draft.weight"]


def test_no_force_replaces_what_an_output_is_made_of(lorareg, pair, tmp_path):
    base, tuned = pair
    models = ["--base", base, "--tuned", tuned]
    lorareg("extract", *models, "--rank", "4", "--out", tmp_path / "lora")
    lorareg("merge", "--base", base, "--adapter", "lora", "--out", tmp_path / "merged")
    merged = ["--base", base, "--tuned", tmp_path / "merged", "--out", tmp_path / "merged"]
    calls = [
        ["extract", *merged],
        ["dare", *merged],
        ["resize", "lora", "--rank", "2", "--out", tmp_path / "lora"],
        ["dare", "--adapter", "lora", "--out", tmp_path / "lora"],
        ["merge", "--base", tmp_path / "merged", "--adapter", "lora", "--out", tmp_path / "merged"],
        ["merge", "--base", base, "--adapter", "lora", "--out", tmp_path / "lora"],
    ]
    before = files(tmp_path / "lora"), files(tmp_path / "merged")
    for call in calls:
        assert "holds what this is made of" in lorareg.fails(*call, "--force")
    assert (files(tmp_path / "lora"), files(tmp_path / "merged")) == before
