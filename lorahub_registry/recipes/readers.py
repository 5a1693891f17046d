"""Files of rows, by their suffix: JSON Lines, a JSON list, CSV, Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from lorahub_registry.errors import DataError

Found = Iterator[tuple[str, Any]]
"""Rows as they are read, each with its place: file and line."""


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


def _lines(data: bytes, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline=newline)


def _read_jsonl(data: bytes, name: str) -> Found:
    for number, line in enumerate(_lines(data), 1):
        if line.strip():
            place = f"{name}, line {number}"
            yield place, _json(line, place)


def _read_json(data: bytes, name: str) -> Found:
    rows = _json(data.decode("utf-8-sig"), name)
    if not isinstance(rows, list):
        raise DataError(
            f"{name}: must be a list of rows", hint="one object a line is called .jsonl"
        )
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", row


def _read_parquet(data: bytes, name: str) -> Found:
    from lorahub_registry.recipes.dataset import parquet_rows

    for number, row in enumerate(parquet_rows(data, name), 1):
        yield f"{name}, row {number}", row


def _read_csv(data: bytes, name: str) -> Found:
    lines = csv.reader(_lines(data, newline=""), strict=True)
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


READERS: dict[str, Callable[[bytes, str], Found]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""Suffix → what reads such a file's bytes, row by row, each with its place."""
