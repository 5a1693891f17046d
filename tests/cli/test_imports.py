"""What a command imports: no torch where none is needed, no Hub client but where the Hub is asked.

Each group of commands runs in one child, one after the other, so that the first command that
imports too much is named. A linter alone does not see what ``__init__`` files do.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.cli.conftest import ROOT
from tests.hub.made import BASE, adapter, card

HEAVY = ("torch", "transformers", "peft", "alembic")
CLIENT = "huggingface_hub"
CHILD = """
import contextlib, io, json, sys
from lorahub_registry.cli import cli
commands, heavy, code = json.loads(sys.argv[1]), sys.argv[2].split(), 0
for words in commands:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            cli.main(words, prog_name="lorareg")
        except SystemExit as end:
            code = end.code or 0
    found = [name for name in heavy if name in sys.modules]
    print(json.dumps([words, code, found, len(out.getvalue())]))
"""
LOCAL = [
    ["--help"],
    [],
    ["db", "path"],
    ["db", "status"],
    ["db", "upgrade"],
    ["db", "backup", "copy.sqlite"],
    ["add", "loras"],
    ["add", "loras", "--base", "tiny-llama"],
    ["list"],
    ["list", "--json"],
    ["search", "--base", "tiny-llama", "--skill", "code"],
    ["search", "words", "--rank", "4..8", "--sort", "downloads"],
    ["show", "plain"],
    ["tag", "plain", "--skill", "code"],
    ["score", "plain", "--task", "a", "--metric", "b", "--value", "1"],
    ["recipe", "validate", "recipe.yaml"],
    ["recipe", "schema"],
    ["card", "blend"],
    ["remove", "plain"],
]
ASKING = [
    ["sync", "--base", BASE],
    ["pull", "me/one", "--dry-run"],
    ["pull", "me/one"],
    ["remove", "me/one", "--files", "--yes"],
    ["push", "blend", "me/blend", "--dry-run"],
]


def _run(commands, heavy):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands), " ".join(heavy)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [words for words, *_ in results] == commands
    return results, done.stderr


@pytest.fixture
def blend(lorareg, kitchen):
    """A mixture, and a registry that is up to date."""
    lorareg("compose", kitchen.recipe())
    return kitchen


def test_commands_over_the_registry_import_neither_torch_nor_the_hub_s_client(blend):
    results, err = _run(LOCAL, [*HEAVY, CLIENT])
    for words, code, found, printed in results:
        assert code == 0, f"{words}: {err}"
        assert found == [], words
        assert printed > 0, words


def test_commands_over_the_hub_import_its_client_and_no_torch(blend, hub):
    hub.add_repo("me/one", adapter() | {"README.md": card()})
    results, err = _run(ASKING, HEAVY)
    for words, code, found, printed in results:
        assert code == 0, f"{words}: {err}"
        assert found == [], words
        assert printed > 0, words


def test_the_package_itself_imports_nothing_heavy():
    script = (
        "import sys, lorahub_registry as lr; dir(lr); lr.Registry, lr.search, lr.pull, lr.compose\n"
        "lr.Mixture, lr.load, lr.add, lr.sync, lr.push, lr.card, lr.LoraregError, lr.Loaded\n"
        f"print([name for name in {[*HEAVY, CLIENT]} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "[]\n", done.stderr
