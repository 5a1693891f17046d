"""A model, with or without an adapter on it, on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.generation import exact_match
from lorahub_registry.evaluate.nll import RowNLL, score
from lorahub_registry.evaluate.tokens import Batch, Encoded
from lorahub_registry.progress import Progress, silent


@dataclass(frozen=True)
class TestSet:
    """Held-out rows, tokenised, and what is measured on them."""

    rows: Sequence[Encoded]
    batches: Sequence[Batch]
    metrics: Sequence[str]
    max_new_tokens: int
    ends: bool

    __test__ = False  # no test case, whatever pytest thinks


@dataclass(frozen=True)
class Measured:
    """One row of a table of scores.

    Attributes:
        name: an adapter's, ``base``, ``uniform average`` or ``mixture``.
        nll: mean over output tokens, in nats, with its standard error over rows.
        exact_match: share of rows answered exactly; None where not asked for.
    """

    name: str
    kind: str
    n: int
    nll: float
    nll_stderr: float
    exact_match: float | None = None
    exact_match_stderr: float | None = None


def measure(
    model: Any,
    base: LoadedBase,
    name: str,
    kind: str,
    test: TestSet,
    *,
    progress: Progress = silent,
) -> tuple[RowNLL, Measured]:
    """Score ``model`` on the rows of ``test``.

    Args:
        model: the base's, or stock PEFT's around it.
        name, kind: of the row in the table.
    """
    nll = score(model, test.batches)
    share = error = None
    if "exact_match" in test.metrics:
        hits = exact_match(
            model,
            base.tokenizer,
            test.rows,
            seq2seq=base.seq2seq,
            ends=test.ends,
            max_new_tokens=test.max_new_tokens,
            progress=progress,
        )
        share = float(hits.mean())
        error = float(hits.std() / len(hits) ** 0.5) if len(hits) > 1 else float("nan")
    return nll, Measured(name, kind, len(nll.sums), nll.mean, nll.stderr, share, error)


def check_text(base: LoadedBase) -> list[Encoded]:
    """A row to check an adapter's effect on where the recipe brings none."""
    ids = base.tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]
    half = max(1, len(ids) // 2)
    return [Encoded(ids[:half], ids[half:] or ids[-1:])]
