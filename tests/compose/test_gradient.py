"""Searches with gradients: the minimum that a dense grid finds, exact zeros, bounds, the start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.compose.forms import DeltaForm, FactorForm, Form
from lorahub_registry.compose.learn import Learned, learn
from lorahub_registry.compose.objective import Coefficients, Loss, Measure
from lorahub_registry.evaluate.generation import generate
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.tokens import Encoded, batches
from lorahub_registry.recipes.learned import Learn
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.lowrank import LowRank
from tests import tiny
from tests.compose.making import deltas

BOTH = pytest.mark.parametrize("gradient", ["lbfgs", "adam"])


def said_with(base: Any, mixture: dict[str, LowRank], count: int = 6) -> list[Any]:
    """Rows whose answers are what the base says with ``mixture`` on it."""
    prompts = [base.tokenizer(prompt)["input_ids"] for prompt, _ in tiny.rows(count)]
    with applied(base.model, mixture):
        said = generate(base.model, base.tokenizer, prompts, max_new_tokens=6, seq2seq=base.seq2seq)
    rows = [Encoded(p, o or [5]) for p, o in zip(prompts, said, strict=True)]
    return batches(rows, pad=0, seq2seq=base.seq2seq, device="cpu")


def searched(base: Any, what: Form, given: Sequence[Any], **options: Any) -> Learned:
    method = Learn(**{"optimizer": "gradient", "budget": 80, "l1": 0.01} | options)
    rows = sum(len(b.rows) for b in given)
    with Measure(base.model, what, given, slopes=True) as losses:
        return learn(losses, size=what.size, rows=rows, method=method, seed=0)


@BOTH
def test_it_ends_where_a_dense_grid_is_lowest(tiny_llama: tiny.Tiny, gradient: str) -> None:
    base, wide = tiny_llama.base(), deltas(tiny_llama, "wide")
    form = DeltaForm([wide])
    given = said_with(base, {n: d.scaled(0.75) for n, d in wide.items()})
    found = searched(base, form, given, gradient=gradient)
    grid = [x / 50 for x in range(-75, 76)]
    values = []
    for x in grid:
        with applied(base.model, form.at([x])):
            values.append(score(base.model, given).mean + 0.01 * abs(x))
    [c] = found.coefficients
    best = grid[values.index(min(values))]
    assert c == pytest.approx(best, abs=0.03)
    objective = min(e.objective for e in found.evaluations)
    assert objective == pytest.approx(min(values), abs=1e-3)


@BOTH
def test_an_adapter_that_does_not_help_gets_exactly_zero(
    tiny_llama: tiny.Tiny, gradient: str
) -> None:
    base = tiny_llama.base()
    parts = [deltas(tiny_llama, kind) for kind in ("wide", "head")]
    # The second does not touch the answers' loss: its B is next to nothing.
    parts[1] = {n: LowRank(d.a, d.b * 1e-3) for n, d in parts[1].items()}
    given = said_with(base, parts[0])
    start = {"init": 0.25, "gradient": gradient, "l1": 0.05}
    found = searched(base, DeltaForm(parts), given, **start)
    assert found.coefficients[0] > 0.3
    assert found.coefficients[1] == 0.0
    free = searched(base, DeltaForm(parts), given, **start | {"l1": 0.0})
    assert free.coefficients[1] != 0.0, "it is the L1 term that does it"


@BOTH
def test_it_stays_within_its_bounds_and_reaches_them(tiny_llama: tiny.Tiny, gradient: str) -> None:
    base, wide = tiny_llama.base(), deltas(tiny_llama, "wide")
    given = said_with(base, {n: d.scaled(-0.9) for n, d in wide.items()})
    found = searched(base, DeltaForm([wide]), given, bounds=0.4, gradient=gradient)
    assert all(abs(e.coefficients[0]) <= 0.4 for e in found.evaluations)
    assert found.coefficients == (-0.4,)


@BOTH
def test_the_factor_form_is_left_from_the_average(tiny_llama: tiny.Tiny, gradient: str) -> None:
    base = tiny_llama.base()
    places = [(tiny_llama.adapter(k), read_facts(tiny_llama.adapter(k))) for k in ("plain", "same")]
    form = FactorForm(places)
    given = said_with(base, dict(form.at([1.0, 0.5])))
    found = searched(base, form, given, gradient=gradient, form="factor")
    # At zero it is flat, whatever the rows are.
    assert found.evaluations[0].coefficients == (0.5, 0.5)
    assert found.evaluations[-1].objective < found.evaluations[0].objective
    with applied(base.model, form.at(found.coefficients)):
        best = min(found.evaluations, key=lambda e: e.objective)
        assert score(base.model, given).mean == pytest.approx(best.nll, rel=1e-5)


def test_a_seq2seq_base_is_searched_too(tiny_t5: tiny.Tiny) -> None:
    base, one = tiny_t5.base(), deltas(tiny_t5, "t5")
    given = said_with(base, one)
    found = searched(base, DeltaForm([one]), given)
    first, last = found.evaluations[0], min(found.evaluations, key=lambda e: e.objective)
    assert last.objective < first.objective - 0.01
    assert found.coefficients[0] > 0.1


def quadratic(candidates: Sequence[Coefficients]) -> Iterator[Loss]:
    for x, y in candidates:
        nll = 1 + (x - 0.5) ** 2 + 3 * (y + 0.25) ** 2
        yield Loss(nll, (2 * (x - 0.5), 6 * (y + 0.25)))


def test_it_says_that_it_converged_or_what_else_ended_it() -> None:
    def ended(**options: Any) -> str:
        method = Learn(**{"optimizer": "gradient", "l1": 0.0, "budget": 100} | options)
        return learn(quadratic, size=2, rows=1, method=method, seed=0).stop.reason

    assert ended() == "converged"
    assert ended(budget=2) == "budget"
    assert ended(target=1.2) == "target"
    assert ended(gradient="adam") == "budget"
    assert ended(gradient="adam", patience=5) == "plateau"


@BOTH
def test_its_budget_is_kept_to_the_candidate(gradient: str) -> None:
    for budget in (1, 2, 3, 7):
        method = Learn(optimizer="gradient", gradient=gradient, budget=budget, init=1.0)
        found = learn(quadratic, size=2, rows=1, method=method, seed=0)
        assert len(found.evaluations) == budget


def test_it_needs_far_fewer_candidates_than_a_search_without() -> None:
    counts = {}
    for optimizer in ("gradient", "CMA"):
        method = Learn(optimizer=optimizer, l1=0.0, budget=400, target=1.001)
        found = learn(quadratic, size=2, rows=1, method=method, seed=0)
        assert found.stop.reason == "target"
        counts[optimizer] = len(found.evaluations)
    assert counts["gradient"] * 2 < counts["CMA"]
