"""stdout is data, in the format that was asked for; all talk is on stderr."""

import json

import pytest

from lorahub_registry.recipes import json_schema
from tests.hub.made import BASE, adapter, card


@pytest.fixture
def stocked(hub, lorareg, kitchen):
    """Local adapters, one that is only listed, one that was pulled, and a mixture."""
    hub.add_repo("me/far", adapter() | {"README.md": card(tags=["code"])})
    hub.add_repo("me/near", adapter("one") | adapter("two", fill=2) | {"README.md": card()})
    lorareg("sync", "--base", BASE)
    lorareg("pull", "me/near")
    lorareg("add", "loras")
    lorareg("compose", kitchen.recipe())
    return kitchen


# Commands that change nothing, and print one or many things.
COMMANDS = [
    ("search",),
    ("search", "--base", "mistral-7b"),
    ("search", "nothing-like-that"),
    ("list",),
    ("list", "--mixtures"),
    ("list", "--local"),
    ("show", "plain"),
    ("show", "blend"),
    ("show", "me/near/one"),
    ("pull", "me/near"),
    ("pull", "me/far", "--dry-run"),
    ("sync", "--base", BASE),
    ("compose", "recipe.yaml", "--dry-run", "--force"),
    ("recipe", "validate", "recipe.yaml"),
    ("generate", "blend", "ab", "--against", "base,plain", "--max-new-tokens", "2"),
    ("score", "plain", "--task", "a", "--metric", "b", "--value", "1"),
    ("push", "blend", "me/blend", "--dry-run"),
    ("card", "blend"),
    ("add", "loras"),
    ("tag", "plain", "--skill", "code"),
    ("remove", "plain"),
    ("db", "path"),
    ("db", "status"),
    ("db", "backup", "copy.sqlite"),
    ("db", "upgrade"),
]
TALK = ("Warning", "Error", "Hint", "✓", "base inferred", "nothing found", "fill it")


def test_every_command_prints_one_json_value_and_nothing_else(stocked, lorareg):
    for words in COMMANDS:
        done = lorareg(*words, "--json")
        assert isinstance(done.json, dict | list), words
        assert len(done.lines) == 1, words
    assert lorareg("list", "--format", "json").out == lorareg("list", "--json").out


def test_no_talk_is_on_stdout(stocked, lorareg):
    for words in COMMANDS:
        done = lorareg(*words)
        assert not [line for line in done.lines if line.startswith(TALK)], words


def test_quiet_says_nothing_but_ids_and_warnings(stocked, lorareg):
    for words in COMMANDS:
        done = lorareg(*words, "-q")
        said = [line for line in done.err.splitlines() if not line.startswith("Warning: ")]
        assert said == [], words
        assert "  " not in done.out or words[0] == "generate", words


def test_each_quiet_line_can_be_shown(stocked, lorareg):
    for words in (("list",), ("search",), ("list", "--local"), ("add", "loras")):
        ids = lorareg(*words, "-q").lines
        assert len(ids) >= 2
        for one in ids:
            assert lorareg("show", one, "-q").lines == [one]
            assert lorareg("show", one, "--json").json["ref"] == one


def test_quiet_pull_prints_folders_that_show_takes(stocked, lorareg):
    ids = [lorareg("show", path, "-q").out for path in lorareg("pull", "me/near", "-q").lines]
    assert ids == ["me/near/one\n", "me/near/two\n"]


def test_json_rows_hold_what_the_table_shows(stocked, lorareg):
    rows = lorareg("list", "--json").json
    table = lorareg("list").lines
    assert table[0].split() == [
        "REF", "BASE", "RANK", "SKILLS", "LICENSE", "DOWNLOADS", "STATE",
    ]  # fmt: skip
    for row, line in zip(rows, table[1:], strict=True):
        assert line.split()[:3] == [row["ref"], row["base"], str(row["rank"])]


def test_a_dry_pull_says_what_would_come(stocked, lorareg, hub):
    [row] = lorareg("pull", "me/far", "--dry-run", "--json").json
    assert row["ref"] == "me/far"
    assert row["files"] == 3
    assert row["bytes"] > 0
    said = lorareg("pull", "me/far", "--dry-run").err
    assert said.startswith(f"1 adapter at {hub.sha('me/far')[:12]}; ")
    assert said.endswith(" would be downloaded\n")
    assert lorareg("show", "me/far", "--json").json["state"] == "listed"


def test_sync_counts(stocked, lorareg, hub):
    hub.add_repo("me/new", adapter(fill=3) | {"README.md": card()})
    [row] = lorareg("sync", "--base", BASE, "--json").json
    assert (row["base"], row["new"], row["updated"], row["adapters"]) == (BASE, 1, 0, 1)
    [again] = lorareg("sync", "--base", BASE, "--json").json
    assert (again["new"], again["updated"], again["adapters"]) == (0, 0, 0)


def test_the_schema_is_json(lorareg):
    assert json.loads(lorareg("recipe", "schema").out) == json_schema()


def test_compose_json_is_the_results_and_where_they_are(lorareg, kitchen):
    done = lorareg("compose", kitchen.recipe(), "--json")
    assert done.json == {"path": str(kitchen.out), "url": None, **kitchen.results()}
    quiet = lorareg("compose", kitchen.recipe(), "--force", "-q")
    assert (quiet.out, quiet.err) == (f"{kitchen.out}\n", "")


def test_a_warning_is_said_even_when_quiet(lorareg, kitchen):
    done = lorareg("compose", kitchen.recipe(data={"train": {"path": "train.jsonl"}}), "-q")
    assert done.out == f"{kitchen.out}\n"
    assert done.err.startswith("Warning: no data.test")
