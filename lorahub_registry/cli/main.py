"""The top command: groups of commands in its help, errors in one place."""

from __future__ import annotations

import difflib
import os
import sys
from typing import Any, NoReturn

import click

from lorahub_registry import __version__
from lorahub_registry.cli import (
    data,
    explain,
    find,
    interrupt,
    mix,
    prove,
    publish,
    registry,
    route,
    train,
    weights,
)
from lorahub_registry.cli.output import lines
from lorahub_registry.errors import LoraregError
from lorahub_registry.settings import Settings

FIRST = """\
lorareg finds, mixes, proves and publishes LoRA adapters. To begin:

  lorareg quickstart                                     see all of it in two minutes
  lorareg sync --base mistralai/Mistral-7B-v0.1          learn what the Hub has
  lorareg search --base mistral-7b --skill code          find adapters
  lorareg pull uukuguy/speechless-multi-loras-r64        get them
  lorareg compose recipe.yaml                            mix, prove and publish them

lorareg --help lists every command.
"""

SECTIONS: dict[str, list[click.Command]] = {
    "Find": [*find.COMMANDS, *route.COMMANDS],
    "Mix": mix.COMMANDS,
    "Train": [*train.COMMANDS, *data.COMMANDS],
    "Prove": [*prove.COMMANDS, *explain.COMMANDS],
    "Publish": publish.COMMANDS,
    "Weights": weights.COMMANDS,
    "Registry": registry.COMMANDS,
}
ALIASES = {"ls": "list", "rm": "remove"}


class Main(click.Group):
    """Sections in the help, near names for unknown commands, and every error said once."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            rows = [(c.name or "", c.get_short_help_str(70)) for c in commands]
            with formatter.section(title):
                formatter.write_dl(rows)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], [*self.commands, *ALIASES], n=1)
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with interrupt.listening():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except LoraregError as error:
            if interrupt.heard():  # which a library made another error of
                _interrupted()
            _fail(str(error), error.hint, error.exit_code)
        except KeyboardInterrupt:
            _interrupted()
        except Exception as error:
            if interrupt.heard():
                _interrupted()
            _fail(
                f"unexpected: {type(error).__name__}: {error}",
                "this is a fault of lorareg; with LORAREG_DEBUG=1 it shows where",
                1,
            )


def _fail(text: str, hint: str | None, code: int) -> NoReturn:
    if Settings.from_environment().debug:
        raise
    click.echo(f"Error: {lines(text)}", err=True)
    if hint:
        click.echo(f"Hint: {lines(hint)}", err=True)
    sys.exit(code)


def _interrupted() -> NoReturn:
    again = "nothing half-done stands in its place; the same command starts again, or goes on"
    _fail("interrupted", again, 130)


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"lorareg {__version__}")
        ctx.exit()


@click.group(
    cls=Main,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
    help="Show the version.",
)  # fmt: skip
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Find, mix, prove and publish LoRA adapters.

    Data goes to stdout (--format human, json or quiet), talk to stderr. Exit status: 0, 1 for
    known errors, 2 for wrong usage.

    \b
    LORAREG_HOME    where the registry is
    HF_ENDPOINT     another Hub        HF_HUB_OFFLINE=1   no network
    LORAREG_DEBUG=1 errors with their traceback
    """
    # The tokenizers' warning about forks is of no use to anybody here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if ctx.invoked_subcommand is None:
        click.echo(FIRST, nl=False)


for _commands in SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)
