"""Weights: compare, convert."""

from __future__ import annotations

import click

from lorahub_registry.cli.dare import dare
from lorahub_registry.cli.factors import extract, resize
from lorahub_registry.cli.inspect import compare
from lorahub_registry.cli.merge import merge
from lorahub_registry.cli.output import Output, with_output


@click.command()
@click.argument("place", metavar="FOLDER|REF")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=1), default=600.0,
              show_default=True, help="Seconds after which it is given up.")  # fmt: skip
@with_output
def convert(place: str, timeout_s: float, out: Output) -> None:
    """Write safetensors beside a pickled adapter_model.bin.

    The pickle is read in a child process that builds tensors and nothing else, bounded in time
    and memory. No other command reads one.

    \b
    Example:
      lorareg convert uukuguy/Mistral-7B-OpenOrca-lora
    """
    from lorahub_registry.api.convert import convert as run
    from lorahub_registry.cli.shown import row, short_ref
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        stored = run(place, registry=registry, timeout_s=timeout_s, progress=out)
    path = f"{stored.record.local_path}/adapter_model.safetensors"
    out.record(row(stored), path, quiet=short_ref(stored))
    out.done("written and indexed; the .bin is still there")


COMMANDS: list[click.Command] = [compare, convert, extract, resize, dare, merge]
