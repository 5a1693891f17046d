"""From coefficients to a loss on the rows: one candidate, several side by side, or with gradient.

Rows lie on the device as tokens, in batches of like length. On float32 weights a candidate is
composed in place, so that its forward costs what the base's costs. Where the weights must not be
touched (half precision, quantised), or where the rows are so few that the device is not filled,
candidates go through the runtime's operator, several along the batch axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lorahub_registry.compose.forms import Form
from lorahub_registry.evaluate.nll import keeps_logits, score, token_losses
from lorahub_registry.evaluate.tokens import IGNORED, Batch, repeated, tokens_that_fit
from lorahub_registry.runtime.apply import Applied
from lorahub_registry.runtime.mixture import RowsMerged
from lorahub_registry.runtime.operator import Beside, Operator, adaptable

Kind = Literal["token_mean", "published"]
Coefficients = tuple[float, ...]
# Tokens that fill a device. On a CPU the operator wins over composing in place only below this
# (measured); a GPU takes as many as fit.
_FULL = {"cpu": 512}


@dataclass(frozen=True)
class Loss:
    """One candidate's mean training NLL in nats a token, and how it changes with each coefficient.

    ``slope`` is [coefficients] as a tuple; None where it was not asked for.
    """

    nll: float
    slope: tuple[float, ...] | None = None


Losses = Callable[[Sequence[Coefficients]], Iterator[Loss]]
"""Candidates in, their losses out, in order: a :class:`Measure`, workers, or a journal before."""


class Measure:
    """The training NLL of candidates on a loaded base; a context manager.

    Args:
        model: the base; its weights are as before afterwards.
        batches: the rows, on the model's device.
        population: how many candidates a search proposes at a time.
        slopes: with every loss its gradient, by one backward pass through the operator; the base
            itself stays frozen.

    Attributes:
        how: ``in place``, ``operator``, ``gradient``, or ``beside``: the factor form, which no
            operator expresses, on weights that must not be touched.
        copies: how many candidates share one forward; fixed by rows, weights and device alone, so
            that it changes no result from run to run. 1 once a module was met that does not see
            rows apart.
    """

    def __init__(
        self,
        model: Any,
        form: Form,
        batches: Sequence[Batch],
        *,
        slopes: bool = False,
        population: int = 1,
    ) -> None:
        self._model, self._form, self._batches = model, form, batches
        self._device = batches[0].labels.device
        self._sliced = keeps_logits(model)
        self._tokens = sum(int((b.labels != IGNORED).sum()) for b in batches)
        self._wide: dict[int, list[Batch]] = {}
        exact = _float32(model, form)
        wide = not slopes and form.stacks is not None
        self.copies = min(population, self._fitting(exact)) if wide else 1
        alone = form.stacks is None or (exact and self.copies == 1)
        in_place = "in place" if exact else "beside"
        self.how = "gradient" if slopes else in_place if alone else "operator"
        self._on: Any = None

    def _fitting(self, exact: bool) -> int:
        place = self._device.type
        full = _FULL.get(place) or tokens_that_fit(
            place, getattr(self._model.config, "vocab_size", 0)
        )
        if place == "cpu" and not exact:
            full *= 4  # there is no better way on these weights
        # Of an encoder–decoder, whichever side is longer.
        largest = max(t.numel() for b in self._batches for t in (*b.inputs.values(), b.labels))
        return max(1, full // largest)

    def __enter__(self) -> Measure:
        form = self._form
        if self.how in {"in place", "beside"}:
            self._on = Applied(self._model, form.modules)
        elif form.stacks is not None:
            self._on = Operator(self._model, form.stacks)
        else:
            self._on = Beside(adaptable(self._model, form.modules))
        self._on.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._on.__exit__()
        self._wide.clear()

    def __call__(self, candidates: Sequence[Coefficients]) -> Iterator[Loss]:
        """The loss of each candidate, in order; not a number where the model's output is none."""
        if self.how == "operator":
            first = 0
            while first < len(candidates):
                part = candidates[first : first + self.copies]
                try:
                    found = self._side_by_side(part)
                except RowsMerged:
                    self.copies = 1
                    continue
                yield from map(Loss, found)
                first += len(part)
            return
        for c in candidates:
            yield self._with_slope(c) if self.how == "gradient" else self._in_place(c)

    def _in_place(self, candidate: Coefficients) -> Loss:
        self._on.set(self._form.at(candidate))
        return Loss(score(self._model, self._batches).mean)

    def _side_by_side(self, candidates: Sequence[Coefficients]) -> list[float]:
        n = len(candidates)
        c = torch.tensor(candidates, dtype=torch.float32, device=self._device)
        if n not in self._wide:
            self._wide[n] = [repeated(b, n) for b in self._batches]
        sums = torch.zeros(n, dtype=torch.float64)
        with torch.inference_mode():
            for batch in self._wide[n]:
                rows = len(batch.rows) // n
                self._on.set(c[0] if n == 1 else c.repeat_interleave(rows, 0)[:, None])
                losses = token_losses(self._model, batch, sliced=self._sliced)
                sums += losses.reshape(n, -1).cpu().sum(1, dtype=torch.float64)
        return (sums / self._tokens).tolist()

    def _with_slope(self, candidate: Coefficients) -> Loss:
        c = torch.tensor(candidate, dtype=torch.float32, device=self._device, requires_grad=True)
        total = 0.0
        with torch.enable_grad():
            for batch in self._batches:
                # Set again for every batch: a backward pass frees what led to it.
                if self._form.stacks is not None:
                    self._on.set(c)
                else:
                    self._on.put(self._form.at(c))
                losses = token_losses(self._model, batch, sliced=self._sliced)
                whole = losses.cpu().sum(dtype=torch.float64)
                whole.backward()
                total += float(whole.detach())
        assert c.grad is not None
        return Loss(total / self._tokens, tuple((c.grad.double() / self._tokens).tolist()))


def value(nll: float, coefficients: Sequence[float], *, l1: float, kind: Kind, rows: int) -> float:
    """What a search makes small: ``nll + l1·mean|c|``; infinite where the NLL is not a number.

    The published objective divides the NLL by the number of rows, so that the weight of the
    penalty grows with it.
    """
    penalty = l1 * sum(map(abs, coefficients)) / len(coefficients)
    loss = nll if kind == "token_mean" else nll / rows
    return loss + penalty if math.isfinite(loss) else math.inf


def _float32(model: Any, form: Form) -> bool:
    """Whether every module that the form changes holds plain float32 weights."""
    weights = [getattr(m, "weight", None) for m in adaptable(model, form.modules).values()]
    return all(w is not None and w.dtype == torch.float32 for w in weights)
