"""The rows of one adapter of a factory: train, validation and test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lorahub_registry.errors import DataError
from lorahub_registry.recipes.factory import AdapterPlan, TrainSplit
from lorahub_registry.recipes.rows import RowsFile, held_out, read_file


def read_splits(plan: AdapterPlan, *, beside: Path | None = None) -> dict[str, RowsFile]:
    """Split → its rows, for the splits that there are; ``train`` is always one.

    A share of ``train`` for ``validation`` is taken out of it, by the adapter's seed.

    Args:
        beside: the folder that relative paths count from (the factory's); default: here.

    Raises:
        DataError: rows that cannot be read, or too few to hold some out.
    """
    data, seed = plan.data, plan.training.seed or 0
    train = read_file(data.train, seed=seed, beside=beside)
    found = {"train": train}
    if isinstance(data.validation, TrainSplit):
        found["validation"] = read_file(data.validation, seed=seed, beside=beside)
    elif data.validation is not None:
        try:
            kept, out = held_out(train.rows, data.validation, seed=seed)
        except DataError as error:
            raise DataError(f"{train.name}: {error}") from None
        found = {"train": replace(train, rows=kept), "validation": replace(train, rows=out)}
    if data.test is not None:
        found["test"] = read_file(data.test, seed=seed, beside=beside)
    return found
