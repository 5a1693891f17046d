"""Searches without gradients: nevergrad proposes, the rows answer."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lorahub_registry.compose.objective import Coefficients
from lorahub_registry.compose.stopping import Stop
from lorahub_registry.errors import RecipeError
from lorahub_registry.recipes.learned import GRADIENT, Learn, LoraHub

Values = Callable[[Sequence[Coefficients]], list[float]]


def ask_and_tell(
    values: Values,
    stop: Callable[[], Stop | None],
    *,
    size: int,
    method: Learn | LoraHub,
    seed: int,
) -> tuple[Coefficients, Stop]:
    """Ask for ``num_workers`` candidates, have them evaluated, tell what they gave, until the end.

    Args:
        values: candidates in, finite objectives out, in the same order.
        stop: asked after every round.

    Returns:
        What the optimizer recommends in the end, and why it ended.

    Raises:
        RecipeError: the optimizer fails: it lacks a package, or takes no such size or budget.
    """
    with _started(method, size, seed) as optimizer:
        told = 0
        while (end := stop()) is None:
            asked = _ask(optimizer, method, told)
            found = values([tuple(float(x) for x in candidate.value) for candidate in asked])
            with _named(method.optimizer):
                for candidate, objective in zip(asked, found, strict=True):
                    optimizer.tell(candidate, objective)
            told += len(asked)
        with _named(method.optimizer):
            recommended = optimizer.provide_recommendation().value
    return tuple(float(x) for x in recommended), end


def check_starts(method: Learn | LoraHub, *, size: int, seed: int) -> None:
    """Whether the search proposes anything at all.

    Raises:
        RecipeError: as :func:`ask_and_tell`.
    """
    if method.optimizer != GRADIENT:
        with _started(method, size, seed) as optimizer:
            _ask(optimizer, method, 0)


@contextmanager
def _started(method: Learn | LoraHub, size: int, seed: int) -> Iterator[Any]:
    """Nevergrad's optimizer, in the surroundings that it needs."""
    import nevergrad as ng  # takes half a second

    # COBYLA's thread may talk when all is over.
    warnings.filterwarnings("ignore", module=r"scipy\._lib\.pyprima")
    with warnings.catch_warnings(), _seeded(seed), _floats():
        space = ng.p.Array(
            init=[method.init] * size, lower=[-method.bounds] * size, upper=[method.bounds] * size
        )
        space.random_state.seed(seed)
        # COBYLA and bounded mutations talk about their own settings; nobody here can act on it.
        warnings.simplefilter("ignore")
        with _named(method.optimizer):
            optimizer = ng.optimizers.registry[method.optimizer](
                parametrization=space, budget=method.budget, num_workers=method.num_workers
            )
        yield optimizer


def _ask(optimizer: Any, method: Learn | LoraHub, told: int) -> list[Any]:
    with _named(method.optimizer):
        count = min(method.num_workers, method.budget - told)
        return [optimizer.ask() for _ in range(count)]


def _one(number: Any) -> float:
    return float(np.asarray(number).item())


@contextmanager
def _floats() -> Iterator[None]:
    """Let nevergrad make floats of arrays that hold one number.

    1.0.12 does so in its metamodels, which NGOpt takes for several candidates at a time; numpy
    2.4 refuses it.
    """
    from nevergrad.optimization import metamodel

    metamodel.float = _one
    try:
        yield
    finally:
        del metamodel.float


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Some of nevergrad's searches draw from the generators that everybody shares."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextmanager
def _named(optimizer: str) -> Iterator[None]:
    """Errors of nevergrad's own as one that names the optimizer."""
    try:
        yield
    except Exception as error:
        raise RecipeError(
            f"nevergrad's {optimizer} fails here: {type(error).__name__}: {error}",
            hint="take another optimizer; NGOpt chooses one that fits size and budget",
        ) from error
