"""The examples that train: the factory is valid, the LoraHub story and the shelf's rows hold."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from lorahub_registry.recipes.factory_file import load_factory

ROOT = Path(__file__).resolve().parent.parent


def _script(path, monkeypatch):
    """A script as a module, with its folder where its imports look."""
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_factory_is_valid_and_opens_with_its_command():
    path = ROOT / "examples" / "factory.yaml"
    file = load_factory(path)
    assert file.text.startswith(f"# lorareg train examples/{path.name}")
    plans = {plan.name: plan for plan in file.factory.adapters}
    assert plans["zog"].lora.r == 8
    assert plans["upper"].lora.r == 16
    assert plans["upper"].training.lr_scheduler_type == "cosine"


@pytest.mark.data
def test_the_example_factory_is_the_one_that_is_measured(data, tmp_path, monkeypatch):
    shelf = _script(ROOT / "benchmarks" / "shelf.py", monkeypatch)
    measured = load_factory(shelf.factory(tmp_path, quick=False, seed=0)).factory
    shown = load_factory(ROOT / "examples" / "factory.yaml").factory
    for ours, theirs in zip(shown.adapters, measured.adapters, strict=True):
        assert ours.name == theirs.name
        assert (ours.lora, ours.training, ours.data) == (theirs.lora, theirs.training, theirs.data)


@pytest.mark.data
def test_no_row_of_the_shelf_has_a_sentence_of_a_test_row(data, tmp_path, monkeypatch):
    shelf = _script(ROOT / "benchmarks" / "shelf.py", monkeypatch)
    counts = shelf.write_rows(tmp_path)

    def sentences(rows):
        both = (text for row in rows for text in row.values())
        parts = (s for text in both for s in re.split(r"(?<=[.!?]) ", text))
        return {re.sub(r"^[A-Z][\w ']*: ", "", s).strip() for s in parts}

    for name, count in counts.items():
        rows, test = (
            [json.loads(line) for line in (tmp_path / file).read_text("utf-8").splitlines()]
            for file in (f"{name}.jsonl", f"{name}-test.jsonl")
        )
        assert len(test) == 200
        assert len(rows) == count > 5000
        assert not sentences(rows) & sentences(test), name
        # They look as the task's own do: those are among them.
        own = shelf.task_rows(name, "train")
        assert sum(row in rows for row in own) > 100, name


@pytest.mark.data
@pytest.mark.xdist_group("story")
def test_the_lorahub_story_runs_to_its_proof(data, tmp_path, monkeypatch, capsys):
    story = _script(ROOT / "examples" / "lorahub_story.py", monkeypatch)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    upstream = ["glue_qqp_meaning", "social_i_qa_Check_if_a_random_answer_is_valid_or_not"]
    for name in (*upstream, "qasc_is_correct_1"):
        text = (data / "tasks" / "t0_tasks" / f"{name}.jsonl").read_text("utf-8")
        lines = text.splitlines(keepends=True)
        (tasks / f"{name}.jsonl").write_text("".join(lines[:60]), "utf-8")
    story.main(
        story.options().parse_args(
            [
                *("--tasks", str(tasks), "--out", str(tmp_path / "out"), "--upstream", *upstream),
                *("--base-steps", "10", "--epochs", "4", "--test-rows", "10"),
            ]
        )
    )
    told = capsys.readouterr().out
    assert "2 adapters from one run" in told
    for method in ("lorahub", "learn"):
        results = json.loads((tmp_path / "out" / method / "results.json").read_text("utf-8"))
        names = {row["name"] for row in results["test"]}
        assert names == {"base", *upstream, "uniform average", "mixture"}
        assert {m["name"] for m in results["members"]} == set(upstream)
        assert results["verdict"]["text"] in told
    config = tmp_path / "out" / "upstream" / upstream[0] / "adapter_config.json"
    facts = json.loads(config.read_text("utf-8"))
    assert (facts["r"], facts["lora_alpha"], facts["target_modules"]) == (16, 32, ["q", "v"])
    for name in upstream:
        trained = json.loads((config.parents[1] / name / "results.json").read_text("utf-8"))
        before, after = trained["test"]
        assert after["nll"] < before["nll"] - 0.5
