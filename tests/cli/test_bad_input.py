"""Every wrong input: which file or name, what is wrong with it, what to do, and the exit status."""

import json
import pickle
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.conftest import edit_config, edit_tensors
from tests.hub.made import adapter


@pytest.fixture
def loads():
    """What is wrong shows only when the base or the adapters are loaded."""


@pytest.fixture(autouse=True)
def nothing_is_loaded(request, monkeypatch):
    """What is wrong is found before any model is loaded, but for tests that take ``loads``."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    if "loads" not in request.fixturenames:
        monkeypatch.setattr("lorahub_registry.evaluate.base.load_base", refuse)


def _said(lorareg, kitchen, *options, code=1, **changes):
    """What ``compose`` says to a recipe with these changes; nothing is left behind."""
    said = lorareg.fails("compose", kitchen.recipe(**changes), *options, code=code)
    assert not kitchen.out.exists()
    assert lorareg("list", "--mixtures", "-q").lines == []
    assert said.count("Error: ") == 1
    return said


# The recipe


def test_a_recipe_that_is_not_there(lorareg):
    assert lorareg.fails("compose", "recipe.yaml") == (
        "Error: recipe.yaml: no such recipe\nHint: give the path of a YAML file; see examples/\n"
    )


def test_a_folder_in_place_of_a_recipe(lorareg, kitchen):
    assert "loras: cannot be read: Is a directory" in lorareg.fails("compose", "loras")


def test_all_that_is_wrong_with_a_recipe_comes_at_once_with_its_lines(lorareg, kitchen):
    recipe = kitchen.recipe(
        method={"type": "learn", "buget": 3}, outptu={"path": "x"}, seed="many", name="../up"
    )
    for words in (("compose", recipe), ("compose", recipe, "--dry-run"),
                  ("recipe", "validate", recipe)):  # fmt: skip
        lines = lorareg.fails(*words).splitlines()
        assert lines[0] == f"Error: {recipe}: not a valid recipe:"
        assert "method.buget: unknown key, did you mean 'budget'?" in lines[2]
        assert [line.split(": ")[1] for line in lines[1:]] == [
            "name", "method.buget", "outptu", "seed",
        ]  # fmt: skip
        text = recipe.read_text().splitlines()
        for line, word in zip(lines[1:], ("../up", "buget", "outptu", "many"), strict=True):
            number = int(line.split()[1].rstrip(":"))
            assert word in text[number - 1]


def test_an_unknown_key_names_the_nearest_one(lorareg, kitchen):
    assert "adaptors: unknown key, did you mean 'adapters'?" in _said(
        lorareg, kitchen, adaptors=["x"]
    )


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "..", ".hidden", "con"])
def test_a_recipe_s_name_is_no_path(name, lorareg, kitchen):
    said = _said(lorareg, kitchen, name=name)
    assert f"name: {name!r} cannot be a name" in said
    assert "no path separators" in said


def test_an_adapter_s_name_is_no_path_and_nothing_else_is_blamed(lorareg, kitchen):
    said = _said(lorareg, kitchen, adapters=[{"ref": "./loras/plain", "name": "../../x"}])
    assert "adapters[0].name: '../../x' cannot be a name" in said
    assert len(said.splitlines()) == 2


def test_a_recipe_without_adapters(lorareg, kitchen):
    assert "adapters: needs at least one" in _said(lorareg, kitchen, adapters=[])


def test_an_unknown_method_lists_the_known_ones(lorareg, kitchen):
    said = _said(lorareg, kitchen, method={"type": "lorahubb"})
    assert "no method 'lorahubb', did you mean 'lorahub'?" in said
    assert "dare_ties, magnitude_prune, learn, lorahub" in said


def test_linear_needs_coefficients(lorareg, kitchen):
    said = _said(lorareg, kitchen, method={"type": "linear"})
    assert said.count("method linear needs its coefficient here") == 2


# Data


def test_a_data_file_that_is_not_there(lorareg, kitchen):
    data = {"train": {"path": "train.jsonl"}, "test": {"path": "gone.jsonl"}}
    said = _said(lorareg, kitchen, data=data)
    assert f"Error: gone.jsonl: no such file ({kitchen / 'gone.jsonl'})" in said
    assert "Hint: relative paths count from the folder of the file that names them" in said


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("rows.jsonl", "", "rows.jsonl: holds no rows"),
        ("rows.jsonl", "\n\n", "rows.jsonl: holds no rows"),
        ("rows.csv", "input,output\n", "rows.csv: holds no rows"),
        ("rows.jsonl", '{"input": "a"}\n', "rows.jsonl, line 1: there is one column only, 'input'"),
        ("rows.csv", "input\na\n", "rows.csv, line 2: there is one column only, 'input'"),
        ("rows.jsonl", '{"input": "a", "output": "b"}\n{"inp', "rows.jsonl, line 2: not JSON"),
        ("rows.jsonl", '{"input": "a", "output": " "}\n', "column 'output', the answer, is empty"),
        ("rows.jsonl", '{"input": "a", "answer": "b"}\n', "there is no column 'output'"),
        ("rows.jsonl", '["a", "b"]\n', "rows.jsonl, line 1: a row must be an object"),
    ],
)
def test_rows_that_cannot_be_used_are_named_with_file_and_line(
    name, text, problem, lorareg, kitchen
):
    (kitchen / name).write_text(text)
    for split in ("train", "test"):
        data = {s: {"path": f"{s}.jsonl"} for s in ("train", "test")} | {split: {"path": name}}
        assert problem in _said(lorareg, kitchen, data=data)


def test_an_unknown_column_tells_the_known_ones(lorareg, kitchen):
    data = {"train": {"path": "train.jsonl", "input": "inptu"}}
    said = _said(lorareg, kitchen, data=data)
    assert "there is no column 'inptu', did you mean 'input'? its columns are input, output" in said
    assert "by `input:` beside the path" in said


# Adapters


def test_adapters_of_two_bases(lorareg, kitchen):
    kitchen.lora("same", "other")
    edit_config(kitchen / "loras/other", base_model_name_or_path="mistralai/Mistral-7B-v0.1")
    said = _said(lorareg, kitchen, adapters=["./loras/plain", "./loras/other"])
    assert "Error: other was made for mistralai/Mistral-7B-v0.1, not for tiny-llama" in said
    assert f"lorareg add {kitchen / 'loras/other'} --base tiny-llama" in said
    assert "or allow_base: true in the recipe (the card will say so)" in said


def test_what_the_hint_says_helps(lorareg, kitchen):
    kitchen.lora("same", "other")
    edit_config(kitchen / "loras/other", base_model_name_or_path="mistralai/Mistral-7B-v0.1")
    lorareg("add", kitchen / "loras/other", "--base", "tiny-llama")
    lorareg("compose", kitchen.recipe(adapters=["./loras/plain", "./loras/other"]), "--dry-run")


def test_an_adapter_that_names_no_base(lorareg, kitchen):
    edit_config(kitchen / "loras/wide", base_model_name_or_path=None)
    said = _said(lorareg, kitchen)
    assert "Error: wide does not say which base it was made for" in said


@pytest.mark.data
@pytest.mark.parametrize("allowed", [False, True])
def test_a_base_of_the_same_width_and_another_depth(allowed, lorareg, kitchen, data):
    said = _said(
        lorareg,
        kitchen,
        base=str(data / "models/aidreams260k"),
        adapters=[str(data / "adapters/stories260k" / name) for name in ("zog", "arr")],
        allow_base=allowed,
    )
    if allowed:
        assert "Error: zog does not fit aidreams260k: model.layers.0.self_attn.k_proj is" in said
        assert "the adapter was made for another base" in said
    else:
        assert "Error: zog was made for stories260k, not for aidreams260k" in said


def test_a_config_that_disagrees_with_its_tensors(lorareg, kitchen):
    edit_config(kitchen / "loras/wide", r=8)
    said = _said(lorareg, kitchen)
    weights = kitchen / "loras/wide/adapter_model.safetensors"
    assert f"Error: {weights}: " in said
    assert "has rank 6, but adapter_config.json says 8" in said
    assert "Hint: the scaling α/r would be wrong; take config and tensors from one save" in said


def test_weights_that_were_cut_off(lorareg, kitchen):
    weights = kitchen / "loras/wide/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    said = _said(lorareg, kitchen)
    assert f"Error: {weights}: " in said
    assert "the file was cut off or is not whole: download it again" in said


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_nan_in_an_adapter(bad, lorareg, kitchen, loads):
    def spoil(tensors):
        tensors[sorted(tensors)[-1]].view(-1)[0] = float(bad)

    edit_tensors(kitchen / "loras/wide", spoil)
    said = _said(lorareg, kitchen)
    assert f"Error: {kitchen / 'loras/wide/adapter_model.safetensors'}: base_model" in said
    assert "holds NaN or infinity" in said
    assert "Hint: leave this adapter out" in said


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("dora", "DoRA scales the whole weight"),
        ("modules_to_save", "it replaces whole modules (modules_to_save)"),
        ("bias", "it changes the base's biases, which are no low-rank deltas: bias is lora_only"),
        ("ia3", "it is IA3, and only LoRA adapters can be summed"),
        ("adalora", "it is ADALORA, and only LoRA adapters can be summed"),
    ],
)
def test_what_no_sum_expresses_is_refused_by_name(kind, why, lorareg, kitchen):
    kitchen.lora(kind)
    said = _said(lorareg, kitchen, adapters=["./loras/plain", f"./loras/{kind}"])
    assert f"Error: {kind}: " in said
    assert why in said


def test_lorahub_refuses_unequal_ranks_and_names_learn(lorareg, kitchen):
    kitchen.lora("same")
    edit_tensors(
        kitchen / "loras/same",
        lambda t: {
            k: v[:2].contiguous() if "lora_A" in k else v[:, :2].contiguous() for k, v in t.items()
        },
    )
    edit_config(kitchen / "loras/same", r=2)
    said = _said(
        lorareg, kitchen, adapters=["./loras/plain", "./loras/same"], method={"type": "lorahub"}
    )
    assert "Error: plain and same cannot be multiplied factor by factor: " in said
    assert "has rank 4 and 2" in said
    assert "Hint: use method: {type: learn}, the exact sum, which takes any ranks" in said


def test_a_pickled_adapter_is_not_loaded(lorareg, kitchen):
    _pickled(kitchen / "loras/wide")
    said = _said(lorareg, kitchen)
    assert f"Error: wide: its weights are a pickle ({kitchen / 'loras/wide'}), which is" in said
    assert "Hint: lorareg convert" in said


def _pickled(folder):
    from safetensors.torch import load_file

    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()


def test_an_adapter_of_no_known_name_names_the_nearest(lorareg, kitchen):
    lorareg("add", "loras")
    said = _said(lorareg, kitchen, adapters=["plane", "wide"])
    assert "Error: the registry knows no adapter or mixture called 'plane'" in said
    assert "Hint: did you mean plain?" in said


def test_one_adapter_twice(lorareg, kitchen):
    said = _said(lorareg, kitchen, adapters=["./loras/plain", "loras/plain"])
    assert "Error: plain stands twice among the adapters" in said


def test_a_search_that_finds_nothing(lorareg, kitchen):
    search = {"search": {"skill": "code"}, "limit": 2}
    said = _said(lorareg, kitchen, adapters=["./loras/plain", search])
    assert "the search among the recipe's adapters finds nothing for the base tiny-llama" in said
    assert "lorareg add FOLDER" in said


def test_an_adapter_of_a_hub_that_cannot_be_reached(lorareg, kitchen):
    said = _said(lorareg, kitchen, adapters=["./loras/plain", "me/gone"])
    assert "Error: me/gone: http://127.0.0.1:9 cannot be reached" in said


def test_a_repo_of_several_adapters_wants_one_named(hub, lorareg, kitchen):
    hub.add_repo("me/many", adapter("a") | adapter("b", fill=2))
    said = _said(lorareg, kitchen, adapters=["./loras/plain", "me/many"])
    assert "Error: me/many holds 2 adapters: a, b" in said
    assert "Hint: name one: me/many/a" in said


# The base


def test_a_base_that_is_not_there(lorareg, kitchen):
    said = _said(lorareg, kitchen, base="./gone")
    assert f"Error: {kitchen / 'gone'}: no config.json there, so no base model" in said


def test_a_family_name_of_several_bases_lists_them(hub, lorareg, kitchen):
    for owner in ("amy", "bob"):
        name = f"{owner}/tiny-1b"
        hub.add_repo(f"me/{owner}", adapter(base=name))
        lorareg("pull", f"me/{owner}")
    said = _said(lorareg, kitchen, base="tiny-1b")
    assert "Error: 'tiny-1b' may be any of 2 bases: amy/tiny-1b, bob/tiny-1b" in said
    assert "Hint: write the one you mean in full" in said


def test_a_base_that_cannot_be_loaded(lorareg, kitchen, loads):
    for file in (kitchen / "tiny-llama").glob("tokenizer*"):
        file.unlink()
    said = _said(lorareg, kitchen)
    assert "Error: the base tiny-llama cannot be loaded: " in said
    assert "config.json, safetensors and a tokenizer" in said


# The output


def test_an_output_folder_that_holds_something(lorareg, kitchen):
    kitchen.out.mkdir(parents=True)
    (kitchen.out / "results.json").write_text("{}")
    said = lorareg.fails("compose", kitchen.recipe())
    assert said == f"Error: {kitchen.out} exists and is not empty\nHint: --force replaces it\n"


def test_an_output_that_is_a_file(lorareg, kitchen):
    said = lorareg.fails("compose", kitchen.recipe(output={"path": "train.jsonl"}), "--force")
    assert f"Error: {kitchen / 'train.jsonl'} is a file" in said


def test_an_output_below_a_file(lorareg, kitchen, loads):
    said = lorareg.fails("compose", kitchen.recipe(output={"path": "train.jsonl/x"}))
    assert f"Error: {kitchen / 'train.jsonl/x'} cannot be written: " in said


def test_a_lock_that_is_not_there_or_none(lorareg, kitchen):
    assert "Error: gone.lock: no such lock" in _said(lorareg, kitchen, "--lock", "gone.lock")
    (kitchen / "bad.lock").write_text("[]")
    assert "Error: bad.lock: not a lorareg lock" in _said(lorareg, kitchen, "--lock", "bad.lock")


# The registry's file


def test_a_registry_that_is_newer_than_the_program(lorareg, kitchen, database):
    _set_revision(database, "9999")
    before = database.read_bytes()
    for words in (("list",), ("add", "loras"), ("compose", kitchen.recipe()), ("db", "upgrade")):
        said = lorareg.fails(*words)
        assert f"Error: the registry {database} is of revision 9999, newer than this" in said
        assert "Hint: update lorareg: pip install --upgrade lorareg" in said
    assert lorareg("db", "status", "-q").out == "newer\n"
    assert database.read_bytes() == before


def _set_revision(path, revision):
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    connection.close()


def test_a_registry_that_is_no_database(lorareg, database):
    database.write_bytes(b"<html>not found</html>" * 400)
    for words in (("list",), ("search", "x"), ("db", "status"), ("db", "upgrade")):
        said = lorareg.fails(*words)
        assert f"Error: the registry {database} is not a SQLite database" in said
        assert "Hint: move the file away" in said


def test_a_registry_that_is_damaged(lorareg, kitchen, database):
    lorareg("add", "loras")
    pages = bytearray(database.read_bytes())
    pages[8192:] = b"\xff" * len(pages[8192:])
    database.write_bytes(pages)
    for leftover in database.parent.glob("*-wal"):
        leftover.unlink()
    for words in (("list",), ("show", "plain"), ("tag", "plain", "--skill", "x")):
        said = lorareg.fails(*words)
        assert f"Error: the registry {database} is damaged" in said
        assert "or restore a backup" in said


def test_another_program_s_database(lorareg, database):
    database.unlink()
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.close()
    said = lorareg.fails("list")
    assert f"Error: {database} is a SQLite file, but not a registry of lorareg" in said
    assert "set LORAREG_HOME to another folder" in said


def test_a_file_in_the_place_of_the_registry_s_folder(lorareg, tmp_path, monkeypatch):
    blocker = tmp_path / "blocker"
    blocker.write_text("")
    for home in (blocker, blocker / "below"):
        monkeypatch.setenv("LORAREG_HOME", str(home))
        said = lorareg.fails("list")
        assert f"Error: the registry's folder {home} cannot be made: " in said
        assert "set LORAREG_HOME to a folder that you may write" in said


# The Hub


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a\\..\\x"])
def test_a_repo_that_names_a_file_outside_its_folder(name, hub, lorareg, tmp_path):
    hub.add_repo("me/evil", adapter() | {name: b"boo"})
    said = lorareg.fails("pull", "me/evil", "--all-files")
    assert "Error: me/evil names a file " in said
    assert "which leads out of its folder: nothing of this repo is taken" in said
    assert "Hint: do not use it" in said
    assert lorareg("list", "-q").out == ""
    assert not [p for p in tmp_path.rglob("x") if p.is_file()]


@pytest.mark.parametrize("ref", ["mistral", "../me/x", "me/x/../y", "me/x@", "me//x", "a b/c"])
def test_what_is_no_hub_id(ref, lorareg):
    said = lorareg.fails("pull", ref, code=2)
    assert f"Error: {ref!r} is not a Hub id" in said
    assert "Hint: write owner/name" in said


def test_a_repo_that_is_not_there(hub, lorareg):
    said = lorareg.fails("pull", "me/gone")
    assert f"Error: me/gone: no such repo on {hub.url}" in said
    assert "check the spelling; if it is private: hf auth login" in said


def test_a_repo_without_adapters(hub, lorareg):
    hub.add_repo("me/model", {"config.json": "{}", "model.safetensors": b"x"})
    assert "me/model holds no adapter: no adapter_config.json" in lorareg.fails("pull", "me/model")


def test_offline_names_what_is_missing(lorareg, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = lorareg.fails("pull", "me/x")
    assert "Error: me/x: offline mode is on, and this is not in the cache" in said
    assert "unset HF_HUB_OFFLINE" in said


def test_a_bare_name_of_a_base_may_have_been_a_folders(lorareg, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = {"version": 1, "name": "m", "base": "mymodel", "method": {"type": "linear"},
              "adapters": [{"ref": "./x", "coefficient": 1}],
              "output": {"path": "out"}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    said = lorareg.fails("compose", tmp_path / "recipe.yaml")
    assert "a folder is written as a path, ./mymodel, and a Hub id with its owner" in said


# Options


@pytest.mark.parametrize("rank", ["abc", "..", "8...64", "-1", "8..b", "", "٣", "1.5"])
def test_a_rank_that_is_none(rank, lorareg):
    said = lorareg.fails("search", "--rank", rank, code=2)
    assert f"Error: {rank!r} is not a rank\nHint: write 16, 8..64, 8.. or ..64\n" == said


def test_a_range_of_ranks_that_is_empty(lorareg):
    assert "no rank is at least 9 and at most 3" in lorareg.fails(
        "search", "--rank", "9..3", code=2
    )


@pytest.mark.parametrize("score", ["gsm8k", "gsm8k=", "=40", "gsm8k=many", "gsm8k=nan"])
def test_a_score_that_is_none(score, lorareg):
    said = lorareg.fails("search", "--min-score", score, code=2)
    assert f"{score!r} is not TASK=NUMBER, as gsm8k=40" in said


def test_a_sort_key_that_is_none(lorareg):
    said = lorareg.fails("search", "--sort", "fame", code=2)
    assert "Error: cannot sort by 'fame'" in said
    assert "downloads, updated, rank, name, score:TASK" in said


@pytest.mark.parametrize("command", ["search", "list"])
@pytest.mark.parametrize("limit", ["0", "-3", "many"])
def test_a_limit_that_is_none(command, limit, lorareg):
    assert "Invalid value for '--limit'" in lorareg.fails(command, "--limit", limit, code=2)


def test_two_formats_at_once(lorareg):
    said = lorareg.fails("list", "--json", "-q", code=2)
    assert "--json and --quiet exclude each other" in said
    assert "'xml' is not one of 'human', 'json', 'quiet'" in lorareg.fails(
        "list", "--format", "xml", code=2
    )


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (("--value", "nan"), 1, "the score gsm8k/accuracy is nan"),
        (("--value", "inf"), 1, "the score gsm8k/accuracy is inf"),
        (("--value", "1", "--metric", " "), 2, "a score needs a task and a metric"),
        (("--value", "1", "--task", ""), 2, "a score needs a task and a metric"),
        (("--value", "1", "--stderr", "nan"), 2, "nan is no standard error"),
        (("--value", "1", "--stderr", "-1"), 2, "-1 is no standard error"),
    ],
)
def test_a_score_that_says_nothing(words, code, problem, lorareg, kitchen):
    lorareg("add", "loras")
    known = ("--task", "gsm8k", "--metric", "accuracy")
    assert problem in lorareg.fails("score", "plain", *known, *words, code=code)
    assert lorareg("show", "plain", "--json").json["scores"] == []


def test_a_skill_without_a_name(lorareg, kitchen):
    lorareg("add", "loras")
    assert "a skill needs a name" in lorareg.fails("tag", "plain", "--skill", " ", code=2)


# Folders and names


def test_a_folder_that_is_not_there(lorareg):
    said = lorareg.fails("add", "./gone")
    assert "Error: ./gone: no such folder" in said
    assert "Hint: give a folder that holds adapters" in said


def test_a_word_that_is_neither_a_folder_nor_known(lorareg):
    said = lorareg.fails("add", "gone")
    assert "Error: gone: neither a folder nor an adapter that the registry knows" in said


def test_a_folder_without_adapters(lorareg, tmp_path):
    said = lorareg.fails("add", tmp_path)
    assert f"Error: {tmp_path}: no adapter_config.json in it or below it" in said


@pytest.mark.parametrize("command", ["show", "remove", "convert", "card"])
def test_a_name_that_the_registry_does_not_know(command, lorareg, kitchen):
    lorareg("add", "loras")
    said = lorareg.fails(command, "plian")
    assert "Error: the registry knows no adapter or mixture called 'plian'" in said
    assert "Hint: did you mean plain?; fill the registry with: lorareg add, pull or sync" in said


def test_a_name_of_several_adapters_lists_them(lorareg, kitchen):
    for folder in ("a", "b"):
        shutil.copytree(kitchen / "loras/plain", kitchen / folder / "twin")
    lorareg("add", "a", "b")
    said = lorareg.fails("show", "twin")
    assert "Error: 'twin' is the name of 2 adapters:" in said
    for folder in ("a", "b"):
        assert f"\n  {kitchen / folder / 'twin'}\n" in said
    assert "Hint: write one of these in full" in said
    shown = lorareg("list", "-q").lines
    assert shown == [str(kitchen / "a/twin"), str(kitchen / "b/twin")]


# Pickles


def test_a_pickle_that_would_run_code_does_not(lorareg, kitchen, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = kitchen / "loras/wide"
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    said = lorareg.fails("convert", folder)
    assert f"Error: {folder / 'adapter_model.bin'}: cannot be read as tensors" in said
    assert "ask its author for safetensors" in said
    assert not (tmp_path / "ran").exists()
    assert not (folder / "adapter_model.safetensors").exists()


def test_what_needs_no_conversion(lorareg, kitchen):
    said = lorareg.fails("convert", "loras/plain")
    assert "adapter_model.safetensors is there already" in said


def test_a_recipe_that_is_json_is_read_too(lorareg, kitchen):
    recipe = kitchen.recipe()
    recipe.write_text(json.dumps(yaml.safe_load(recipe.read_text())))
    assert "a valid recipe" in lorareg("recipe", "validate", recipe).out
