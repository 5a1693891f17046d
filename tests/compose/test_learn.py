"""The search: its objective, its budget, its end, and that it repeats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.compose.forms import DeltaForm, FactorForm, Form
from lorahub_registry.compose.learn import Learned, check_helps, learn
from lorahub_registry.compose.objective import Coefficients, Loss, Losses, Measure, value
from lorahub_registry.errors import DataError, NotApplied, RecipeError
from lorahub_registry.evaluate.generation import generate
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.tokens import Encoded, batches
from lorahub_registry.recipes.learned import Learn, LoraHub
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.lowrank import LowRank
from tests import tiny
from tests.compose.making import deltas, tokens

NAN, INF = float("nan"), float("inf")


def test_the_objective_is_the_token_mean_and_the_mean_of_the_coefficients() -> None:
    given: dict[str, Any] = {"kind": "token_mean", "rows": 4}
    assert value(1.0, [1.0, -0.5], l1=0.05, **given) == pytest.approx(1.0 + 0.05 * 0.75)
    assert value(1.0, [1.0, -0.5], l1=0.0, **given) == 1.0


def test_the_published_objective_divides_the_loss_by_the_number_of_rows() -> None:
    found = value(1.0, [1.0, -0.5], l1=0.05, kind="published", rows=4)
    assert found == pytest.approx(0.25 + 0.05 * 0.75)


@pytest.mark.parametrize("nll", [NAN, INF, -INF])
def test_a_loss_that_is_no_number_is_the_worst(nll: float) -> None:
    assert value(nll, [1.0], l1=0.05, kind="token_mean", rows=1) == math.inf


def searched(
    model: tiny.Tiny, method: Learn | LoraHub, seed: int = 0, form: Form | None = None, **more: Any
) -> Learned:
    base = model.base()
    form = form or DeltaForm([deltas(model, kind) for kind in ("plain", "same")])
    given = more.pop("batches", None) or tokens(base)
    rows = sum(len(b.rows) for b in given)
    slopes = method.optimizer == "gradient"
    with Measure(base.model, form, given, slopes=slopes) as losses:
        return learn(losses, size=form.size, rows=rows, method=method, seed=seed, **more)


def bowl(c: Sequence[float], at: Sequence[float] = (0.5, -0.25)) -> tuple[float, tuple[float, ...]]:
    """A value with its least, 1, at ``at``; and its slope."""
    apart = [x - y for x, y in zip(c, at, strict=True)]
    return 1 + sum(x * x for x in apart), tuple(2 * x for x in apart)


def made_up(**special: Loss) -> tuple[Losses, list[Coefficients]]:
    """Losses of a :func:`bowl`, but for some evaluations, ``n3`` for the third; what is asked."""
    asked: list[Coefficients] = []

    def losses(candidates: Sequence[Coefficients]) -> Iterator[Loss]:
        for c in candidates:
            asked.append(c)
            yield special.get(f"n{len(asked)}") or Loss(*bowl(c))

    return losses, asked


@pytest.mark.parametrize(
    "optimizer",
    # Discrete mutations draw from numpy's global generator.
    ["NGOpt", "CMA", "TinyLognormalDiscreteOnePlusOne", "gradient"],
)
def test_the_same_seed_finds_the_same_to_the_last_bit(
    tiny_llama: tiny.Tiny, optimizer: str
) -> None:
    method = Learn(budget=6, optimizer=optimizer)
    assert searched(tiny_llama, method, 3) == searched(tiny_llama, method, 3)


def test_a_search_leaves_everybodys_generators_as_they_were() -> None:
    import random

    import numpy as np

    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    losses, _ = made_up()
    method = Learn(budget=6, optimizer="TinyLognormalDiscreteOnePlusOne")
    learn(losses, size=2, rows=1, method=method, seed=0)
    assert (random.random(), np.random.rand()) == expected


def test_another_seed_goes_another_way(tiny_llama: tiny.Tiny) -> None:
    method = Learn(budget=5, optimizer="RandomSearch")
    assert (
        searched(tiny_llama, method, 1).evaluations != searched(tiny_llama, method, 2).evaluations
    )


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_the_budget_is_the_number_of_candidates(workers: int) -> None:
    losses, asked = made_up()
    method = Learn(budget=10, num_workers=workers, optimizer="DE")
    found = learn(losses, size=2, rows=1, method=method, seed=0)
    assert len(found.evaluations) == len(asked) == 10
    assert found.stop.reason == "budget"
    assert found.stop.text == "the budget of 10 candidates was spent"


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_default_search_takes_several_candidates_at_once(workers: int, size: int) -> None:
    """From three on it fits a model to what it saw, which not every numpy lets it do."""

    def losses(candidates: Sequence[Coefficients]) -> Iterator[Loss]:
        return (Loss(*bowl(c, [0.3] * size)) for c in candidates)

    method = Learn(budget=40, num_workers=workers, l1=0.0)
    found = learn(losses, size=size, rows=1, method=method, seed=0)
    assert len(found.evaluations) == 40
    assert min(e.nll for e in found.evaluations) < 1.05


@pytest.mark.parametrize("optimizer", ["NGOpt", "CMA", "DE", "PSO", "Cobyla", "gradient"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_budget_of_one_is_one_candidate(optimizer: str, size: int) -> None:
    asked: list[Coefficients] = []

    def losses(candidates: Sequence[Coefficients]) -> Iterator[Loss]:
        asked.extend(candidates)
        return (Loss(*bowl(c, [0.5] * size)) for c in candidates)

    found = learn(losses, size=size, rows=1, method=Learn(budget=1, optimizer=optimizer), seed=0)
    assert [e.coefficients for e in found.evaluations] == asked
    assert len(asked) == 1


def test_learn_ends_with_the_best_that_it_saw(tiny_llama: tiny.Tiny) -> None:
    found = searched(tiny_llama, Learn(budget=12, l1=0.0))
    best = min(found.evaluations, key=lambda e: e.objective)
    assert found.coefficients == best.coefficients
    assert all(abs(c) <= 1.5 for e in found.evaluations for c in e.coefficients)


def test_learn_takes_no_recommendation_and_lorahub_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorahub_registry.compose import learn as module

    def search(values: Any, stop: Any, **_: Any) -> tuple[Coefficients, Any]:
        values([(0.25, 0.0), (0.0, 0.25)])
        return (0.125, 0.125), stop()

    monkeypatch.setattr(module, "ask_and_tell", search)
    found = {}
    for method in (Learn(budget=2), LoraHub(budget=2)):
        losses, _ = made_up()
        found[method.type] = learn(losses, size=2, rows=1, method=method, seed=0).coefficients
    assert found == {"learn": (0.25, 0.0), "lorahub": (0.125, 0.125)}


@pytest.mark.parametrize("optimizer", ["CMA", "NGOpt", "OnePlusOne", "gradient"])
@pytest.mark.parametrize("bounds", [0.25, 1e-9])
def test_bounds_and_start_are_kept(optimizer: str, bounds: float) -> None:
    losses, asked = made_up()
    method = Learn(budget=12, bounds=bounds, init=bounds / 2, optimizer=optimizer)
    learn(losses, size=2, rows=1, method=method, seed=0)
    assert max(abs(x) for c in asked for x in c) <= bounds
    if optimizer != "CMA":  # which draws all its candidates around the start
        assert asked[0] == (bounds / 2, bounds / 2)


def test_every_evaluation_is_that_of_its_coefficients(tiny_llama: tiny.Tiny) -> None:
    found = searched(tiny_llama, Learn(budget=4, optimizer="RandomSearch", l1=0.1))
    base = tiny_llama.base()
    form = DeltaForm([deltas(tiny_llama, kind) for kind in ("plain", "same")])
    for seen in found.evaluations:
        with applied(base.model, form.at(seen.coefficients)):
            nll = score(base.model, tokens(base))
        assert seen.nll == pytest.approx(nll.mean, rel=1e-6)
        assert seen.objective == pytest.approx(
            seen.nll + 0.1 * sum(map(abs, seen.coefficients)) / 2, rel=1e-12
        )


def said_by(base: Any, count: int) -> list[Encoded]:
    """Rows whose outputs are what the model says as it stands."""
    prompts = [base.tokenizer(prompt)["input_ids"] for prompt, _ in tiny.rows(count)]
    said = generate(base.model, base.tokenizer, prompts, max_new_tokens=5, seq2seq=False)
    return [Encoded(prompt, output or [5]) for prompt, output in zip(prompts, said, strict=True)]


def test_lorahub_takes_the_searchs_recommendation(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    places = [(tiny_llama.adapter(k), read_facts(tiny_llama.adapter(k))) for k in ("plain", "same")]
    count = 8
    with applied(base.model, deltas(tiny_llama, "plain")):
        rows = said_by(base, count)
    made = batches(rows, pad=0, seq2seq=False, device="cpu")
    found = searched(tiny_llama, LoraHub(budget=12), form=FactorForm(places), batches=made)
    seen_objectives = {e.coefficients: e.objective for e in found.evaluations}
    # Mostly a candidate that it tried; the search may recommend a point between.
    assert seen_objectives.get(found.coefficients, -1.0) <= min(seen_objectives.values())
    for seen in found.evaluations:
        penalty = 0.05 * sum(map(abs, seen.coefficients)) / 2
        assert seen.objective == pytest.approx(seen.nll / count + penalty)
    assert any(found.coefficients)


def test_a_search_that_ends_with_the_base_says_so(tiny_llama: tiny.Tiny) -> None:
    found = searched(tiny_llama, Learn(budget=3, l1=1e6))
    assert not any(found.coefficients)
    base = tiny_llama.base()
    nll = score(base.model, tokens(base)).mean
    with pytest.raises(NotApplied, match="no mixture is better on the training rows") as error:
        check_helps(found)
    assert f"(NLL {nll:.3f})" in str(error.value)


def test_a_search_that_ends_with_anything_else_is_a_mixture(tiny_llama: tiny.Tiny) -> None:
    check_helps(searched(tiny_llama, Learn(budget=1, init=1e-6)))


def test_a_search_without_a_finite_loss_says_so(tiny_llama: tiny.Tiny) -> None:
    huge = {n: LowRank(d.a * 1e30, d.b * 1e30) for n, d in deltas(tiny_llama, "plain").items()}
    with pytest.raises(NotApplied, match="no finite loss"):
        searched(tiny_llama, Learn(budget=2, init=1.0), form=DeltaForm([huge]))


@pytest.mark.parametrize("optimizer", ["NGOpt", "CMA", "DE"])
def test_losses_that_are_no_numbers_are_skipped_counted_and_survived(optimizer: str) -> None:
    losses, asked = made_up(n2=Loss(NAN), n4=Loss(INF))
    method = Learn(budget=60, l1=0.0, optimizer=optimizer)
    found = learn(losses, size=2, rows=1, method=method, seed=0)
    assert found.skipped == 2
    assert [i for i, e in enumerate(found.evaluations) if e.objective == INF] == [1, 3]
    assert len(asked) == len(found.evaluations)
    # Two unlucky candidates do not keep a search from the bottom.
    assert min(e.objective for e in found.evaluations) < 1.05


def test_a_gradient_that_is_no_number_leads_back(tiny_llama: tiny.Tiny) -> None:
    """Beyond 0.75 nothing is a number, and the least is at 0.5."""

    def cliff(candidates: Sequence[Coefficients]) -> Iterator[Loss]:
        for c in candidates:
            yield Loss(NAN, (NAN, NAN)) if max(map(abs, c)) > 0.75 else Loss(*bowl(c))

    for gradient in ("lbfgs", "adam"):
        method = Learn(optimizer="gradient", gradient=gradient, init=1.0, l1=0.0, budget=100)
        found = learn(cliff, size=2, rows=1, method=method, seed=0)
        assert found.skipped > 0
        assert found.coefficients == pytest.approx((0.5, -0.25), abs=0.05), gradient


def test_rows_that_tell_no_adapters_apart_are_the_datas_fault(tiny_llama: tiny.Tiny) -> None:
    untrained = {n: LowRank(d.a, d.b * 0) for n, d in deltas(tiny_llama, "plain").items()}
    with pytest.raises(DataError, match="the rows cannot tell the adapters apart") as error:
        searched(tiny_llama, Learn(budget=4), form=DeltaForm([untrained]))
    assert "the NLL is the same for all coefficients" in str(error.value)
    assert "each of 4 candidates" in str(error.value)
    assert "untrained (B is zero)" in str(error.value.hint)


def test_a_gradient_of_zero_tells_no_adapters_apart_either(tiny_llama: tiny.Tiny) -> None:
    untrained = {n: LowRank(d.a, d.b * 0) for n, d in deltas(tiny_llama, "plain").items()}
    with pytest.raises(DataError, match="the gradient is zero"):
        searched(tiny_llama, Learn(optimizer="gradient"), form=DeltaForm([untrained]))


def test_one_candidate_is_not_enough_to_blame_the_rows() -> None:
    losses, _ = made_up()
    assert learn(losses, size=2, rows=1, method=Learn(budget=1), seed=0).stop.reason == "budget"


@pytest.mark.parametrize(
    ("optimizer", "workers"),
    [("NLOPT_GN_CRS2_LM", 1), ("BAR4", 4)],  # a package that is not there, no such budget
)
def test_a_search_that_nevergrad_cannot_carry_out_is_named(optimizer: str, workers: int) -> None:
    losses, _ = made_up()
    method = Learn(budget=6, optimizer=optimizer, num_workers=workers)
    with pytest.raises(RecipeError, match=f"nevergrad's {optimizer} fails here: ") as error:
        learn(losses, size=2, rows=1, method=method, seed=0)
    assert "NGOpt" in str(error.value.hint)


def test_an_error_of_the_measuring_is_not_blamed_on_nevergrad() -> None:
    def losses(_: Sequence[Coefficients]) -> Iterator[Loss]:
        raise ZeroDivisionError
        yield

    with pytest.raises(ZeroDivisionError):
        learn(losses, size=2, rows=1, method=Learn(budget=6), seed=0)


@pytest.mark.parametrize("optimizer", ["NGOpt", "gradient"])
def test_progress_counts_candidates(tiny_llama: tiny.Tiny, optimizer: str) -> None:
    counted: list[tuple[float | None, float]] = []

    class Watcher:
        @contextmanager
        def task(self, title: str, total: float | None = None, unit: str = "") -> Any:
            self.done = 0.0
            yield self
            counted.append((total, self.done))

        def advance(self, n: float = 1) -> None:
            self.done += n

        def describe(self, text: str) -> None:
            assert text.startswith("best ")

    losses, _ = made_up()
    method = Learn(budget=3, optimizer=optimizer)
    learn(losses, size=2, rows=1, method=method, seed=0, progress=Watcher())  # type: ignore[arg-type]
    assert counted == [(3, 3.0)]


def test_the_base_is_as_it_was_after_a_search(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    before = {n: t.clone() for n, t in base.model.state_dict().items()}
    form = DeltaForm([deltas(tiny_llama, kind) for kind in ("plain", "wide")])
    with Measure(base.model, form, tokens(base)) as losses:
        learn(losses, size=2, rows=8, method=Learn(budget=3, init=0.5), seed=0)
    assert all(torch.equal(before[n], t) for n, t in base.model.state_dict().items())
