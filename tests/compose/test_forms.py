"""The two functions of coefficients, each against its formula in dense float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.compose.forms import DeltaForm, FactorForm
from lorahub_registry.weights.files import load_factors
from lorahub_registry.weights.lowrank import LowRank, weighted_sum
from tests import tiny
from tests.compose.making import deltas

KINDS = ["plain", "wide", "patterns", "rslora"]
COEFFICIENTS = st.lists(st.floats(-1.5, 1.5), min_size=4, max_size=4)


def dense(delta: LowRank) -> torch.Tensor:
    return delta.b.double() @ delta.a.double()


@given(c=COEFFICIENTS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_delta_form_is_the_exact_sum(tiny_llama: tiny.Tiny, c: list[float]) -> None:
    parts = [deltas(tiny_llama, kind) for kind in KINDS]
    form = DeltaForm(parts)
    assert form.modules == tuple(sorted({name for part in parts for name in part}))
    found = form.at(c)
    assert tuple(found) == form.modules
    for name in form.modules:
        terms = [x * dense(part[name]) for part, x in zip(parts, c, strict=True) if name in part]
        scale = max(float(dense(part[name]).abs().max()) for part in parts if name in part)
        torch.testing.assert_close(dense(found[name]), sum(terms), rtol=0, atol=1e-6 * scale)


def test_the_delta_form_is_what_will_be_written(tiny_llama: tiny.Tiny) -> None:
    parts, c = [deltas(tiny_llama, kind) for kind in KINDS], [0.3, -1.2, 0.0, 2.0]
    found, written = DeltaForm(parts).at(c), weighted_sum(parts, c)
    for name, delta in written.items():
        torch.testing.assert_close(found[name].dense(), delta.dense(), rtol=1e-5, atol=1e-6)


def factor_form(model: tiny.Tiny) -> tuple[FactorForm, list[dict[str, tuple[torch.Tensor, ...]]]]:
    places = [(model.adapter(k), read_facts(model.adapter(k))) for k in ("plain", "same")]
    return FactorForm(places), [load_factors(*place) for place in places]


@given(c=st.lists(st.floats(-1.5, 1.5), min_size=2, max_size=2))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_factor_form_is_the_published_product(tiny_llama: tiny.Tiny, c: list[float]) -> None:
    form, factors = factor_form(tiny_llama)
    found = form.at(c)
    assert tuple(found) == form.modules == tuple(factors[0])
    for name in form.modules:
        a = sum(x * part[name][0].double() for part, x in zip(factors, c, strict=True))
        b = sum(x * part[name][1].double() for part, x in zip(factors, c, strict=True))
        expected = 2.0 * b @ a  # s = α/r
        torch.testing.assert_close(dense(found[name]), expected, rtol=1e-5, atol=1e-6)


def test_the_factor_form_is_even_and_has_cross_terms(tiny_llama: tiny.Tiny) -> None:
    form, _ = factor_form(tiny_llama)
    exact = DeltaForm([deltas(tiny_llama, "plain"), deltas(tiny_llama, "same")])
    name = form.modules[0]
    here, there = form.at([0.5, -1.0])[name], form.at([-0.5, 1.0])[name]
    torch.testing.assert_close(here.dense(), there.dense())
    half, sums = dense(form.at([0.5, 0.5])[name]), dense(exact.at([0.5, 0.5])[name])
    assert float((half - sums).norm() / sums.norm()) > 0.3
    for alone in ([1.0, 0.0], [0.0, 1.0]):
        torch.testing.assert_close(
            dense(form.at(alone)[name]), dense(exact.at(alone)[name]), rtol=1e-5, atol=1e-6
        )


def test_no_coefficients_mean_no_delta(tiny_llama: tiny.Tiny) -> None:
    exact = DeltaForm([deltas(tiny_llama, "plain"), deltas(tiny_llama, "wide")])
    for form in (exact, factor_form(tiny_llama)[0]):
        assert {delta.norm() for delta in form.at([0.0, 0.0]).values()} == {0.0}


def test_another_number_of_coefficients_is_refused(tiny_llama: tiny.Tiny) -> None:
    exact = DeltaForm([deltas(tiny_llama, "plain"), deltas(tiny_llama, "wide")])
    for form in (exact, factor_form(tiny_llama)[0]):
        for wrong in ([1.0], [1.0, 0.0, 2.0]):
            with pytest.raises(ValueError, match=f"{len(wrong)} coefficients for 2"):
                form.at(wrong)
