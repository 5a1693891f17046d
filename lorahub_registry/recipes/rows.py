"""Rows of example data: JSON Lines, a JSON list, or CSV. Nothing is skipped silently."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePath
from random import Random
from typing import Any, NoReturn, Protocol

from lorahub_registry.errors import DataError
from lorahub_registry.recipes.fields import did_you_mean
from lorahub_registry.refs import expand


class SplitLike(Protocol):
    """What is needed of a recipe's ``data.train`` or ``data.test``."""

    @property
    def path(self) -> str: ...
    @property
    def input(self) -> str: ...
    @property
    def output(self) -> str: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def select(self) -> str: ...


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        input: the input column's text.
        output: the answer's text; never empty.
        columns: all columns as they were read, the input's and the answer's among them.
        output_column: which of them is the answer.
        place: file and line, for messages.
    """

    input: str
    output: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    output_column: str = "output"
    place: str = ""


def read_rows(split: SplitLike, *, seed: int, beside: Path | None = None) -> list[Row]:
    """The rows of ``split``, in the file's order.

    Args:
        split: file, columns, and which rows to take: the ``first`` up to ``limit``, or as many
            at ``random``.
        seed: of the random choice; the same seed takes the same rows.
        beside: the folder that relative paths count from (the recipe's); default: here.

    Raises:
        DataError: no such file, not of its suffix's format, a row without one of the columns or
            without an answer, or no row at all. It names the file and the line.
    """
    path, name = expand(split.path, beside=beside), split.path
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{name}: rows are read from {', '.join(READERS)} files")
    found = reader(path, name)
    if split.limit is not None and split.select == "first":
        found = islice(found, split.limit)
    try:
        rows = [_row(columns, place, split, name) for place, columns in found]
    except FileNotFoundError:
        raise DataError(
            f"{name}: no such file ({path})",
            hint="relative paths in a recipe count from the recipe's own folder",
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text (at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    if not rows:
        raise DataError(f"{name}: holds no rows")
    if split.limit is not None and split.select == "random" and split.limit < len(rows):
        taken = Random(seed).sample(range(len(rows)), split.limit)
        rows = [rows[i] for i in sorted(taken)]
    return rows


def overlap(train: Sequence[Row], test: Sequence[Row]) -> int:
    """How many rows of ``test`` occur in ``train``, with the same input and the same answer."""
    seen = {(row.input, row.output) for row in train}
    return sum((row.input, row.output) in seen for row in test)


def _row(columns: Any, place: str, split: SplitLike, name: str) -> Row:
    if not isinstance(columns, dict):
        raise DataError(f'{place}: a row must be an object of columns, as {{"input": …}}')
    if len(columns) == 1:
        hint = "is the separator a comma?" if name.lower().endswith(".csv") else None
        only = next(iter(columns))
        raise DataError(
            f"{place}: there is one column only, {only!r}; an input and an answer are needed",
            hint=hint,
        )
    text = {}
    for role, column in (("input", split.input), ("output", split.output)):
        if column not in columns:
            near = did_you_mean(column, columns)
            raise DataError(
                f"{place}: there is no column {column!r}{near or ';'} "
                f"its columns are {', '.join(columns) or 'none'}",
                hint=f"say which column it is by `{role}:` beside the path",
            )
        text[role] = _text(columns[column], f"{place}: column {column!r}")
    if not text["output"].strip():
        raise DataError(f"{place}: column {split.output!r}, the answer, is empty")
    return Row(text["input"], text["output"], columns, split.output, place)


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    kinds = {type(None): "empty (null)", bool: "true or false", list: "a list", dict: "an object"}
    raise DataError(f"{where} is {kinds.get(type(value), 'something else')}, not text")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        at = f" (line {error.lineno}, column {error.colno})" if "\n" in text.strip() else ""
        raise DataError(f"{place}: not JSON: {error.msg}{at}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from None


def _read_jsonl(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{name}, line {number}"
                yield place, _json(line, place)


def _read_json(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    rows = _json(path.read_text(encoding="utf-8-sig"), name)
    if not isinstance(rows, list):
        raise DataError(
            f"{name}: must be a list of rows", hint="one object a line is called .jsonl"
        )
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", row


def _read_csv(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        header: list[str] | None = None
        try:
            for cells in lines:
                place = f"{name}, line {lines.line_num}"
                if header is None:
                    header = cells
                    if twice := sorted({c for c in header if header.count(c) > 1}):
                        raise DataError(f"{place}: column {twice[0]!r} is there twice")
                elif cells:
                    if len(cells) != len(header):
                        raise DataError(
                            f"{place}: {len(cells)} cells under {len(header)} columns",
                            hint="put text that holds a comma or a line break in double quotes",
                        )
                    yield place, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{name}, line {lines.line_num}: not CSV: {error}") from None


READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
"""Suffix → what reads such a file, row by row, each with its place."""


def check_data_path(text: str) -> str:
    """``text`` if it names a file of rows on this machine.

    Raises:
        ValueError: an address, or a suffix that is not read.
    """
    if "://" in text:
        raise ValueError(f"must be a file on this machine, got {text!r}")
    if PurePath(text).suffix.lower() not in READERS:
        raise ValueError(f"must end in one of {', '.join(READERS)}; got {text!r}")
    return text
