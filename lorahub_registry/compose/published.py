"""LoraHub's search as its own functions carry it out: on texts, ending in one merged model.

The objective is the published one (arXiv:2307.13269): the mean cross-entropy of each batch, summed
over the batches, divided by the number of examples, plus a penalty on the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from lorahub_registry.adapters.compat import Member
from lorahub_registry.compose.forms import FactorForm
from lorahub_registry.compose.learn import learn
from lorahub_registry.compose.objective import Coefficients, Loss
from lorahub_registry.errors import IncompatibleAdapters, UsageError
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.tokens import IGNORED, Encoded
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.learned import LoraHub
from lorahub_registry.runtime.apply import Applied


class Examples:
    """Rows as a caller's ``get_loss`` meets them: like a Hugging Face dataset, made of lists.

    ``examples[0]`` is a row, ``examples["input"]`` a column, ``examples[0:2]`` columns of rows.
    Columns: ``input`` and ``output``, texts; ``input_ids``, ``attention_mask`` and ``labels``, all
    rows padded to one length. Of a causal model, ``input_ids`` are prompt and output, and the
    labels of the prompt are ignored ones.
    """

    def __init__(
        self,
        texts: Sequence[tuple[str, str]],
        rows: Sequence[Encoded],
        *,
        pad: int,
        seq2seq: bool,
    ) -> None:
        inputs = [r.prompt if seq2seq else [*r.prompt, *r.output] for r in rows]
        labels = [
            r.output if seq2seq else [*[IGNORED] * len(r.prompt), *r.output] for r in rows
        ]  # fmt: skip
        self._columns: dict[str, list[Any]] = {
            "input": [text for text, _ in texts],
            "output": [text for _, text in texts],
            "input_ids": _padded(inputs, pad),
            "attention_mask": _padded([[1] * len(ids) for ids in inputs], 0),
            "labels": _padded(labels, IGNORED),
        }

    def __len__(self) -> int:
        return len(self._columns["input"])

    @overload
    def __getitem__(self, which: str) -> list[Any]: ...
    @overload
    def __getitem__(self, which: int | slice) -> dict[str, Any]: ...
    def __getitem__(self, which: int | slice | str) -> Any:
        if isinstance(which, str):
            return self._columns[which]
        return {name: column[which] for name, column in self._columns.items()}


def search(
    base: LoadedBase,
    members: Sequence[Member],
    rows: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int | None,
    seed: int,
    get_loss: Callable[[], Any] | None = None,
    get_regular: Callable[[np.ndarray], Any] | None = None,
    progress: Progress = silent,
) -> list[float]:
    """Search one weight a member, and leave the mixture in the base's weights.

    Args:
        base: float32 weights; changed for good, unless an error is raised.
        steps: how many candidates are tried.
        batch_size: rows that share one mean; None: all.
        get_loss: another loss of the model as it stands, divided already; None: the published one.
        get_regular: another penalty, of the weights [members]; None: 0.05 times mean |w|.

    Raises:
        IncompatibleAdapters: a module's weight is not one that a delta can be merged into.
        NotApplied: no candidate had a finite loss.
        DataError: all had the same loss.
        UsageError: ``get_loss`` or ``get_regular`` gives no number.
    """
    form = FactorForm([(m.folder, m.facts) for m in members], base.device)
    on = Applied(base.model, form.modules)
    if not on.in_place:
        raise IncompatibleAdapters(
            f"{base.name} has adapted modules whose weights are quantised, or shared with another "
            "module: nothing can be merged into them",
            hint="use compose with method: {type: lorahub}, which writes an adapter",
        )
    n, size = len(rows), batch_size or len(rows)
    parts = [base.batches(rows[i : i + size]) for i in range(0, n, size)]

    def losses(candidates: Sequence[Coefficients]) -> Iterator[Loss]:
        for c in candidates:
            on.set(form.at(c))
            # `learn` divides by the number of rows.
            if get_loss:
                loss = n * _number(get_loss(), "get_loss")
            else:
                loss = sum(score(base.model, part).mean for part in parts)
            if get_regular:
                loss += n * _number(get_regular(np.array(c)), "get_regular")
            yield Loss(loss)

    method = LoraHub(budget=steps, l1=0.0) if get_regular else LoraHub(budget=steps)
    with on:
        found = learn(
            losses, size=len(members), rows=n, method=method, seed=seed, progress=progress
        )
    on.set(form.at(found.coefficients))  # and nobody takes it off
    return list(found.coefficients)


def _number(found: Any, name: str) -> float:
    try:
        return float(found)
    except (TypeError, ValueError):
        raise UsageError(f"{name} gave {type(found).__name__}, not a number") from None


def _padded(rows: Sequence[list[int]], value: int) -> list[list[int]]:
    width = max(map(len, rows))
    return [[*row, *[value] * (width - len(row))] for row in rows]
