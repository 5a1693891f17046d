"""What is wrong with a factory, its rows or its place: which, what to do, and the exit status."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from lorahub_registry.train.passes import Passes
from tests.cli.conftest import tree
from tests.cli.factories import LORA, open_workshop, shop  # noqa: F401


@pytest.fixture
def unloaded(monkeypatch):
    """What is wrong is found before the base is loaded."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lorahub_registry.evaluate.base.load_base", refuse)


def _said(lorareg, shop, *adapters, dry=True, code=1, words=(), **changes):  # noqa: F811
    """What ``train`` says to such a factory, with ``--dry-run`` and without; nothing is left."""
    path = shop.factory(*adapters, **changes)
    before = tree(shop.folder)
    said = lorareg.fails("train", path, *words, code=code)
    assert said.count("Error: ") == 1
    assert "unexpected" not in said
    assert tree(shop.folder) == before
    assert lorareg("list", "-q").lines == []
    if dry:
        assert lorareg.fails("train", path, "--dry-run", code=code) == said
    return said


def _rows(shop, name, **changed):  # noqa: F811
    """The training rows with other answers in some lines, as ``line3="…"``."""
    rows = [json.loads(line) for line in (shop / "train.jsonl").read_text().splitlines()]
    for line, answer in changed.items():
        rows[int(line.removeprefix("line")) - 1]["output"] = answer
    (shop / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": {"path": name}}


# The factory


def test_no_factory_there(lorareg):
    assert lorareg.fails("train", "factory.yaml") == (
        "Error: factory.yaml: no such factory\nHint: give the path of a YAML file; see examples/\n"
    )
    assert "Missing argument" in lorareg.fails("train", code=2)
    lorareg.fails("train", "factory.yaml", "--max-together", "0", code=2)


def test_all_that_is_wrong_comes_at_once_with_its_lines(lorareg, shop, unloaded):  # noqa: F811
    path = shop.factory(
        {"name": "../up"},
        {"name": "zog", "training": {"learning_rte": 1}},
        seed="many",
    )
    lines = lorareg.fails("train", path).splitlines()
    assert lines[0] == f"Error: {path}: not a valid factory:"
    text = path.read_text().splitlines()
    for line, word in zip(lines[1:], ("../up", "learning_rte", "many"), strict=True):
        assert word in text[int(line.split()[1].rstrip(":")) - 1]
    assert "did you mean 'learning_rate'?" in lines[2]


@pytest.mark.parametrize("other", ["zog", "ZOG"])
def test_a_name_twice(other, lorareg, shop, unloaded):  # noqa: F811
    said = _said(lorareg, shop, {"name": "zog"}, {"name": other})
    assert f"adapters[1].name: {other!r} is the name of adapters[0] already" in said


def test_a_factory_is_no_recipe_and_a_recipe_no_factory(lorareg, shop, kitchen_recipe, unloaded):  # noqa: F811
    said = lorareg.fails("compose", shop.factory())
    assert "is a factory" in said
    assert "lorareg train" in said
    for words in ((), ("--dry-run",)):
        said = lorareg.fails("train", kitchen_recipe, *words)
        assert "is a recipe" in said
        assert "lorareg compose" in said


@pytest.fixture
def kitchen_recipe(shop):  # noqa: F811
    """A recipe in the same folder."""
    path = shop / "recipe.yaml"
    path.write_text(
        "version: 1\nname: blend\nbase: ./tiny-llama\nadapters: [./one, ./two]\n"
        "method: {type: learn}\ndata: {train: {path: train.jsonl}}\noutput: {path: blend}\n"
    )
    return path


# Rows


def test_rows_without_room_for_the_answer_are_counted_and_named(lorareg, shop):  # noqa: F811
    long = " ".join(["aa"] * 50)
    data = _rows(shop, "long.jsonl", line3=long, line6=long) | {"max_length": 24}
    shop.factory({"name": "zog", "data": data})
    told = "2 of 16 train rows are left out: long.jsonl, line 3: its output alone has 149 tokens"
    planned = lorareg("train", "factory.yaml", "--dry-run", "--json")
    assert (planned.json["adapters"][0]["rows"], planned.json["adapters"][0]["dropped"]) == (14, 2)
    assert f"Warning: zog: {told}" in planned.err
    assert "line 6" in planned.err
    assert told in lorareg("train", "factory.yaml", "-q").err
    found = shop.results()
    assert found["data"]["train"]["dropped"] == 2
    assert any(note.startswith(told) for note in found["notes"])
    assert told in " ".join((shop.out / "zog/README.md").read_text().split())


def test_no_row_is_left(lorareg, shop, unloaded):  # noqa: F811
    said = _said(lorareg, shop, {"name": "zog", "data": {"max_length": 2}})
    assert "Error: zog: no row is left of 16: train.jsonl, line 1: its output alone" in said
    assert "Hint: raise max_length" in said


def test_a_template_asks_for_a_column_that_is_not_there(lorareg, shop, unloaded):  # noqa: F811
    said = _said(lorareg, shop, {"name": "zog", "data": {"template": "{{ question }}"}})
    assert "Error: zog: train.jsonl, line 1: data.template cannot be filled" in said
    assert "no column 'question'" in said
    assert "Hint: a template may use: input" in said


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_file(split, lorareg, shop, unloaded):  # noqa: F811
    (shop / "empty.jsonl").write_text("")
    said = _said(lorareg, shop, {"name": "zog", "data": {split: {"path": "empty.jsonl"}}})
    assert said.startswith("Error: zog: empty.jsonl: holds no rows")
    said = _said(lorareg, shop, {"name": "zog", "data": {split: {"path": "gone.jsonl"}}})
    assert said.startswith(f"Error: zog: gone.jsonl: no such file ({shop / 'gone.jsonl'})")


def test_a_share_that_leaves_no_row(lorareg, shop, unloaded):  # noqa: F811
    data = {"train": {"path": "train.jsonl", "limit": 1}, "validation": 0.5}
    said = _said(lorareg, shop, {"name": "zog", "data": data})
    assert "train.jsonl: a share of 0.5 of 1 rows leaves none to learn from" in said


def test_a_token_that_the_model_does_not_know(lorareg, shop, unloaded):  # noqa: F811
    tokenizer = shop.tiny.tokenizer()
    tokenizer.add_tokens(["<zog>"])
    tokenizer.save_pretrained(shop / "tiny-llama")
    said = _said(lorareg, shop, {"name": "zog", "data": _rows(shop, "rows.jsonl", line4="<zog>")})
    assert "Error: zog: rows.jsonl, line 4: token" in said
    assert "'<zog>'" in said
    assert "of its output is none of the model's" in said
    assert "Hint: the tokenizer is larger than the model" in said


def test_a_row_longer_than_the_model(lorareg, shop, unloaded):  # noqa: F811
    data = _rows(shop, "long.jsonl", line3=" ".join(["aa"] * 150)) | {"max_length": 100_000}
    said = _said(lorareg, shop, {"name": "zog", "data": data})
    assert "Error: zog: long.jsonl, line 3: has 459 tokens, and tiny-llama takes 256" in said
    assert "Hint: say max_length: 256 under data" in said


def test_rows_that_change_during_the_run_change_nothing(lorareg, shop, monkeypatch):  # noqa: F811
    shop.factory()
    lorareg("train", "factory.yaml")
    before = shop.results(), shop.tensors()
    through, calls = Passes.gradients, []

    def changing(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            for name in ("train.jsonl", "test.jsonl"):
                (shop / name).write_text('{"input": "zz", "output": "yy"}\n')
        return through(*args, **options)

    monkeypatch.setattr(Passes, "gradients", changing)
    lorareg("train", "factory.yaml", "--force")
    assert len(calls) == 6
    assert shop.tensors() == before[1]
    for key in ("data", "test", "loss"):
        assert shop.results()[key] == before[0][key]


# The base


def test_a_module_that_the_base_lacks(lorareg, shop):  # noqa: F811
    lora = {"target_modules": ["q_proj", "q_prj"]}
    said = _said(lorareg, shop, {"name": "good"}, {"name": "zog", "lora": lora})
    assert "the base has no module 'q_prj'" in said
    assert "zog" in said, "which adapter wants it"
    assert "Hint: its linear modules are: down_proj, gate_proj, k_proj" in said


def test_an_adapter_in_place_of_a_base(lorareg, shop, unloaded):  # noqa: F811
    shutil.copytree(shop.tiny.adapter("plain"), shop / "lora")
    said = _said(lorareg, shop, base="./lora")
    assert f"Error: {shop / 'lora'} is an adapter, and a whole model is wanted here" in said
    said = _said(lorareg, shop, base="./gone")
    assert f"Error: {shop / 'gone'}: no config.json there, so no base model" in said


def test_what_a_seq2seq_base_does_not_take(lorareg, tiny_t5, tmp_path, unloaded):
    there = open_workshop(tiny_t5, tmp_path / "desk" / "t5")
    lora = {"lora": LORA | {"target_modules": ["q", "v"]}}
    text = {"train": {"path": "text.jsonl", "text": "text"}}
    (there / "text.jsonl").write_text('{"text": "aa ab"}\n' * 4)
    said = _said(lorareg, there, {"name": "zog", "data": text, **lora})
    assert "Error: zog: plain text is for causal models, and this base is encoder–decoder" in said
    packed = {"training": {"packing": True}, "data": {"max_length": 64}}
    said = _said(lorareg, there, {"name": "zog", **packed, **lora})
    assert "zog: packing is for causal models, and this base is encoder–decoder" in said
    assert "Hint: " in said


def test_packing_past_a_sliding_window_is_refused(lorareg, shop, unloaded):  # noqa: F811
    config = shop / shop.tiny.name / "config.json"
    facts = json.loads(config.read_text()) | {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16,
    }  # fmt: skip
    config.write_text(json.dumps(facts))
    packed = {"training": {"packing": True}, "data": {"max_length": 32}}
    said = _said(lorareg, shop, {"name": "zog", **packed})
    assert "zog: packing lays rows into 32 tokens" in said
    assert "Hint: max_length of at most 16, or leave out packing" in said


def test_a_start_of_more_directions_than_the_base_has_is_refused(lorareg, shop, unloaded):  # noqa: F811
    lora = {"r": 64, "init_lora_weights": "pissa"}
    said = _said(lorareg, shop, {"name": "zog", "lora": lora})
    assert "zog: init_lora_weights: pissa takes 64 directions out of" in said
    assert "Hint: r of at most" in said


# What is not installed


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is installed")
def test_a_quantised_base_without_the_library(lorareg, shop):  # noqa: F811
    said = _said(lorareg, shop, quantization="4bit")
    assert said == (
        "Error: quantization: 4bit needs bitsandbytes, which is not installed\n"
        "Hint: pip install 'lorareg[bitsandbytes]'\n"
    )


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="it is installed")
def test_tensorboard_without_the_library(lorareg, shop, unloaded):  # noqa: F811
    said = _said(lorareg, shop, words=("--tensorboard", "board"), dry=False, code=2)
    assert said == (
        "Error: TensorBoard is not installed\nHint: pip install 'lorareg[tensorboard]'\n"
    )


# The place


def test_a_place_that_cannot_be_written(lorareg, shop):  # noqa: F811
    (shop / "file").write_text("mine")
    said = _said(lorareg, shop, output={"path": "file"})
    assert said == f"Error: {shop / 'file'} is a file\nHint: name another folder\n"
    said = _said(lorareg, shop, output={"path": "file/out"}, dry=False)
    assert f"Error: {shop / 'file/out'} cannot be written: " in said
    said = _said(lorareg, shop, output={"path": "/proc/nothing/out"}, dry=False)
    assert "Error: /proc/nothing/out cannot be written: " in said
    said = _said(lorareg, shop, output={"path": "tiny-llama"}, words=("--force",))
    assert f"Error: {shop / 'tiny-llama'} holds what this is made of" in said


def test_what_stands_there_is_replaced_by_force_only(lorareg, shop):  # noqa: F811
    shop.factory({"name": "zog"}, {"name": "two"})
    lorareg("train", "factory.yaml")
    before = {p: p.read_bytes() for p in shop.out.rglob("*") if p.is_file()}
    assert lorareg.fails("train", "factory.yaml") == (
        f"Error: {shop.out} exists and is not empty\nHint: --force replaces it\n"
    )
    (shop.out / "zog/notes.txt").write_text("mine")
    said = lorareg.fails("train", "factory.yaml", "--force")
    assert f"{shop.out} holds zog/notes.txt, which lorareg has not written" in said
    assert "Hint: name another folder" in said
    (shop.out / "zog/notes.txt").unlink()
    assert {p: p.read_bytes() for p in shop.out.rglob("*") if p.is_file()} == before
    assert not shop.part.exists()
    shop.factory({"name": "zog", "training": {"max_steps": 2}})
    lorareg("train", "factory.yaml", "--force")
    assert shop.results()["steps"] == 2
    assert not (shop.out / "two").exists()


# Runs that fail


@pytest.mark.parametrize("clip", [1.0, None])
def test_one_that_diverges_is_stopped_and_the_others_go_on(clip, lorareg, shop):  # noqa: F811
    wild = {"learning_rate": 3e38, "max_grad_norm": clip}
    shop.factory({"name": "wild", "training": wild}, {"name": "good", "skills": ["names"]})
    done = lorareg("train", "factory.yaml", code=1)
    assert "Warning: wild: stopped: its loss is not finite at step 2; the others go on" in done.err
    assert "Error: not made: 1 of 2 adapters: wild: its loss is not finite at step 2" in (done.err)
    assert "Hint: a lower learning_rate" in done.err
    [wild_line] = [line for line in done.lines if line.startswith("wild")]
    assert "its loss is not finite at step 2" in wild_line
    assert shop.results("good")["steps"] == 6
    assert not list(shop.out.glob("wild/adapter_*"))
    assert lorareg("list", "-q").lines == ["good"]
    report = json.loads((shop.out / "lorareg.json").read_text())
    assert report["failed"] == {"wild": "its loss is not finite at step 2"}
    # Whole without it, as if it had been alone.
    shop.factory({"name": "good", "skills": ["names"]}, output={"path": "alone"})
    lorareg("train", "factory.yaml")
    alone = json.loads((shop / "alone/good/results.json").read_text())
    told = shop.results("good")["test"][1]["nll"]
    assert told == pytest.approx(alone["test"][1]["nll"], abs=1e-4)
    assert not shop.part.exists()


def test_where_all_diverge_nothing_is_written(lorareg, shop):  # noqa: F811
    wild = {"learning_rate": 3e38}
    shop.factory({"name": "one", "training": wild}, {"name": "two", "training": wild})
    said = lorareg.fails("train", "factory.yaml")
    assert "Error: no adapter came to its end: one: its loss is not finite at step 2; two: " in said
    assert not shop.out.exists()
    assert not shop.part.exists()
    assert lorareg("list", "-q").lines == []


def test_one_that_learned_nothing_is_no_adapter(lorareg, shop):  # noqa: F811
    shop.factory({"name": "idle", "training": {"learning_rate": 1e-30}}, {"name": "good"})
    done = lorareg("train", "factory.yaml", code=1)
    assert "idle, loaded by stock PEFT, changes nothing on its rows" in done.err
    assert "a higher learning_rate" in done.err
    assert "a lower learning_rate" not in done.err
    assert lorareg("list", "-q").lines == ["good"]
    assert not list(shop.out.glob("idle/adapter_*")), "its files look like an adapter's"


def test_where_none_learned_anything_nothing_is_written(lorareg, shop):  # noqa: F811
    shop.factory({"name": "idle", "training": {"learning_rate": 1e-30}})
    said = lorareg.fails("train", "factory.yaml")
    assert "Error: no adapter came to its end: idle" in said
    assert not shop.out.exists()
