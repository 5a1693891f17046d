"""Rows of example data: JSON Lines, a JSON list, CSV, Parquet, or a dataset of the Hub's.

Nothing is skipped silently. A file is read once: its rows come of the very bytes whose SHA-256 is
told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path, PurePath
from random import Random
from typing import Any, Protocol

from lorahub_registry.errors import DataError
from lorahub_registry.recipes.fields import did_you_mean
from lorahub_registry.recipes.readers import READERS, Found
from lorahub_registry.refs import expand, looks_like_path


class SplitLike(Protocol):
    """What is needed of a recipe's ``data.train`` or ``data.test``.

    A factory's also has ``text``, ``dataset``, ``config`` and ``split``; its path may be None.
    """

    @property
    def path(self) -> str | None: ...
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
        input: the input column's text; "" of plain text.
        output: the answer, never empty; or the whole of a plain text, which may be.
        columns: all columns as they were read, the input's and the answer's among them.
        output_column: which of them is the answer.
        place: file and line, for messages.
    """

    input: str
    output: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    output_column: str = "output"
    place: str = ""


@dataclass(frozen=True)
class RowsFile:
    """Rows, and what they were read from.

    Attributes:
        name: the file's name, without its folder, or the dataset's id.
        sha256: of the file's bytes; of a dataset, of the rows that were taken, as JSON.
        revision: the commit of a dataset on the Hub.
    """

    rows: list[Row]
    name: str
    sha256: str
    revision: str | None = None


def read_rows(split: SplitLike, *, seed: int, beside: Path | None = None) -> list[Row]:
    """The rows of ``split``, in the file's order; see :func:`read_file`."""
    return read_file(split, seed=seed, beside=beside).rows


def read_file(split: SplitLike, *, seed: int, beside: Path | None = None) -> RowsFile:
    """The rows of ``split``, in the file's order, with the file's SHA-256.

    Args:
        split: file or dataset, columns, and which rows to take: the ``first`` up to ``limit``, or
            as many at ``random``.
        seed: of the random choice; the same seed takes the same rows.
        beside: the folder that relative paths count from (the recipe's); default: here.

    Raises:
        DataError: no such file or dataset, not of its suffix's format, a row without one of the
            columns or without an answer, or no row at all. It names the file and the line.
    """
    if getattr(split, "dataset", None) is not None:
        from lorahub_registry.recipes.dataset import open_dataset

        name, revision, found = open_dataset(split, beside)
        rows = _taken(found, split, seed, name)
        columns = json.dumps([row.columns for row in rows], sort_keys=True, default=str)
        return RowsFile(rows, name, sha256(columns.encode()).hexdigest(), revision)
    assert split.path is not None
    path, name = expand(split.path, beside=beside), split.path
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{name}: rows are read from {', '.join(READERS)} files")
    try:
        data = path.read_bytes()
        # Places get into results, which travel: no folder of this machine in them.
        shown = path.name if looks_like_path(name) and not name.startswith(".") else name
        rows = _taken(reader(data, shown), split, seed, shown)
    except FileNotFoundError:
        raise DataError(
            f"{name}: no such file ({path})",
            hint="relative paths count from the folder of the file that names them",
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text (at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    return RowsFile(rows, path.name, sha256(data).hexdigest())


def _taken(found: Found, split: SplitLike, seed: int, name: str) -> list[Row]:
    if split.limit is not None and split.select == "first":
        found = islice(found, split.limit)
    rows = [_row(columns, place, split, name) for place, columns in found]
    if not rows:
        raise DataError(f"{name}: holds no rows")
    if split.limit is not None and split.select == "random" and split.limit < len(rows):
        taken = Random(seed).sample(range(len(rows)), split.limit)
        rows = [rows[i] for i in sorted(taken)]
    return rows


def held_out(rows: Sequence[Row], share: float, *, seed: int) -> tuple[list[Row], list[Row]]:
    """``rows`` without a seeded choice of them, and that choice; both in their order.

    At least one row is held out.

    Raises:
        DataError: none would be left.
    """
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise DataError(f"a share of {share:g} of {len(rows)} rows leaves none to learn from")
    out = set(Random(seed).sample(range(len(rows)), count))
    return (
        [row for i, row in enumerate(rows) if i not in out],
        [row for i, row in enumerate(rows) if i in out],
    )


def overlap(train: Sequence[Row], test: Sequence[Row]) -> int:
    """How many rows of ``test`` occur in ``train``, with the same input and the same answer."""
    seen = {(row.input, row.output) for row in train}
    return sum((row.input, row.output) in seen for row in test)


def _row(columns: Any, place: str, split: SplitLike, name: str) -> Row:
    if not isinstance(columns, dict):
        raise DataError(f'{place}: a row must be an object of columns, as {{"input": …}}')
    plain = getattr(split, "text", None)
    if plain is None and len(columns) == 1:
        hint = "is the separator a comma?" if name.lower().endswith(".csv") else None
        only = next(iter(columns))
        raise DataError(
            f"{place}: there is one column only, {only!r}; an input and an answer are needed",
            hint=hint,
        )
    text = {}
    wanted = {"text": plain} if plain else {"input": split.input, "output": split.output}
    for role, column in wanted.items():
        if column not in columns:
            near = did_you_mean(column, columns)
            raise DataError(
                f"{place}: there is no column {column!r}{near or ';'} "
                f"its columns are {', '.join(columns) or 'none'}",
                hint=f"say which column it is by `{role}:` beside the path",
            )
        text[role] = _text(columns[column], f"{place}: column {column!r}")
    if plain is not None:
        return Row("", text["text"], columns, plain, place)
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
