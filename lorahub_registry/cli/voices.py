"""How a dynamic mixture's voices are printed: a coloured text, or tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from lorahub_registry.cli.output import clean, lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from lorahub_registry.api.voices import Line, Voices

_BEFORE = 20


def summary(voices: Voices, chosen: Sequence[Line]) -> list[dict[str, Any]]:
    """Each adapter: where it is the loudest, its mean, its extremes with the text before them."""
    from lorahub_registry.api.voices import loudest, mean

    first = [loudest(line)[0] for line in chosen]
    rows = []
    for i, (name, middle) in enumerate(
        zip(voices.adapters, mean(chosen, len(voices.adapters)), strict=True)
    ):
        there = [(value, at) for at, line in enumerate(chosen) if (value := line[i]) is not None]
        low, high = (min(there), max(there)) if there else ((None, None), (None, None))
        rows.append(
            {"name": name, "loudest_at": first.count(i), "mean": middle}
            | {"lowest": low[0], "lowest_after": _context(voices, low[1])}
            | {"highest": high[0], "highest_after": _context(voices, high[1])}
        )
    return rows


def _context(voices: Voices, at: int | None) -> str | None:
    """The end of the text up to a token."""
    return None if at is None else "".join(voices.tokens[: at + 1])[-_BEFORE:]


def show(voices: Voices, layers: Sequence[str] | None, of: str = "adapter") -> None:
    """Print the text, coloured where the terminal can, and the tables.

    Args:
        layers: whose coefficients; None: the mean over all.
        of: what has them.
    """
    from rich.console import Console

    from lorahub_registry.api.voices import colours

    chosen = voices.at(layers)
    hues = colours(len(voices.adapters), chosen)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    # The nearest of 16 colours are the same for several adapters, and white for all weak leads.
    coloured = console.is_terminal and not console.no_color
    coloured = coloured and console.color_system in {"256", "truecolor", "windows"}
    what = "mean over the layers" if layers is None else ", ".join(layers)
    if coloured:
        _coloured(console, voices, chosen, hues)
    else:
        _runs(voices, chosen)
    click.echo(f"\nCoefficients, {what}:\n")
    head = [of.upper(), "LOUDEST AT", "MEAN", "LOWEST", "AFTER", "HIGHEST", "AFTER"]
    body = [
        [
            clean(one["name"]), f"{one['loudest_at']} of {len(chosen)}", _number(one["mean"]),
            _number(one["lowest"]), _quoted(one["lowest_after"]),
            _number(one["highest"]), _quoted(one["highest_after"]),
        ]
        for one in summary(voices, chosen)
    ]  # fmt: skip
    _print(head, body, "<>>><><")
    click.echo("\nMeans over this text, layer by layer:\n")
    names = [clean(name) for name in voices.adapters]
    body = [
        [clean(layer) or "outside the layers", *map(_number, line)]
        for layer, line in voices.means().items()
    ]
    _print(["LAYER", *names], body, "<" + ">" * len(names))


def _coloured(
    console: Console, voices: Voices, chosen: Sequence[Line], hues: Sequence[str]
) -> None:
    from rich.text import Text

    from lorahub_registry.api.voices import loudest, shade, strengths

    legend = Text()
    for name, hue in zip(voices.adapters, hues, strict=True):
        legend.append(f" {clean(name)} ", f"#000000 on {shade(hue, 1.0)}").append(" ")
    console.print(legend)
    console.print()
    text = Text()
    for i, (token, line, strength) in enumerate(
        zip(voices.tokens, chosen, strengths(chosen), strict=True)
    ):
        first = loudest(line)[0]
        style = "" if first is None else f"#000000 on {shade(hues[first], strength)}"
        if i >= voices.prompt:
            style += " bold"
        _append(text, lines(token), style.strip())
    console.print(text)


def _append(text: Text, token: str, style: str) -> None:
    """A line break is not coloured, or terminals colour the rest of the line."""
    for number, part in enumerate(token.split("\n")):
        if number:
            text.append("\n")
        text.append(part, style)


def _runs(voices: Voices, chosen: Sequence[Line]) -> None:
    """The text as runs of tokens with one loudest adapter, prompt and answer apart."""
    from lorahub_registry.api.voices import runs

    body = []
    for run in runs(chosen, cut=voices.prompt):
        name = "-" if run.adapter is None else clean(voices.adapters[run.adapter])
        value = None if run.adapter is None else run.coefficients[run.adapter]
        part = "prompt" if run.start < voices.prompt else "answer"
        text = "".join(voices.tokens[run.start : run.stop])
        body.append([part, str(run.stop - run.start), name, _number(value), _quoted(text)])
    _print(["PART", "TOKENS", "LOUDEST", "MEAN", "TEXT"], body, "<><><")


def _quoted(text: str | None) -> str:
    return "-" if text is None else f"|{clean(text.replace(chr(10), '↵'))}|"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _print(head: Sequence[str], body: Sequence[Sequence[str]], sides: str) -> None:
    table = [list(head), *map(list, body)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        cells = (f"{cell:{side}{n}}" for cell, side, n in zip(row, sides, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
