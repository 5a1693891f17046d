"""Documents say what the program does: generated pages are fresh, examples and README run."""

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

from lorahub_registry.cli.main import ALIASES, cli
from lorahub_registry.recipes import FactoryFile, load_any, parse, parse_factory

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = _generator()


@pytest.mark.parametrize("name", GENERATOR.PAGES)
def test_generated_pages_are_fresh(name):
    written = (ROOT / "docs" / name).read_text("utf-8")
    assert written == GENERATOR.PAGES[name](), f"docs/{name} is stale: make docs"


def test_a_method_without_options_has_no_table_of_them():
    page = GENERATOR.methods_page()
    assert "## linear" in page
    assert "|---|---|---|\n| `" in page
    assert not re.search(r"\|---\|\n(?!\|)", page)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_is_valid_and_opens_with_its_command(path):
    file = load_any(path)
    command = "train" if isinstance(file, FactoryFile) else "compose"
    assert file.text.splitlines()[0].startswith(f"# lorareg {command} examples/{path.name}")


def _yaml(path):
    return re.findall(r"```yaml\n(.*?)```", (ROOT / path).read_text("utf-8"), re.DOTALL)


def test_the_recipes_and_factories_of_the_pages_are_valid():
    recipe, factory = _yaml("README.md")
    assert parse(recipe).name == "my-mixture"
    assert [a.name for a in parse_factory(factory).adapters] == ["sql", "code"]
    factory, more = _yaml("docs/training.md")
    assert [a.name for a in parse_factory(factory).adapters] == ["sql", "code", "style"]
    head, tail = factory.split("output: {path: adapters}")
    assert parse_factory(f"{head}{more}output: {{path: adapters}}{tail}").adapters[-1].method


def _commands(text):
    for block in re.findall(r"```(?:\w*)\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if re.match(r"\s*(hf )?lorareg [a-z]", line) and "usage" not in line.lower():
                yield line.split("  #")[0].strip()


def _shown():
    for path in TEXTS:
        if path.name != "cli.md":
            for line in _commands(path.read_text("utf-8")):
                yield pytest.param(line, id=f"{path.name}: {line}")


@pytest.mark.parametrize("line", list(_shown()))
def test_every_command_that_is_shown_exists_with_these_options(line):
    _parses(shlex.split(line.removeprefix("hf ")))


def _helps(command, path):
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from _helps(below, [*path, name])


@pytest.mark.parametrize(
    ("path", "command"), list(_helps(cli, ["lorareg"])), ids=lambda v: str(v)[:40]
)
def test_every_example_of_a_help_text_parses(path, command):
    for line in (command.help or "").splitlines():
        if re.match(r"\s*lorareg [a-z]", line):
            _parses(shlex.split(line))


def _parses(words):
    """Parse as the program would, without running anything."""
    words = words[: words.index(">")] if ">" in words else words
    command, context, rest = cli, click.Context(cli), words[1:]
    while isinstance(command, click.Group):
        name = ALIASES.get(rest[0], rest[0])
        command, rest = command.commands[name], rest[1:]
        context = click.Context(command, parent=context)
    command.parse_args(context, [r for r in rest if r != "…"])
