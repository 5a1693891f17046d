"""Train: what rows become before they are learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lorahub_registry.cli.output import Output, clean, with_output

_SIGNS = str.maketrans({"\n": "↵", "\r": "␍", "\t": "⇥"})


@click.group()
def data() -> None:
    """Rows: look at what a model will see of them."""


@data.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--adapter", metavar="NAME", help="Whose rows, of a factory; default: the first.")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="train",
              show_default=True, help="Which of its rows.")  # fmt: skip
@click.option("--rows", type=click.IntRange(min=0), default=3, show_default=True,
              help="How many to show; all are counted.")  # fmt: skip
@with_output
def preview(file: Path, adapter: str | None, split: str, rows: int, out: Output) -> None:
    """Show the rows of a factory or a recipe as its base sees them.

    Each row is shown in tokens, divided by bars: first those of the prompt, which are masked (the
    loss does not count them), then those that are learned. Then what max_length cut or left out,
    and how much of the batches is padding. Loads the base's tokenizer only.

    \b
    Examples:
      lorareg data preview factory.yaml --adapter zog
      lorareg data preview recipe.yaml --split test --rows 10
    """
    from lorahub_registry.api.preview import preview as run
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        facts = run(
            file, registry=registry, adapter=adapter, split=split, rows=rows, progress=out
        )  # fmt: skip
    quiet = "\n".join(_visible(row["prompt"] + row["output"]) for row in facts["shown"])
    out.record(facts, _page(facts), quiet=quiet)
    for note in facts["notes"]:
        out.warn(note)


def _page(facts: dict[str, Any]) -> str:
    template = "" if facts["template"] is None else f"template {facts['template']!r}, "
    limit = facts["max_length"] or "none"
    count = f"{facts['read']:,} rows"
    if facts["rows"] != facts["read"]:
        count += f", {facts['rows']:,} once tokenised"
    lines = [
        f"rows      {facts['source']} ({facts['name']}, {facts['split']}): {count}",
        f"rule      {clean(template)}max_length {limit}, {'EOS' if facts['eos'] else 'no EOS'}",
        f"tokens    {facts['tokens']:,}, of which {facts['output_tokens']:,} are learned; the "
        f"longest row has {facts['longest']:,}",
    ]
    if batches := facts["batches"]:
        packs = "" if batches["packs"] is None else f" ({batches['packs']:,} packs)"
        lines.append(
            f"batches   {batches['batches']:,} of {batches['batch_size']}{packs}; in this order "
            f"{batches['padding']:.0%} is padding"
        )
    for row in facts["shown"]:
        cut = f"; {row['cut']} cut from its left" if row["cut"] else ""
        masked = [t["text"] for t in row["tokens"] if not t["learned"]]
        learned = [t["text"] for t in row["tokens"] if t["learned"]]
        lines += [
            "",
            f"{clean(row['place'])}: {len(masked)} tokens masked, {len(learned)} learned{cut}",
            f"  masked   {_visible('|'.join(masked))}",
            f"  learned  {_visible('|'.join(learned))}",
        ]
    return "\n".join(lines)


def _visible(text: str) -> str:
    return clean(text.translate(_SIGNS))


COMMANDS: list[click.Command] = [data]
