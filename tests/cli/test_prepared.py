"""What ``lorareg compose`` finds out before it costs time, and what a run that fails leaves."""

import json
import shutil

import pytest

import lorahub_registry as lr
from lorahub_registry.api import mix
from lorahub_registry.errors import DataError, LoraregError, RecipeError
from lorahub_registry.recipes import load
from lorahub_registry.registry.store import Registry
from tests.cli.conftest import edit_config, edit_tensors, write_rows

LINEAR = {
    "adapters": [{"ref": f"./loras/{name}", "coefficient": 1} for name in ("plain", "wide")],
    "method": {"type": "linear"},
}
HOPELESS = {"type": "learn", "budget": 3, "l1": 1e6}


def _known():
    with Registry() as registry:
        return {a.record.name: a.record.digest for a in registry.list()}


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_what_a_recipe_names_by_path_is_not_registered_without_a_mixture(lorareg, kitchen, words):
    if words:
        lorareg("compose", kitchen.recipe(), *words)
    else:
        said = lorareg.fails("compose", kitchen.recipe(method=HOPELESS))
        assert "no mixture is better" in said
    assert _known() == {}


def test_a_failed_run_leaves_what_is_known_of_a_changed_adapter(lorareg, kitchen):
    lorareg("add", "loras")
    before = _known()
    edit_tensors(kitchen / "loras/plain", lambda t: {k: v * 2 for k, v in t.items()})
    lorareg.fails("compose", kitchen.recipe(method=HOPELESS))
    assert _known() == before
    lorareg("compose", kitchen.recipe(**LINEAR))
    assert _known()["plain"] != before["plain"]


def test_lineage_names_the_folder_that_was_used_and_not_its_copy(lorareg, kitchen):
    shutil.copytree(kitchen / "loras/plain", kitchen / "copies/plain")
    lorareg("add", "copies")
    lorareg("compose", kitchen.recipe(**LINEAR))
    assert lorareg("show", "./loras/plain", "--json").json["used_in"] == ["blend"]
    assert lorareg("show", "./copies/plain", "--json").json["used_in"] == []


def test_lorahub_learning_registers_nothing(kitchen):
    kitchen.lora("same")
    rows = ["ab cd "], ["ef"]
    refs = ["./loras/plain", "./loras/same"]
    lr.lorahub_learning(refs, *rows, 3, "./tiny-llama")
    with pytest.raises(LoraregError):
        lr.lorahub_learning(refs, *rows, 3, "./tiny-llama", get_loss=lambda *_: None)
    assert _known() == {}


@pytest.fixture
def twins(lorareg, kitchen):
    """Two registered adapters called plain; the second one's base is another."""
    shutil.copytree(kitchen / "loras/plain", kitchen / "others/plain")
    edit_config(kitchen / "others/plain", base_model_name_or_path="me/other-1b")
    lorareg("add", "loras", "others")
    return kitchen / "others/plain"


def test_of_one_name_the_adapter_on_the_recipe_s_base_is_meant(lorareg, kitchen, twins):
    assert "'plain' is the name of 2 adapters" in lorareg.fails("show", "plain")
    done = lorareg("compose", kitchen.recipe(adapters=["plain", "wide"]))
    taken = kitchen / "loras/plain"
    assert f"plain: of several, the one on tiny-llama is taken, {taken}" in done.err
    assert lorareg("show", taken, "--json").json["used_in"] == ["blend"]


@pytest.mark.parametrize("base", ["tiny-llama", None])
def test_a_name_that_the_base_does_not_decide_is_an_error(lorareg, kitchen, twins, base):
    if base:
        lorareg("add", twins, "--base", base)  # both sit on it
    else:
        lorareg("add", kitchen / "loras/plain", "--base", "me/third-1b")  # none does
    said = lorareg.fails("compose", kitchen.recipe(adapters=["plain", "wide"]))
    assert "'plain' is the name of 2 adapters" in said
    assert "Hint: write one of these in full" in said


@pytest.mark.parametrize(
    ("method", "rows", "error", "said"),
    [
        ({"optimizer": "NLOPT_GN_CRS2_LM"}, 10, RecipeError, "NLOPT_GN_CRS2_LM fails here"),
        ({"folds": 11}, 10, DataError, "folds: 11 needs as many training rows"),
        ({"per": "module"}, 1, DataError, "do not determine them"),
    ],
)
def test_what_cannot_be_searched_is_not_screened(kitchen, told, method, rows, error, said):
    kitchen.lora("same")
    lines = (kitchen / "train.jsonl").read_text().splitlines(keepends=True)
    (kitchen / "train.jsonl").write_text("".join(lines[:rows]))
    method = {"type": "learn", "budget": 4, "screen": {"keep": 2}, **method}
    recipe = kitchen.recipe(
        adapters=["./loras/plain", "./loras/wide", "./loras/same"], method=method
    )
    with pytest.raises(error, match=said):
        lr.compose(recipe, progress=told)
    assert not [title for title, *_ in told.tasks if "Screening" in title]


