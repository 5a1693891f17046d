"""The proof: base, every single adapter, the uniform average and the written mixture, same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorahub_registry.compose.verdict import (
    BASE,
    MIXTURE,
    PLAIN,
    UNIFORM,
    Verdict,
    judge,
)
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.measure import Measured, TestSet, measure
from lorahub_registry.evaluate.nll import RowNLL, score
from lorahub_registry.evaluate.stock import stock_peft
from lorahub_registry.progress import Progress, silent
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.lowrank import Deltas, weighted_sum


@dataclass(frozen=True)
class Proof:
    """The table and what it means.

    Attributes:
        exact_nll: the static mixture's before it was written.
    """

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
    dynamic: Path | None = None,
    static: Mapping[str, Deltas] | None = None,
    progress: Progress = silent,
) -> Proof:
    """Score everything on the same rows.

    Args:
        mixture: as it was computed; what is judged is what stock PEFT loads from ``folder``.
        dynamic: the folder of a mixture that decides while it runs: it is judged then, and
            ``folder`` holds its plain LoRA, which is one to compare with.
        static: name → sum of learned static coefficients, to compare a dynamic mixture with.
    """
    scores: dict[str, RowNLL] = {}
    table = []
    contestants = _contestants(base, names, adapters, folder, dynamic, static or {})
    more = bool(dynamic) + len(static or {})
    with progress.task("Proving", len(names) + 4 + more, "model") as task:
        for name, kind, on in contestants:
            task.describe(name)
            with on as model:
                scores[name], measured = measure(model, base, name, kind, test, progress=progress)
            table.append(measured)
            task.advance()
        with applied(base.model, mixture):
            exact = score(base.model, test.batches).mean
        task.advance()
    return Proof(tuple(table), judge(scores, list(names)), exact)


def _contestants(
    base: LoadedBase,
    names: Sequence[str],
    adapters: Sequence[Deltas],
    folder: Path,
    dynamic: Path | None,
    static: Mapping[str, Deltas],
) -> Iterator[tuple[str, str, AbstractContextManager[Any]]]:
    yield BASE, "base", nullcontext(base.model)
    for name, deltas in zip(names, adapters, strict=True):
        yield name, "adapter", _with(base, deltas)
    uniform = weighted_sum(adapters, [1 / len(adapters)] * len(adapters))
    yield UNIFORM, "uniform", _with(base, uniform)
    for name, deltas in static.items():
        yield name, "static", _with(base, deltas)
    if dynamic is not None:
        yield PLAIN, "plain", stock_peft(base, folder)
    yield MIXTURE, "mixture", stock_peft(base, dynamic or folder)


@contextmanager
def _with(base: LoadedBase, deltas: Deltas) -> Iterator[Any]:
    with applied(base.model, deltas):
        yield base.model
