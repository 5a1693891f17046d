"""When a search ends, and why: budget, plateau, target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.compose.stopping import Stopping
from lorahub_registry.recipes.learned import Learn

values = st.lists(
    st.floats(-5, 5) | st.sampled_from([math.inf, 1.0, 0.999, 0.9989]), min_size=1, max_size=30
)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "budget": st.integers(1, 40),
    "patience": st.none() | st.integers(1, 6),
    "tolerance": st.sampled_from([0.0, 1e-3, 0.5]),
    "target": st.none() | st.floats(-5, 5),
}


def reason(found: Sequence[float], **given: Any) -> str | None:
    """Why a search with these objectives is at its end."""
    stopping = Stopping(Learn(**given))
    for value in found:
        stopping.add(value)
    stop = stopping.reason()
    return stop and stop.reason


@given(values, st.fixed_dictionaries(OPTIONS))
def test_it_is_what_its_words_say(found: list[float], given: dict[str, Any]) -> None:
    budget, patience, tolerance, target = (given[name] for name in OPTIONS)
    stop = reason(found, **given)
    best = min(found)
    if target is not None and best <= target:
        expected = "target"
    elif len(found) >= budget:
        expected = "budget"
    else:
        # Said another way: the mark is the last value that beat every mark before it.
        marks, mark = [], math.inf
        for n, value in enumerate(found):
            if value < mark - tolerance:
                mark = value
                marks.append(n)
        since = len(found) - 1 - (marks[-1] if marks else -1)
        flat = patience is not None and since >= patience and math.isfinite(best)
        expected = "plateau" if flat else None
    assert stop == expected


@given(values)
def test_without_other_reasons_only_the_budget_ends_it(found: list[float]) -> None:
    assert reason(found, budget=len(found) + 1) is None
    assert reason(found, budget=len(found)) == "budget"


def test_many_small_steps_are_a_gain_together() -> None:
    steps = [1 - 0.0004 * n for n in range(20)]
    # Each alone is less than the tolerance; three of them are more.
    for patience, expected in ((3, set[str | None]({None})), (2, {None, "plateau"})):
        ends = (reason(steps[:n], patience=patience, budget=40) for n in range(1, 21))
        assert set(ends) == expected


def test_a_patience_of_one_ends_at_the_first_that_is_no_better() -> None:
    assert reason([3, 2, 1], patience=1, budget=40) is None
    assert reason([3, 2, 2], patience=1, budget=40) == "plateau"


def test_nothing_finite_is_no_plateau() -> None:
    assert reason([math.inf] * 9, patience=3, budget=40) is None
    assert reason([*[math.inf] * 9, 1.0], patience=3, budget=40) is None


def test_it_says_how_it_ended() -> None:
    stopping = Stopping(Learn(patience=2, budget=9, target=0.5))
    for value in (1.0, 2.0, 2.0):
        stopping.add(value)
    stop = stopping.reason()
    assert stop is not None
    assert stop.text == "the last 2 candidates were no better by more than 0.001"
    stopping.add(0.25)
    stop = stopping.reason()
    assert stop is not None
    assert (stop.reason, stop.text) == ("target", "the objective reached 0.5")