def test_a_dry_run_says_whether_the_lock_agrees(lorareg, kitchen):
    recipe = kitchen.recipe(**LINEAR)
    lorareg("compose", recipe)
    lock = kitchen.out / "lorareg.lock"
    assert lorareg("compose", recipe, "--dry-run", "--json").json["lock"] is None
    facts = lorareg("compose", recipe, "--dry-run", "--lock", lock, "--json").json
    assert facts["lock"] == {"path": str(lock), "agrees": True}
    page = lorareg("compose", recipe, "--dry-run", "--lock", lock).lines
    assert f"lock      {lock} agrees" in page
    edit_tensors(kitchen / "loras/wide", lambda t: {k: v * 2 for k, v in t.items()})
    said = lorareg.fails("compose", recipe, "--dry-run", "--lock", lock)
    assert "not what the lock pins:\n  adapter wide: its tensors are others" in said


def test_a_dry_run_warns_of_more_coefficients_than_rows(lorareg, kitchen, told):
    few = {"train": {"path": "train.jsonl", "limit": 1}, "test": {"path": "test.jsonl"}}
    said = "2 coefficients are learned from 1 rows: more than they carry"
    assert said in lorareg("compose", kitchen.recipe(data=few), "--dry-run").err
    assert "coefficients" not in lorareg("compose", kitchen.recipe(), "--dry-run").err
    each = {"type": "learn", "budget": 2, "per": "module", "init": 0.1}
    planned = lorareg("compose", kitchen.recipe(method=each), "--dry-run").err
    ran = lorareg("compose", kitchen.recipe(method=each)).err
    [line] = [line for line in planned.splitlines() if "coefficients are learned" in line]
    assert line in ran


def test_a_dry_run_refuses_what_the_rows_do_not_determine(lorareg, kitchen):
    write_rows(kitchen / "train.jsonl", [("ab", "c")])
    each = {"type": "learn", "budget": 2, "per": "module"}
    said = lorareg.fails("compose", kitchen.recipe(method=each), "--dry-run")
    assert "do not determine them" in said


@pytest.mark.parametrize(
    ("place", "task"),
    [
        ("french/test.jsonl", "french"),
        ("{desk}/french/test.jsonl", "french"),
        ("~/french/test.jsonl", "french"),
        ("../other/test.jsonl", "other"),
        ("{desk}/french/zog.jsonl", "zog"),
        # The recipe's own folder says nothing, and a home may be a person's name.
        ("test.jsonl", "blend"),
        ("{desk}/test.jsonl", "blend"),
        ("~/test.jsonl", "blend"),
    ],
)
def test_a_task_is_called_as_its_file_or_its_folder(kitchen, monkeypatch, place, task):
    home = kitchen.folder.parent / "ada"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    path = place.format(desk=kitchen.folder)
    recipe = load(kitchen.recipe(data={"test": {"path": path}}, **LINEAR)).recipe
    assert mix._task(recipe, kitchen.folder) == task


def test_local_members_go_by_their_names_everywhere(lorareg, kitchen):
    lorareg("compose", kitchen.recipe(**LINEAR))
    written = ("recipe.yaml", "results.json", "README.md", "lorareg.lock")
    shown = [
        lorareg("compose", kitchen.recipe(**LINEAR), "--dry-run").out,
        lorareg("compose", kitchen.recipe(**LINEAR), "--dry-run", "--json").out,
        lorareg("show", "blend").out,
        lorareg("show", "blend", "--json").out,
        *((kitchen.out / name).read_text() for name in written),
    ]
    assert not [text for text in shown if "./plain" in text]
    assert json.loads(shown[1])["adapters"][0]["ref"] == "plain"
    assert "+1.0000  plain\n" in shown[2]


def test_a_name_in_a_mixture_s_recipe_is_one_that_the_registry_knows(lorareg, kitchen):
    lorareg("compose", kitchen.recipe(**LINEAR))
    again = (kitchen.out / "recipe.yaml").read_text().replace("./tiny-llama", "tiny-llama")
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(kitchen / name, kitchen / "out")
    (kitchen / "out/again.yaml").write_text(again.replace("out/blend", "again"))
    done = lorareg("compose", "out/again.yaml", "--json").json
    assert [m["digest"] for m in done["members"]] == [
        m["digest"] for m in kitchen.results()["members"]
    ]
