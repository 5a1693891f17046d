"""Add, list, show, tag, score, search, remove, convert, db: what goes in comes out."""

import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorahub_registry.adapters.kinds import PEFT_TYPES
from lorahub_registry.adapters.mixlora import KINDS
from lorahub_registry.adapters.tensors import file_sha256
from tests.cli.conftest import edit_config, tree
from tests.hub.made import BASE, adapter, card


def test_add_finds_adapters_however_deep_and_names_the_bad_ones(lorareg, kitchen):
    kitchen.lora("same", "deep/down/good")
    kitchen.lora("same", "liar")
    edit_config(kitchen / "loras/liar", r=8)
    kitchen.lora("same", "cut")
    weights = kitchen / "loras/cut/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (kitchen / "loras/mlx").mkdir()
    (kitchen / "loras/mlx/adapter_config.json").write_text('{"lora_parameters": {"rank": 8}}')
    done = lorareg("add", "loras")
    assert [line.split()[0] for line in done.lines[1:]] == ["good", "plain", "wide"]
    warned = [line for line in done.err.splitlines() if line.startswith("Warning: left out: ")]
    assert len(warned) == 3
    for line, folder, why in zip(
        warned,
        ("cut", "liar", "mlx"),
        ("bytes long where its header promises", "but adapter_config.json says 8", "an MLX"),
        strict=True,
    ):
        assert str(kitchen / "loras" / folder) in line
        assert why in line
    assert done.err.splitlines()[-1] == "✓ 3 added or changed, 0 unchanged, 3 left out"
    assert lorareg("list", "-q").lines == ["good", "plain", "wide"]


