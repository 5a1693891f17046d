"""What a user types first, and what the program says to somebody who types anything at all."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import lorahub_registry
from lorahub_registry.cli import cli
from lorahub_registry.cli.main import ALIASES, SECTIONS
from tests.cli.conftest import child, edit_config
from tests.hub.made import BASE, adapter, card

REPO = "uukuguy/speechless-multi-loras-r64"
INSTRUCT = "mistralai/Mistral-7B-Instruct-v0.2"
DECLARED = {
    "amy/code-lora": BASE,
    "bob/code-lora": "/opt/x/Mistral-7B-v0.1",
    "eve/code-lora": "unsloth/mistral-7b-bnb-4bit",
    "ann/code-lora": INSTRUCT,
}


@pytest.fixture
def mistral(hub, lorareg):
    """A registry that holds adapters of one base under its many names, and of another model."""
    for repo, base in DECLARED.items():
        # The card names the base that the Hub lists the adapter under.
        listed = INSTRUCT if base == INSTRUCT else BASE
        files = adapter(base=base) | {"README.md": card(listed, tags=["code"])}
        hub.add_repo(repo, files)
    lorareg("sync", "--base", BASE, "--base", INSTRUCT)
    return hub


def test_search_by_family_and_skill_finds_the_base_under_all_its_names(mistral, lorareg):
    done = lorareg("search", "--base", "mistral-7b", "--skill", "code")
    found = [line.split()[0] for line in done.lines[1:]]
    assert sorted(found) == ["amy/code-lora", "bob/code-lora", "eve/code-lora"]
    said = done.err.splitlines()[0]
    assert said.startswith("base mistral-7b: ")
    assert BASE in said
    assert "Instruct" not in done.out + done.err


def test_a_variant_is_found_by_its_own_name(mistral, lorareg):
    found = lorareg("search", "--base", "mistral-7b-instruct", "--skill", "code", "-q")
    assert found.lines == ["ann/code-lora"]


def test_what_was_synced_is_searched_without_the_hub(mistral, lorareg):
    mistral.stop()
    assert len(lorareg("search", "--base", "mistral-7b", "--skill", "code", "-q").lines) == 3


def test_pull_gets_every_adapter_of_a_repo_and_prints_where_each_is(hub, lorareg):
    subs = ["Intel/neural-chat-7b-v3-1-lora", "Open-Orca/Mistral-7B-OpenOrca-lora"]
    files = {"README.md": card(tags=["code"]), "multi_loras.bin": b"another thing"}
    for fill, sub in enumerate(subs, 1):
        files |= adapter(sub, rank=64, fill=fill, base="/opt/local/llm_models/Mistral-7B-v0.1")
    hub.add_repo(REPO, files)
    done = lorareg("pull", REPO)
    paths = [Path(line) for line in done.lines[1:]]
    assert [p.parts[-2:] for p in paths] == [tuple(sub.split("/")) for sub in subs]
    for path in paths:
        config = json.loads((path / "adapter_config.json").read_text())
        assert config["r"] == 64
        assert (path / "adapter_model.safetensors").is_file()
    assert f"{REPO}/{subs[0]}" in done.err
    assert "base inferred as mistralai/Mistral-7B-v0.1" in done.err
    assert f"✓ 2 adapters of {REPO} at {hub.sha(REPO)[:12]}" in done.err
    found = lorareg("search", "--base", "mistral-7b", "--skill", "code", "-q")
    assert sorted(found.lines) == sorted(f"{REPO}/{sub}" for sub in subs)
    shown = lorareg("show", f"{REPO}/{subs[0]}", "--json").json
    assert (shown["base"], shown["base_how"]) == (BASE, "inferred")
    assert shown["declared_base"] == "/opt/local/llm_models/Mistral-7B-v0.1"


def test_pull_prints_only_paths_when_quiet(hub, lorareg):
    hub.add_repo("me/x", adapter("a") | adapter("b", fill=2))
    done = lorareg("pull", "me/x", "-q")
    assert [Path(line).name for line in done.lines] == ["a", "b"]
    assert done.err == ""


def test_compose_runs_a_recipe_in_a_process_of_its_own(kitchen):
    kitchen.recipe()
    done = child("compose", "recipe.yaml")
    assert done.code == 0, done.err
    assert done.lines[-1].startswith("blend ")
    assert done.err == f"✓ written to {kitchen.out}\n"


def test_without_a_command_it_says_what_to_type_first(lorareg):
    done = lorareg()
    for first in (
        "lorareg quickstart",
        "lorareg sync --base mistralai/Mistral-7B-v0.1",
        "lorareg search --base mistral-7b --skill code",
        "lorareg pull uukuguy/speechless-multi-loras-r64",
        "lorareg compose recipe.yaml",
    ):
        assert f"  {first} " in done.out
    assert done.err == ""


def test_help_lists_every_command_once_in_its_section(lorareg):
    lines = lorareg("--help").lines
    titles = [line[:-1] for line in lines if line.endswith(":") and line[0].isalpha()]
    sections = ["Find", "Mix", "Train", "Prove", "Publish", "Weights", "Registry"]
    assert titles == ["Options", *sections]
    for title, commands in SECTIONS.items():
        begin = lines.index(f"{title}:") + 1
        end = lines.index("", begin) if "" in lines[begin:] else len(lines)
        named = [line.split()[0] for line in lines[begin:end] if line[2:3] != " "]
        assert named == [command.name for command in commands]
        assert not any(line.endswith("...") for line in lines[begin:end])
    assert sum(map(len, SECTIONS.values())) == len(cli.commands)


@pytest.mark.parametrize("alias", ALIASES)
def test_short_names_mean_the_long_ones(alias, lorareg):
    first = lorareg(alias, "--help").lines[0]
    assert lorareg(ALIASES[alias], "--help").lines[0].split("[")[1:] == first.split("[")[1:]


@pytest.mark.parametrize(
    ("typed", "meant"), [("serch", "search"), ("compse", "compose"), ("lis", "list")]
)
def test_an_unknown_command_names_the_nearest_one(typed, meant, lorareg):
    said = lorareg.fails(typed, code=2)
    assert f"Error: No such command '{typed}'. Did you mean '{meant}'?" in said


def test_an_unknown_command_of_a_group_names_the_nearest_one(lorareg):
    assert "Did you mean 'validate'?" in lorareg.fails("recipe", "valdate", code=2)


def test_an_unknown_option_names_the_nearest_one(lorareg):
    said = lorareg.fails("search", "--skil", "code", code=2)
    assert "Error: No such option '--skil'. Did you mean '--skill'?" in said
    assert "Try 'lorareg search --help' for help." in said


def test_a_missing_argument_is_named(lorareg):
    assert "Missing argument 'RECIPE'" in lorareg.fails("compose", code=2)


def test_the_version_is_the_package_s(lorareg):
    assert lorareg("--version").out == f"lorareg {lorahub_registry.__version__}\n"


def test_the_console_script_is_this_program():
    done = child("--version")
    script = Path(sys.executable).with_name("lorareg")
    if not script.is_file():
        pytest.skip("the package is not installed here, so there is no console script")
    assert script.read_text().count("from lorahub_registry.cli import cli") == 1
    assert done.out == f"lorareg {lorahub_registry.__version__}\n"


def test_known_errors_never_show_a_traceback(lorareg):
    said = lorareg.fails("show", "nothing")
    assert said.startswith("Error: the registry knows no adapter or mixture called 'nothing'\n")
    assert "Hint: " in said


def test_unknown_errors_are_one_line_and_tell_how_to_see_more(lorareg, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("one over none")

    monkeypatch.setattr("lorahub_registry.registry.store.Registry.list", broken)
    said = lorareg.fails("list")
    assert said == (
        "Error: unexpected: ZeroDivisionError: one over none\n"
        "Hint: this is a fault of lorareg; with LORAREG_DEBUG=1 it shows where\n"
    )


def test_debug_lets_the_traceback_through(monkeypatch):
    monkeypatch.setenv("LORAREG_DEBUG", "1")
    done = child("show", "nothing")
    assert done.code == 1
    assert done.err.startswith("Traceback (most recent call last):")
    assert "UnknownRef: the registry knows no adapter" in done.err.splitlines()[-1]


def test_an_interrupt_is_said_in_words(lorareg, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lorahub_registry.registry.store.Registry.list", interrupted)
    result = CliRunner().invoke(cli, ["list"])
    assert result.exit_code == 130
    assert result.stderr.startswith(
        "Error: interrupted\nHint: nothing half-done stands in its place; the same command"
    )


def test_what_an_adapter_says_of_itself_does_not_steer_the_terminal(lorareg, kitchen):
    edit_config(kitchen / "loras/plain", base_model_name_or_path="evil/\x1b[31mred\x07")
    lorareg("add", "loras/plain")
    for words in (("list",), ("show", "plain"), ("search", "--base", "\x1b[31mred")):
        done = lorareg(*words)
        assert "\x1b" not in done.out
        assert "\x07" not in done.out
