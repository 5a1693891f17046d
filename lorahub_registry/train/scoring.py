"""Rows scored in whatever memory there is: where it runs out, in batches of half the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from lorahub_registry.errors import LoraregError
from lorahub_registry.evaluate import measure as measuring
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.generation import exact_match
from lorahub_registry.evaluate.measure import Measured, TestSet
from lorahub_registry.evaluate.nll import RowNLL, score
from lorahub_registry.evaluate.tokens import Batch
from lorahub_registry.progress import Progress, silent

_GENERATED = 32  # rows that generation takes together
Found = TypeVar("Found")


class NoMemory(LoraregError):
    """Memory does not hold the least that is needed."""


@contextmanager
def holding(what: str) -> Iterator[None]:
    """Make what does not fit.

    Raises:
        NoMemory: memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise NoMemory(
            f"memory does not hold {what}, with gradients and optimizer",
            hint="train fewer in one run, of a lower r, or on a base with quantization: 4bit",
        ) from None


class Scoring:
    """Work on batches, and the same work on smaller ones where memory runs out.

    Attributes:
        parts: into how many each batch is cut; what did not fit once is not tried again.
    """

    def __init__(self, progress: Progress = silent) -> None:
        self.parts = 1
        self._progress = progress

    def __call__(self, what: str, rows: int, work: Callable[[int], Found]) -> Found:
        """What ``work`` gives, called with the number of parts that each batch is cut into.

        Args:
            what: whose rows they are, for messages.
            rows: of the largest batch.

        Raises:
            NoMemory: one row alone does not fit.
        """
        while True:
            try:
                return work(self.parts)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            # Out of the handler, whose error holds what was computed.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.parts >= rows:
                raise NoMemory(
                    f"{what}: memory does not hold one of them",
                    hint="lower max_length, or free some of the device's memory",
                )
            self.parts *= 2
            most = math.ceil(rows / self.parts)
            self._progress.warn(
                f"{what}: memory ran out, and they are scored again with at most {most} "
                f"{'rows' if most > 1 else 'row'} at a time"
            )

    def score(self, what: str, model: Any, batches: Sequence[Batch]) -> RowNLL:
        """:func:`~lorahub_registry.evaluate.nll.score`."""
        return self(what, _most(batches), lambda parts: score(model, cut(batches, parts)))

    def measure(
        self,
        model: Any,
        base: LoadedBase,
        name: str,
        kind: str,
        test: TestSet,
        *,
        progress: Progress = silent,
    ) -> tuple[RowNLL, Measured]:
        """:func:`~lorahub_registry.evaluate.measure.measure`."""

        def nll(parts: int) -> tuple[RowNLL, Measured]:
            rows = replace(test, batches=cut(test.batches, parts), metrics=["nll"])
            return measuring.measure(model, base, name, kind, rows, progress=progress)

        what = f"test rows of {name}"
        found, told = self(what, _most(test.batches), nll)
        if "exact_match" not in test.metrics:
            return found, told
        order = sorted(range(len(test.rows)), key=lambda i: (len(test.rows[i].prompt), i))

        def hits(parts: int) -> torch.Tensor:
            size = len(order) if parts == 1 else math.ceil(_GENERATED / parts)
            each = torch.zeros(len(order), dtype=torch.float64)
            for at in range(0, len(order), size):
                part = order[at : at + size]
                each[part] = exact_match(
                    model, base.tokenizer, [test.rows[i] for i in part], seq2seq=base.seq2seq,
                    ends=test.ends, max_new_tokens=test.max_new_tokens, progress=progress,
                )  # fmt: skip
            return each

        each = Scoring(self._progress)(what, min(_GENERATED, len(order)), hits)
        error = float(each.std() / len(each) ** 0.5) if len(each) > 1 else float("nan")
        return found, replace(told, exact_match=float(each.mean()), exact_match_stderr=error)


def cut(batches: Sequence[Batch], parts: int) -> list[Batch]:
    """Each batch in so many, as far as its rows go; their padding stays."""
    found = []
    for batch in batches:
        size = math.ceil(len(batch.rows) / parts)
        for at in range(0, len(batch.rows), size):
            part = slice(at, at + size)
            inputs = {name: tensor[part] for name, tensor in batch.inputs.items()}
            found.append(Batch(inputs, batch.labels[part], batch.keep, batch.rows[part]))
    return found


def _most(batches: Sequence[Batch]) -> int:
    return max(len(batch.rows) for batch in batches)