def test_add_names_a_folder_whose_path_is_no_text(lorareg, kitchen):
    try:
        kitchen.lora("same", os.fsdecode(b"bad\xff"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    kitchen.lora("same", "naïve-模型")
    done = lorareg("add", "loras", "-q")
    assert done.lines == ["naïve-模型", "plain", "wide"]
    assert f"left out: {kitchen / 'loras/bad'}\\udcff: its path is not UTF-8 text" in done.err


def test_add_twice_changes_nothing(lorareg, kitchen):
    lorareg("add", "loras")
    before = lorareg("show", "plain", "--json").json
    assert "✓ 0 added or changed, 2 unchanged, 0 left out" in lorareg("add", "loras").err
    assert lorareg("show", "plain", "--json").json == before


def test_add_of_bad_ones_alone_fails_and_says_why(lorareg, kitchen):
    edit_config(kitchen / "loras/wide", r=8)
    said = lorareg("add", "loras/wide", code=1).err
    assert "but adapter_config.json says 8" in said
    assert said.endswith(
        "Error: none of what is there can be used\nHint: the warnings above say why, one by one\n"
    )


def test_add_with_a_base_is_believed_and_stays(lorareg, kitchen):
    lorareg("add", "loras/plain", "--base", "me/other-1b")
    lorareg("add", "loras/plain")
    shown = lorareg("show", "plain", "--json").json
    assert (shown["base"], shown["base_how"]) == ("me/other-1b", "given")
    assert "me/other-1b (given by the user)" in lorareg("show", "plain").out


def test_add_reads_a_known_adapter_again_by_its_name(lorareg, kitchen):
    lorareg("add", "loras/plain")
    edit_config(kitchen / "loras/plain", lora_alpha=32)
    assert "✓ 1 added or changed" in lorareg("add", "plain").err
    assert lorareg("show", "plain", "--json").json["alpha"] == 32


def test_list_shows_all_that_is_there_or_only_what_is_local(hub, lorareg, kitchen):
    hub.add_repo("me/far", adapter() | {"README.md": card()})
    lorareg("sync", "--base", BASE)
    lorareg("add", "loras")
    assert lorareg("list", "-q").lines == ["me/far", "plain", "wide"]
    assert lorareg("list", "--local", "-q").lines == ["plain", "wide"]
    assert lorareg("list", "--local", "--limit", "1", "-q").lines == ["plain"]
    assert lorareg("list", "--mixtures", "-q").lines == []
    states = {a["ref"]: a["state"] for a in lorareg("list", "--json").json}
    assert states == {"me/far": "listed", "plain": "local", "wide": "local"}
    assert "known from the Hub, not here: lorareg pull me/far" in lorareg("show", "me/far").out


def test_an_empty_list_says_how_to_fill_it(lorareg):
    done = lorareg("list")
    assert "nothing there" in done.err
    for command in ("lorareg sync --base", "lorareg pull OWNER/REPO", "lorareg add FOLDER"):
        assert command in done.err
    assert "the registry is empty" in lorareg("search", "x").err


def test_show_tells_everything_in_words(lorareg, kitchen):
    (kitchen / "loras/wide/README.md").write_text(
        "---\nlicense: mit\ntags: [code]\ndatasets: [gsm8k]\n---\n# Wide\n\nIt writes Python.\n"
    )
    lorareg("add", "loras")
    lorareg("tag", "wide", "--skill", "Chat")
    lorareg("score", "wide", "--task", "mmlu", "--metric", "accuracy", "--value", "41.25",
            "--n", "1319", "--stderr", "0.5")  # fmt: skip
    page = lorareg("show", "wide").out
    weights = kitchen / "loras/wide/adapter_model.safetensors"
    config = json.loads((kitchen / "loras/wide/adapter_config.json").read_text())
    for line in (
        f"adapter     {kitchen / 'loras/wide'}",
        "name        wide",
        f"base        tiny-llama (inferred; its config says {config['base_model_name_or_path']})",
        "kind        LORA CAUSAL_LM",
        "rank        6 in 14 modules",
        "alpha       3.0",
        "licence     mit",
        f"state       on this machine: {kitchen / 'loras/wide'}",
        "about       It writes Python.",
        "  chat  (user: )",
        "  code  (card: tag code)",
        "  math  (dataset: dataset gsm8k)",
        "  mmlu accuracy 41.25 ± 0.5  (user, n=1319)",
        "  q_proj          2 x  32x32, rank 6",
        "  down_proj       2 x  32x48, rank 6",
    ):
        assert line in page.splitlines()
    assert f"{file_sha256(weights)}  adapter_model.safetensors" in page
    assert lorareg("show", "wide", "--json").json["digest"] in page


def test_show_tells_everything_to_a_program(lorareg, kitchen):
    lorareg("add", "loras")
    shown = lorareg("show", "plain", "--json").json
    config = json.loads((kitchen / "loras/plain/adapter_config.json").read_text())
    assert shown["config"] == config
    assert (shown["base"], shown["base_how"]) == ("tiny-llama", "inferred")
    assert shown["declared_base"] == config["base_model_name_or_path"]
    assert (shown["rank"], shown["ranks"], shown["alpha"]) == (4, {"4": 4}, 8)
    assert shown["targets"] == ["q_proj", "v_proj"]
    assert len(shown["modules"]) == 4
    assert shown["modules"][0] == {
        "name": "model.layers.0.self_attn.q_proj", "kind": "linear", "rank": 4, "in": 32, "out": 32,
    }  # fmt: skip
    tensors = load_file(kitchen / "loras/plain/adapter_model.safetensors")
    assert shown["parameters"] == sum(t.numel() for t in tensors.values())
    files = {p.name for p in (kitchen / "loras/plain").iterdir()}
    assert {f["name"] for f in shown["files"]} == files
    for file in shown["files"]:
        path = kitchen / "loras/plain" / file["name"]
        assert (file["size"], file["sha256"]) == (path.stat().st_size, file_sha256(path))
    assert shown["mixture"] is None


@pytest.mark.parametrize("spelling", ["plain", "./loras/plain", "loras/plain", "absolute"])
def test_an_adapter_answers_to_its_name_and_its_path(spelling, lorareg, kitchen):
    lorareg("add", "loras")
    ref = kitchen / "loras/plain" if spelling == "absolute" else spelling
    assert lorareg("show", ref, "-q").lines == ["plain"]


def test_skills_are_given_and_taken_back(lorareg, kitchen):
    lorareg("add", "loras")
    assert lorareg("tag", "plain", "--skill", "Code", "--skill", "sql").out == "plain: code, sql\n"
    assert lorareg("search", "--skill", "code", "--skill", "sql", "-q").lines == ["plain"]
    lorareg("add", "loras")
    assert lorareg("tag", "plain", "--skill", "code", "--remove").out == "plain: sql\n"
    assert lorareg("search", "--skill", "code", "-q").lines == []
    assert lorareg("tag", "plain", "--skill", "sql", "--remove").out == "plain: no skills\n"


def test_scores_are_searched_and_sorted_by(lorareg, kitchen):
    lorareg("add", "loras")
    for name, value in (("plain", "41.2"), ("wide", "39")):
        done = lorareg("score", name, "--task", "gsm8k", "--metric", "accuracy", "--value", value)
        assert done.out == f"{name}: gsm8k accuracy {value}\n"
    assert lorareg("search", "--min-score", "gsm8k=40", "-q").lines == ["plain"]
    both = lorareg("search", "--min-score", "gsm8k/accuracy=39", "--sort", "name", "-q").lines
    assert both == ["plain", "wide"]
    assert lorareg("search", "--min-score", "gsm8k/nll=1", "-q").lines == []
    assert lorareg("search", "--sort", "score:gsm8k", "-q").lines[0] == "plain"


def test_the_same_score_again_replaces_the_first(lorareg, kitchen):
    lorareg("add", "loras")
    for value in ("41", "42"):
        lorareg("score", "plain", "--task", "a", "--metric", "b", "--value", value)
    [score] = lorareg("show", "plain", "--json").json["scores"]
    assert score["value"] == 42


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--rank", "4"), ["plain"]),
        (("--rank", "5.."), ["wide"]),
        (("--rank", "..6"), ["plain", "wide"]),
        (("--targets", "down_proj"), ["wide"]),
        (("--targets", "q_proj", "--targets", "v_proj"), ["plain", "wide"]),
        (("--peft-type", "lora"), ["plain", "wide"]),
        (("--peft-type", "ia3"), []),
        (("--license", "mit"), ["wide"]),
        (("--base", "tiny-llama"), ["plain", "wide"]),
        (("--base", "tiny-llama-instruct"), []),
        (("python",), ["wide"]),
        (("plain",), ["plain"]),
    ],
)
def test_search_narrows(words, found, lorareg, kitchen):
    (kitchen / "loras/wide/README.md").write_text(
        "---\nlicense: mit\n---\n# Wide\n\nIt writes Python.\n"
    )
    lorareg("add", "loras")
    done = lorareg("search", *words, "--sort", "name", "-q")
    assert done.lines == found


