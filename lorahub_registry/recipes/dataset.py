"""What the extra ``datasets`` is for: Parquet files, and datasets of the Hub. Imported late."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lorahub_registry.errors import DataError
from lorahub_registry.refs import expand, looks_like_path

_COMMIT = re.compile(r"@([0-9a-f]{40})(?:/|\Z)")


def parquet_rows(data: bytes, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file's bytes.

    Raises:
        DataError: it is none, or the extra is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        _extra(f"{name}: Parquet files need pyarrow")
    try:
        for batch in parquet.ParquetFile(pyarrow.BufferReader(data)).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: not Parquet: {_first_line(error)}") from None


def open_dataset(
    split: Any, beside: Path | None
) -> tuple[str, str | None, Iterator[tuple[str, Any]]]:
    """A dataset's name, its commit, and its rows, each with its place.

    No code of a dataset's own is ever run. Its files are kept in the Hub's cache.

    Args:
        split: ``dataset`` (owner/name[@revision], or a folder), ``config`` and ``split``.
        beside: the folder that a relative folder counts from.

    Raises:
        DataError: there is none, it has no such configuration or split, or the extra is not
            installed.
    """
    written = split.dataset
    try:
        import datasets
    except ImportError:
        _extra(f"{written}: datasets are read by the library of that name")
    name, _, revision = written.partition("@")
    location = name
    if looks_like_path(written):
        location, revision = str(expand(written, beside=beside)), ""
        name = Path(location).name
        if not Path(location).is_dir():
            raise DataError(
                f"{written}: no such folder ({location})",
                hint="relative paths count from the factory's own folder",
            )
    elif Path(name).exists():
        # The library would take the folder, whatever the Hub has.
        raise DataError(
            f"{written}: may be a dataset on the Hub, and is a folder here, too",
            hint=f"write ./{name} for the folder, or start lorareg elsewhere",
        )
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(location, split.config, revision=revision or None)
        builder.download_and_prepare()
        table = builder.as_dataset(split=split.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{written}: its split {split.split!r} cannot be read: {_first_line(error)}",
            hint="look at the dataset's page for its config and split, and at HF_TOKEN where it "
            "is private",
        ) from error
    finally:
        if not hidden:
            datasets.enable_progress_bars()
    # Of a dataset on the Hub this is hf://datasets/owner/name@commit.
    commit = found[1] if (found := _COMMIT.search(str(builder.base_path))) else None
    rows = ((f"{name} ({split.split}), row {n}", row) for n, row in enumerate(table, 1))
    return name, commit, rows


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _extra(what: str) -> NoReturn:
    raise DataError(what, hint="pip install 'lorareg[datasets]'") from None
