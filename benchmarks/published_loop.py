"""LoraHub's loop as published, on stock PEFT: the peer of the search benchmarks."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nevergrad as ng
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader

L1, BOUND = 0.05, 1.5
Coefficients = tuple[float, ...]
State = dict[str, torch.Tensor]
Rows = list[dict[str, torch.Tensor]]


def load(base: Any, folders: Sequence[Path], device: str) -> tuple[PeftModel, list[State]]:
    """Every module through the one base, and a copy of its tensors."""
    model = PeftModel.from_pretrained(base, folders[0]).to(device).eval()
    states = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a second adapter on the same model: so it is published
        for folder in folders:
            loaded = PeftModel.from_pretrained(base, folder)
            states.append(copy.deepcopy(get_peft_model_state_dict(loaded)))
    return model, states


class PublishedLoop:
    """One candidate: state dicts summed name by name, loaded, a new loader, forward.

    Args:
        rows: tensors of each row, all of one length, with labels.
        divided: the cross-entropy is divided by the number of rows, as published; else it is the
            mean over the output tokens of all rows, one batch either way.
    """

    def __init__(
        self, model: Any, states: Sequence[State], rows: Rows, device: str, *, divided: bool = True
    ) -> None:
        self._model, self._states, self._rows = model, states, rows
        self._device, self._by = device, len(rows) if divided else 1

    def __call__(self, coefficients: Sequence[float]) -> tuple[float, float]:
        """(mean cross-entropy, objective)."""
        first, *others = zip(coefficients, self._states, strict=True)
        total = {name: first[0] * tensor for name, tensor in first[1].items()}
        for weight, state in others:
            for name, tensor in state.items():
                total[name] = total[name] + weight * tensor
        set_peft_model_state_dict(self._model, total)
        loss = 0.0
        rows: Any = self._rows
        loader: DataLoader[Any] = DataLoader(rows, batch_size=len(rows))
        with torch.no_grad():
            for read in loader:
                inputs = {name: tensor.to(self._device) for name, tensor in read.items()}
                loss += float(self._model(**inputs).loss.detach().float())
        penalty = L1 * sum(map(abs, coefficients)) / len(coefficients)
        return loss, loss / self._by + penalty


@dataclass(frozen=True)
class Run:
    """One search.

    Attributes:
        weights: what it ended with.
        trace: for each evaluation its objective, and the wall and CPU seconds until it was known.
        load: wall and CPU seconds until the first could be asked for.
    """

    weights: Coefficients
    trace: list[tuple[float, float, float]]
    load: tuple[float, float]


def search(
    make_base: Callable[[], Any],
    folders: Sequence[Path],
    rows: Rows,
    *,
    divided: bool,
    steps: int,
    seed: int,
    device: str,
) -> tuple[Run, PublishedLoop]:
    """The whole: loading, then NGOpt within ± 1.5 from 0."""
    clock = Clock()
    model, states = load(make_base().to(device), folders, device)
    loop = PublishedLoop(model, states, rows, device, divided=divided)
    loaded, trace = clock(), []

    def score(weights: Any) -> float:
        objective = loop(weights)[1]
        trace.append((objective, *clock()))
        return objective

    n = len(folders)
    space = ng.p.Array(init=[0.0] * n, lower=[-BOUND] * n, upper=[BOUND] * n)
    space.random_state.seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ng.optimizers.NGOpt(parametrization=space, budget=steps).minimize(score)
    return Run(tuple(found.value.tolist()), trace, loaded), loop


class Clock:
    """(wall, CPU) seconds since it was made."""

    def __init__(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def __call__(self) -> tuple[float, float]:
        return time.perf_counter() - self._begin[0], time.process_time() - self._begin[1]