def test_search_names_a_type_that_nothing_has(lorareg, kitchen):
    lorareg("add", "loras")
    said = lorareg("search", "--peft-type", "mixlorra").err
    assert "no adapter here is of type 'mixlorra', did you mean 'MIXLORA'?" in said
    assert "fill it" not in said
    # A known one that no adapter has, and a strange one that an adapter does have.
    assert "fill it" in lorareg("search", "--peft-type", "arrow").err
    edit_config(kitchen / "loras/wide", peft_type="NEWTUNING")
    lorareg("add", "loras")
    assert lorareg("search", "--peft-type", "newtuning", "-q").lines == ["wide"]
    assert "fill it" in lorareg("search", "--peft-type", "newtuning", "--rank", "999").err


def test_all_types_of_peft_are_known():
    from peft import PeftType

    from lorahub_registry.adapters.dynamic import PEFT_TYPE

    assert {kind.value for kind in PeftType} - {*KINDS, PEFT_TYPE} == set(PEFT_TYPES)


def test_search_says_that_there_is_more(lorareg, kitchen):
    lorareg("add", "loras")
    done = lorareg("search", "--limit", "1")
    assert len(done.lines) == 2
    assert "1 of 2; --limit shows more" in done.err


def test_remove_forgets_and_keeps_the_files(lorareg, kitchen):
    lorareg("add", "loras")
    before = tree(kitchen / "loras")
    done = lorareg("remove", "plain", "--json")
    assert done.json == {"id": str(kitchen / "loras/plain"), "files_deleted": False}
    assert "its files are where they were" in done.err
    assert tree(kitchen / "loras") == before
    assert lorareg("list", "-q").lines == ["wide"]
    lorareg("add", "loras")
    assert lorareg("list", "-q").lines == ["plain", "wide"]


def test_remove_asks_before_it_deletes_files(lorareg, kitchen):
    lorareg("add", "loras")
    done = lorareg("remove", "plain", "--files", input="n\n", code=1)
    assert f"Delete the files in {kitchen / 'loras/plain'}?" in done.err
    assert (kitchen / "loras/plain").is_dir()
    assert lorareg("list", "-q").lines == ["plain", "wide"]
    done = lorareg("remove", "plain", "--files", input="y\n")
    assert done.lines == [str(kitchen / "loras/plain")]
    assert not (kitchen / "loras/plain").exists()
    assert lorareg("list", "-q").lines == ["wide"]
    lorareg("rm", "wide", "--files", "--yes")
    assert tree(kitchen / "loras") == []


