"""The search: its objective, its budget, and that it repeats."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.compose.forms import DeltaForm, FactorForm
from lorahub_registry.compose.learn import Learned, learn, objective
from lorahub_registry.errors import NotApplied
from lorahub_registry.evaluate.generation import generate
from lorahub_registry.evaluate.nll import RowNLL, score
from lorahub_registry.evaluate.tokens import Encoded, batches
from lorahub_registry.recipes.learned import Learn, LoraHub
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.lowrank import LowRank
from tests import tiny
from tests.compose.making import deltas, tokens

FOUR = RowNLL(torch.tensor([3.0, 5.0, 1.0, 1.0]), torch.tensor([2.0, 6.0, 1.0, 1.0]))


def test_the_objective_is_the_token_mean_and_the_mean_of_the_coefficients() -> None:
    assert objective(FOUR, [1.0, -0.5], 0.05, "token_mean") == pytest.approx(1.0 + 0.05 * 0.75)
    assert objective(FOUR, [1.0, -0.5], 0.0, "token_mean") == pytest.approx(1.0)


def test_the_published_objective_divides_the_loss_by_the_number_of_rows() -> None:
    assert objective(FOUR, [1.0, -0.5], 0.05, "published") == pytest.approx(0.25 + 0.05 * 0.75)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_the_worst(value: float) -> None:
    broken = RowNLL(torch.tensor([value]), torch.tensor([1.0]))
    assert objective(broken, [1.0], 0.05, "token_mean") == math.inf


def searched(model: tiny.Tiny, method: Learn | LoraHub, seed: int = 0, **more: Any) -> Learned:
    base = model.base()
    parts = [deltas(model, kind) for kind in ("plain", "same")]
    return learn(
        base.model, DeltaForm(parts), more.pop("batches", None) or tokens(base), size=2,
        method=method, seed=seed, **more,
    )  # fmt: skip


def test_the_same_seed_finds_the_same_to_the_last_bit(tiny_llama: tiny.Tiny) -> None:
    for optimizer in ("NGOpt", "CMA"):
        method = Learn(budget=6, optimizer=optimizer)  # type: ignore[arg-type]
        assert searched(tiny_llama, method, 3) == searched(tiny_llama, method, 3)


def test_another_seed_goes_another_way(tiny_llama: tiny.Tiny) -> None:
    method = Learn(budget=5, optimizer="RandomSearch")
    assert (
        searched(tiny_llama, method, 1).evaluations != searched(tiny_llama, method, 2).evaluations
    )


@pytest.mark.parametrize("workers", [1, 4])
def test_the_budget_is_the_number_of_candidates(tiny_llama: tiny.Tiny, workers: int) -> None:
    found = searched(tiny_llama, Learn(budget=10, num_workers=workers, optimizer="DE"))
    assert len(found.evaluations) == 10


def test_learn_ends_with_the_best_that_it_saw(tiny_llama: tiny.Tiny) -> None:
    found = searched(tiny_llama, Learn(budget=12, l1=0.0))
    best = min(found.evaluations, key=lambda e: e.objective)
    assert found.coefficients == best.coefficients
    assert all(abs(c) <= 1.5 for e in found.evaluations for c in e.coefficients)


def test_learn_takes_no_recommendation_and_lorahub_does(
    tiny_llama: tiny.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(evaluate: Any, *_: Any) -> tuple[float, ...]:
        evaluate((0.25, 0.0))
        evaluate((0.0, 0.25))
        return (0.125, 0.125)

    monkeypatch.setattr(sys.modules[learn.__module__], "_search", search)
    assert searched(tiny_llama, Learn()).coefficients in {(0.25, 0.0), (0.0, 0.25)}
    assert searched(tiny_llama, LoraHub()).coefficients == (0.125, 0.125)


def test_bounds_and_start_are_kept(tiny_llama: tiny.Tiny) -> None:
    found = searched(
        tiny_llama, Learn(budget=12, bounds=0.25, init=0.125, optimizer="RandomSearch")
    )
    assert max(abs(c) for e in found.evaluations for c in e.coefficients) <= 0.25
    found = searched(tiny_llama, Learn(budget=3, bounds=0.25, init=0.125))
    assert found.evaluations[0].coefficients == (0.125, 0.125)


def test_every_evaluation_is_that_of_its_coefficients(tiny_llama: tiny.Tiny) -> None:
    found = searched(tiny_llama, Learn(budget=4, optimizer="RandomSearch", l1=0.1))
    base = tiny_llama.base()
    form = DeltaForm([deltas(tiny_llama, kind) for kind in ("plain", "same")])
    for seen in found.evaluations:
        with applied(base.model, form.at(seen.coefficients)):
            nll = score(base.model, tokens(base))
        assert seen.nll == nll.mean
        assert seen.objective == pytest.approx(
            nll.mean + 0.1 * sum(map(abs, seen.coefficients)) / 2, rel=1e-12
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
    found = learn(base.model, FactorForm(places), made, size=2, method=LoraHub(budget=12), seed=0)
    seen_objectives = {e.coefficients: e.objective for e in found.evaluations}
    # Mostly a candidate that it tried; the search may recommend a point between.
    assert seen_objectives.get(found.coefficients, -1.0) <= min(seen_objectives.values())
    for seen in found.evaluations:
        penalty = 0.05 * sum(map(abs, seen.coefficients)) / 2
        assert seen.objective == pytest.approx(seen.nll / count + penalty)
    assert any(found.coefficients)


def test_the_base_is_as_it_was_after_a_search(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    before = {n: t.clone() for n, t in base.model.state_dict().items()}
    form = DeltaForm([deltas(tiny_llama, kind) for kind in ("plain", "wide")])
    learn(base.model, form, tokens(base), size=2, method=Learn(budget=3, init=0.5), seed=0)
    assert all(torch.equal(before[n], t) for n, t in base.model.state_dict().items())


def test_a_search_that_ends_with_the_base_says_so(tiny_llama: tiny.Tiny) -> None:
    with pytest.raises(NotApplied, match="no mixture is better on the training rows"):
        searched(tiny_llama, Learn(budget=3, l1=1e6))


def test_a_search_without_a_finite_loss_says_so(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    huge = {n: LowRank(d.a * 1e30, d.b * 1e30) for n, d in deltas(tiny_llama, "plain").items()}
    with pytest.raises(NotApplied, match="no finite loss"):
        learn(
            base.model, DeltaForm([huge]), tokens(base), size=1,
            method=Learn(budget=2, init=1.0, bounds=1.5), seed=0,
        )  # fmt: skip


def test_progress_counts_candidates(tiny_llama: tiny.Tiny) -> None:
    from contextlib import contextmanager

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

    searched(tiny_llama, Learn(budget=4), progress=Watcher())
    assert counted == [(4, 4.0)]
