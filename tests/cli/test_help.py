"""Every command and option says what it is for."""

import re

import click
import pytest

from lorahub_registry.cli import cli


def _tree(command, path):
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from _tree(below, [*path, name])


COMMANDS = [pytest.param(path, c, id=" ".join(path)) for path, c in _tree(cli, ["lorareg"])]


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_every_option_has_a_help_text(path, command):
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{' '.join(path)} {parameter.opts[0]}"
            assert parameter.help.endswith((".", "…")), parameter.help


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_every_command_shows_how_to_call_it_or_is_a_group(path, command):
    assert command.help
    assert command.get_short_help_str(70).endswith("."), "its first line does not fit"
    if not isinstance(command, click.Group):
        assert re.search(r"^\s*Examples?:$", command.help, re.MULTILINE)
        assert re.search(rf"^ +{' '.join(path)}\b", command.help, re.MULTILINE)


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_every_command_that_prints_data_has_the_three_formats(path, command):
    if isinstance(command, click.Group) or path == ["lorareg", "recipe", "schema"]:
        return
    options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    assert {"--format", "--json", "-q", "--quiet"} <= options


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_help_can_be_had_without_a_registry(path, command, lorareg, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAREG_HOME", str(tmp_path / "nowhere"))
    for option in ("--help", "-h"):
        assert lorareg(*path[1:], option).out.startswith(f"Usage: {' '.join(path)} [OPTIONS]")
    assert not (tmp_path / "nowhere").exists()