def test_remove_does_not_delete_what_is_not_the_adapter_s(lorareg, kitchen):
    lorareg("add", "loras")
    (kitchen / "loras/plain/thesis.tex").write_text("years of work")
    said = lorareg.fails("remove", "plain", "--files", "--yes")
    assert "also holds thesis.tex, which is not the adapter's" in said
    assert (kitchen / "loras/plain/thesis.tex").is_file()
    assert lorareg("list", "-q").lines == ["plain", "wide"]


def test_remove_deletes_what_was_pulled_through_the_hub_s_cache(hub, lorareg, tmp_path):
    hub.add_repo("me/two", adapter("a") | adapter("b", fill=2))
    first, second = map(Path, lorareg("pull", "me/two", "-q").lines)
    lorareg("remove", "me/two/a", "--files", "--yes")
    assert not (first / "adapter_model.safetensors").exists()
    assert (second / "adapter_model.safetensors").is_file()
    assert lorareg("list", "-q").lines == ["me/two/b"]
    lorareg("pull", "me/two/a")
    assert (first / "adapter_model.safetensors").is_file()


def test_a_mixture_keeps_its_lineage_when_a_member_is_forgotten(lorareg, kitchen):
    lorareg("compose", kitchen.recipe())
    lorareg("remove", "plain")
    members = lorareg("show", "blend", "--json").json["mixture"]["members"]
    assert [m["name"] for m in members] == ["plain", "wide"]
    assert members[0]["digest"]


def test_convert_makes_safetensors_of_a_bin_and_indexes_them(lorareg, kitchen):
    folder = kitchen / "loras/wide"
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    lorareg("add", "loras")
    assert "a pickle, unread: lorareg convert wide" in lorareg("show", "wide").out
    lorareg("tag", "wide", "--skill", "kept")
    done = lorareg("convert", "wide")
    assert done.lines == [str(folder / "adapter_model.safetensors")]
    assert "✓ written and indexed; the .bin is still there" in done.err
    written = load_file(folder / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    shown = lorareg("show", "wide", "--json").json
    assert (shown["state"], shown["ranks"], shown["skills"]) == ("local", {"6": 14}, ["kept"])
    assert len(lorareg("list", "-q").lines) == 2
    lorareg("compose", kitchen.recipe(), "--dry-run")


def test_db_path_is_where_the_registry_is(lorareg, database, monkeypatch, tmp_path):
    assert lorareg("db", "path").out == f"{database}\n"
    monkeypatch.setenv("LORAREG_HOME", str(tmp_path / "else where"))
    assert lorareg("db", "path", "-q").out == f"{tmp_path / 'else where' / 'registry.sqlite'}\n"


def test_db_status_counts(lorareg, kitchen, database):
    lorareg("add", "loras")
    lorareg("tag", "plain", "--skill", "code")
    facts = lorareg("db", "status", "--json").json
    assert facts["path"] == str(database)
    assert facts["revision"] == facts["newest"]
    assert (facts["state"], facts["adapters"], facts["local"]) == ("current", 2, 2)
    assert (facts["skills"], facts["mixtures"]) == (1, 0)
    assert "adapters  2" in lorareg("db", "status").lines


def test_db_status_makes_nothing(lorareg, database):
    shutil.rmtree(database.parent)
    assert lorareg("db", "status", "--json").json["state"] == "missing"
    assert not database.parent.exists()


def test_db_backup_is_a_whole_registry(lorareg, kitchen, database, monkeypatch):
    lorareg("add", "loras")
    copy = kitchen / "copy" / "registry.sqlite"
    assert lorareg("db", "backup", copy).out == f"{copy}\n"
    lorareg("remove", "plain")
    monkeypatch.setenv("LORAREG_HOME", str(copy.parent))
    assert lorareg("list", "-q").lines == ["plain", "wide"]
    said = lorareg.fails("db", "backup", kitchen.folder)
    assert f"{kitchen.folder} cannot hold a copy of the registry" in said


def test_db_upgrade_makes_a_registry_and_then_finds_it_done(lorareg, database):
    shutil.rmtree(database.parent)
    first = lorareg("db", "upgrade", "--json").json
    assert first["from"] is None
    assert lorareg("db", "upgrade", "--json").json["from"] == first["to"]
    with sqlite3.connect(database) as connection:
        [[revision]] = connection.execute("SELECT version_num FROM alembic_version")
    connection.close()
    assert revision == first["to"]


def test_the_first_command_makes_the_registry(lorareg, kitchen, database):
    shutil.rmtree(database.parent)
    lorareg("add", "loras")
    assert database.is_file()
    assert lorareg("list", "-q").lines == ["plain", "wide"]
