"""The proof: base, every single adapter, the uniform average and the written mixture, same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorahub_registry.compose.verdict import BASE, MIXTURE, UNIFORM, Verdict, judge
from lorahub_registry.compose.write import stock_peft
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.generation import exact_match
from lorahub_registry.evaluate.nll import RowNLL, score
from lorahub_registry.evaluate.tokens import Batch, Encoded
from lorahub_registry.progress import Progress, silent
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.lowrank import Deltas, weighted_sum


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
    """One row of the proof's table.

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


@dataclass(frozen=True)
class Proof:
    """The table and what it means; ``exact_nll`` is the mixture's before it was written."""

    table: tuple[Measured, ...]
    verdict: Verdict
    exact_nll: float


def prove(
    base: LoadedBase,
    names: Sequence[str],
    adapters: Sequence[Deltas],
    mixture: Deltas,
    folder: Path,
    test: TestSet,
    *,
    progress: Progress = silent,
) -> Proof:
    """Score everything on the same rows.

    Args:
        mixture: as it was computed; what is judged is what stock PEFT loads from ``folder``.
    """
    scores: dict[str, RowNLL] = {}
    table = []
    with progress.task("Proving", len(names) + 4, "model") as task:
        for name, kind, on in _contestants(base, names, adapters, folder):
            task.describe(name)
            with on as model:
                scores[name], measured = _measure(model, base, name, kind, test, progress)
            table.append(measured)
            task.advance()
        with applied(base.model, mixture):
            exact = score(base.model, test.batches).mean
        task.advance()
    return Proof(tuple(table), judge(scores, list(names)), exact)


def _contestants(
    base: LoadedBase, names: Sequence[str], adapters: Sequence[Deltas], folder: Path
) -> Iterator[tuple[str, str, AbstractContextManager[Any]]]:
    yield BASE, "base", nullcontext(base.model)
    for name, deltas in zip(names, adapters, strict=True):
        yield name, "adapter", _with(base, deltas)
    uniform = weighted_sum(adapters, [1 / len(adapters)] * len(adapters))
    yield UNIFORM, "uniform", _with(base, uniform)
    yield MIXTURE, "mixture", stock_peft(base, folder)


@contextmanager
def _with(base: LoadedBase, deltas: Deltas) -> Iterator[Any]:
    with applied(base.model, deltas):
        yield base.model


def _measure(
    model: Any, base: LoadedBase, name: str, kind: str, test: TestSet, progress: Progress
) -> tuple[RowNLL, Measured]:
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
