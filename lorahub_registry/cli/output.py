"""What commands print: data on stdout in one of three formats, talk on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

import click

from lorahub_registry.cli import interrupt
from lorahub_registry.progress import Task

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Format = Literal["human", "json", "quiet"]


class Output:
    """Data and talk of one command. It is also the :class:`Progress` that lower layers see."""

    def __init__(self, format: Format = "human") -> None:
        self.format = format
        self._bars: Bars | None = None

    # Data

    def table(
        self,
        rows: Sequence[Mapping[str, Any]],
        columns: Mapping[str, str],
        *,
        quiet: str,
    ) -> None:
        """Rows as a table, a JSON array, or one ``quiet`` field a line.

        Args:
            columns: key → how it is written in the human table: ``<`` or ``>``.
        """
        if self.format == "json":
            click.echo(json.dumps([dict(row) for row in rows], ensure_ascii=False))
        elif self.format == "quiet":
            for row in rows:
                click.echo(clean(" ".join(str(row[quiet]).split())))
        else:
            for line in _aligned(rows, columns):
                click.echo(line)

    def record(self, facts: Mapping[str, Any], human: str, *, quiet: str) -> None:
        """One thing: as text, as a JSON object, or its ``quiet`` line."""
        if self.format == "json":
            click.echo(json.dumps(facts, ensure_ascii=False))
        else:
            click.echo(quiet if self.format == "quiet" else human)

    # Talk

    def done(self, text: str) -> None:
        """A thing has been done."""
        self._talk(f"✓ {text}")

    def say(self, text: str) -> None:
        """A line of talk; not in quiet format."""
        self._talk(text)

    def warn(self, text: str) -> None:
        """A line that must not be missed."""
        self._line(f"Warning: {text}")

    def _talk(self, text: str) -> None:
        if self.format != "quiet":
            self._line(text)

    def _line(self, text: str) -> None:
        text = lines(text)
        if self._bars is None:
            click.echo(text, err=True)
        else:  # above the bars, which are drawn again below it
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        """A bar on the terminal; nothing in quiet format.

        Where stderr is a file or a pipe, work that counts steps says a line now and then.
        """
        if self.format == "quiet" or not sys.stderr.isatty():
            told = self.format != "quiet" and unit == "step" and total
            yield _Lines(self._line, title, total) if told and total else _Step()
            return
        first = self._bars is None
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        bars = self._bars
        row = bars.add_task(title, total=total, note="", bytes=unit == "B")
        try:
            yield _Bar(bars, row)
        finally:
            bars.remove_task(row)
            if first:
                bars.stop()
                self._bars = None


class _Step:
    """A task that is not drawn; each step is where a lost interrupt comes up again."""

    def advance(self, n: float = 1) -> None:
        interrupt.check()

    def describe(self, text: str) -> None:
        pass


class _Lines(_Step):
    """A line after each tenth but the last, of which there is more to say than that it is over."""

    def __init__(self, line: Callable[[str], None], title: str, total: float) -> None:
        self._line, self._title, self._total = line, title, total
        self._done, self._note = 0.0, ""

    def advance(self, n: float = 1) -> None:
        super().advance(n)
        before, self._done = self._done, self._done + n
        tenths = [int(10 * done / self._total) for done in (before, self._done)]
        if tenths[0] < tenths[1] and self._done < self._total:
            note = f", {self._note}" if self._note else ""
            self._line(f"{self._title}: step {self._done:.0f} of {self._total:.0f}{note}")

    def describe(self, text: str) -> None:
        self._note = text


class _Bar(_Step):
    def __init__(self, bars: Bars, row: Any) -> None:
        self._bars, self._row = bars, row

    def advance(self, n: float = 1) -> None:
        interrupt.check()
        self._bars.advance(self._row, n)

    def describe(self, text: str) -> None:
        self._bars.update(self._row, note=text)


def _bars() -> Bars:
    """Bars with what is done, how fast, and when it will end; gone when they are."""
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.progress import Task as RichTask
    from rich.text import Text

    class Done(ProgressColumn):
        def render(self, task: RichTask) -> Text:
            if task.total is None:
                return Text(f"{task.elapsed or 0:.0f} s")
            left = f", {task.time_remaining:.0f} s left" if task.time_remaining else ""
            if not task.fields["bytes"]:
                return Text(f"{task.completed:.0f}/{task.total:.0f}{left}")
            speed = f", {size(task.speed)}/s" if task.speed else ""
            return Text(f"{size(task.completed)} of {size(task.total)}{speed}{left}")

    return RichProgress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        Done(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )


def size(n: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def clean(value: Any) -> str:
    """``value`` as one line without control characters: nothing of a repo steers a terminal."""
    text = "" if value is None else str(value)
    return "".join(c if c.isprintable() else "�" for c in text)


def lines(text: str) -> str:
    """``text`` with its line breaks, and no other control character."""
    return "\n".join(clean(line) for line in text.split("\n"))


def _aligned(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    cells = [[key.upper() for key in columns]]
    cells += [[_shown(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = []
    for line in cells:
        padded = [
            f"{text:{side}{width}}"
            for text, side, width in zip(line, columns.values(), widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, (list, tuple)):
        return clean(",".join(map(str, value))) or "-"
    return clean(f"{value:.4g}" if isinstance(value, float) else value)


def with_output(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--format``, ``--json`` and ``-q``, and an ``out`` argument."""

    @click.option(
        "--format",
        "format_",
        type=click.Choice(["human", "json", "quiet"]),
        default="human",
        help="How to print data: a table, JSON, or one id a line.",
    )
    @click.option("--json", "json_", is_flag=True, help="The same as --format json.")
    @click.option("-q", "--quiet", is_flag=True, help="The same as --format quiet.")
    @wraps(command)
    def wrapped(*args: Any, format_: Format, json_: bool, quiet: bool, **kwargs: Any) -> None:
        if json_ and quiet:
            raise click.UsageError("--json and --quiet exclude each other")
        format_ = "json" if json_ else "quiet" if quiet else format_
        command(*args, out=Output(format_), **kwargs)

    return wrapped
