"""Experts.add against the dense sum in float64, in every form; gates and Arrow by the papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.mixture import Coefficients, Experts, RowsMerged, largest, turned
from lorahub_registry.runtime.routers import arrow, gate

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def experts(ranks: list[int], fan_in: int = 5, fan_out: int = 7) -> Experts:
    total = sum(ranks)
    return Experts(random(total, fan_in, seed=1), random(fan_out, total, seed=2), ranks, "m")


def dense_sum(made: Experts, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Σ c·B·A·x, expert by expert and token by token; c is [rows, positions, E]."""
    found = x.new_zeros(*x.shape[:-1], made.b.shape[0])
    parts = zip(made.a.split(made.ranks), made.b.split(made.ranks, 1), strict=True)
    for e, (a, b) in enumerate(parts):
        delta = b @ a
        for row in range(x.shape[0]):
            for position in range(x.shape[1]):
                found[row, position] += c[row, position, e] * (delta @ x[row, position])
    return found


FORMS = ["_all", "_gathered", "_by_expert"]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    e = draw(st.integers(1, 6))
    equal = draw(st.booleans())
    ranks = [draw(st.integers(0, 3))] * e if equal else draw(
        st.lists(st.integers(0, 3), min_size=e, max_size=e)
    )  # fmt: skip
    shape = draw(st.sampled_from(["all", "row", "token"]))
    return {
        "ranks": ranks, "rows": draw(st.integers(1, 3)), "positions": draw(st.integers(1, 4)),
        "shape": shape, "k": None if shape == "all" else draw(st.none() | st.integers(1, e)),
        "merged": draw(st.sampled_from(["apart", "tokens", "one row", "one each"])),
        "form": draw(st.none() | st.sampled_from(FORMS)),
        "grad": draw(st.booleans()), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@given(cases())
@settings(max_examples=200)
def test_every_form_is_the_dense_sum(case: dict[str, Any]) -> None:
    made = experts(case["ranks"])
    rows, positions, e = case["rows"], case["positions"], len(case["ranks"])
    x = random(rows, positions, 5, seed=case["seed"])
    y = random(rows, positions, 7, seed=case["seed"] + 1)
    lines = {"all": (), "row": (rows, 1), "token": (rows, positions)}[case["shape"]]
    c = random(*lines, e, seed=case["seed"] + 2)
    sparse = Coefficients(c)
    if case["k"] is not None:
        sparse = Coefficients(*c.topk(case["k"], -1))
        c = sparse.dense(e)
    expected = y + dense_sum(made, x, c.expand(rows, positions, e))

    form = case["form"]
    if form is not None and (form != "_gathered" or made._equal):
        made._cheapest = lambda *_: getattr(made, form)  # type: ignore[method-assign]
    shape = {
        "apart": (rows, positions), "tokens": (rows * positions,),
        "one row": (1, rows * positions), "one each": (rows * positions, 1),
    }[case["merged"]]  # fmt: skip
    with torch.set_grad_enabled(case["grad"]):
        found = made.add(y.view(*shape, 7), x.view(*shape, 5), sparse)
    assert found.shape == (*shape, 7)
    torch.testing.assert_close(found.view_as(expected), expected, **EXACT)


@pytest.mark.parametrize(
    ("experts_", "lines", "times", "k", "form"),
    [
        (128, 1, 1, 4, "_gathered"),  # decoding one prompt, four of many experts
        (64, 16, 1, 1, "_gathered"),  # another adapter in each row, decoding
        (16, 16, 128, 1, "_gathered"),  # and reading the prompts
        (128, 512, 1, 4, "_by_expert"),  # each token has its own experts
        (8, 512, 1, 4, "_all"),
        (2, 1, 1, 1, "_all"),
    ],
)
def test_what_is_zero_is_left_out_where_that_pays(
    experts_: int, lines: int, times: int, k: int, form: str
) -> None:
    made = experts([1] * experts_)
    which = torch.zeros(lines, k, dtype=torch.int64)
    assert made._cheapest(which, times).__name__ == form


def test_with_unequal_ranks_nothing_is_gathered() -> None:
    made = experts([1] * 127 + [2])
    assert made._cheapest(torch.zeros(1, 4, dtype=torch.int64), 1).__name__ != "_gathered"


def test_beams_have_their_rows_coefficients() -> None:
    made, c = experts([2, 1]), random(2, 1, 2, seed=1)
    x, y = random(6, 3, 5, seed=3), random(6, 3, 7, seed=4)
    expected = y + dense_sum(made, x, c.repeat_interleave(3, 0).expand(6, 3, 2))
    torch.testing.assert_close(made.add(y, x, Coefficients(c)), expected, **EXACT)


@pytest.mark.parametrize(
    ("c", "x"),
    [
        ((2, 3, 2), (2, 4, 5)),  # other positions: keys of another sequence
        ((2, 3, 2), (3, 2, 5)),  # as many tokens, otherwise arranged
        ((3, 1, 2), (2, 3, 5)),  # as many tokens as rows fit in, and still not theirs
        ((2, 1, 2), (5, 5)),
    ],
)
def test_tokens_that_are_not_its_own_are_refused(c: tuple[int, ...], x: tuple[int, ...]) -> None:
    with pytest.raises(RowsMerged, match="m gets its tokens as"):
        experts([2, 1]).add(torch.zeros(*x[:-1], 7), torch.zeros(x), Coefficients(torch.ones(c)))


def test_rows_are_taken_by_beams_and_by_tokens() -> None:
    c = Coefficients(torch.arange(4.0).view(2, 1, 2))
    rows = torch.tensor([1, 3])
    assert c.rows(torch.tensor([1]), 2).values.tolist() == [[[2, 3]]]
    assert c.rows(rows, 4).values.tolist() == [[[0, 1]], [[2, 3]]]
    tokens = Coefficients(torch.arange(8.0).view(2, 2, 2))
    assert tokens.rows(rows, 4).values.tolist() == [[[2, 3]], [[6, 7]]]
    assert Coefficients(torch.ones(2)).rows(rows, 4).values.tolist() == [1, 1]


def test_gradients_reach_the_coefficients_in_every_form() -> None:
    x, y = random(2, 3, 5, seed=1), random(2, 3, 7, seed=2)
    for form in FORMS:
        made = experts([2, 2, 2])
        made._cheapest = lambda *_, f=form, m=made: getattr(m, f)  # type: ignore[method-assign]
        which = torch.tensor([[0, 2], [1, 0]])[:, None]

        def run(c: torch.Tensor, made: Experts = made, which: torch.Tensor = which) -> Any:
            return made.add(y.clone(), x, Coefficients(c, which))

        assert torch.autograd.gradcheck(run, random(2, 1, 2, seed=4).requires_grad_())


def test_a_module_seen_in_inference_mode_can_be_trained_through() -> None:
    with torch.inference_mode():
        made = experts([2, 1])
    c = torch.ones(2, dtype=torch.float64, requires_grad=True)
    made.a, made.b = made.a.clone(), made.b.clone()
    made.add(random(1, 2, 7, seed=1), random(1, 2, 5, seed=2), Coefficients(c)).sum().backward()
    assert c.grad is not None


def test_factors_that_were_moved_are_the_ones_that_count() -> None:
    made = Experts(torch.nn.Parameter(random(4, 5, seed=1)), random(7, 4, seed=2), [2, 2])
    x, c = random(1, 2, 5, seed=3), random(1, 2, 2, seed=4)
    for factors in (None, (random(4, 5, seed=5), random(7, 4, seed=6))):
        if factors is not None:
            made.a.data, made.b.data = (turned(factor) for factor in factors)
        with torch.no_grad():
            found = made.add(torch.zeros(1, 2, 7).double(), x, Coefficients(c))
            torch.testing.assert_close(found, dense_sum(made, x, c), **EXACT)


def test_half_precision_outputs_get_float32_sums() -> None:
    made = experts([2, 1])
    made.a, made.b = made.a.float(), made.b.float()
    x, y = random(2, 3, 5, seed=1).bfloat16(), random(2, 3, 7, seed=2).bfloat16()
    c = Coefficients(torch.tensor([0.5, -2.0]))
    wide = made.add(y.float(), x.float(), c)
    found = made.add(y, x, c)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wide.bfloat16())


def test_the_gate_is_the_papers() -> None:
    x, weight, bias = random(2, 3, 5, seed=1), random(4, 5, seed=2), random(4, seed=3)
    found = gate(x, weight, bias, 1.1)
    for row in range(2):
        for position in range(3):
            logits = [float(w @ x[row, position]) / 1.1 for w in weight]
            exps = [math.exp(v - max(logits)) for v in logits]
            expected = [e / sum(exps) + float(b) for e, b in zip(exps, bias, strict=True)]
            assert found[row, position].tolist() == pytest.approx(expected, abs=1e-14)


def test_a_gate_in_half_precision_computes_in_float32() -> None:
    found = gate(torch.ones(1, 2).bfloat16(), torch.ones(3, 2), torch.zeros(3), 1.0)
    assert found.dtype == torch.float32


def test_arrow_is_the_papers_and_leaves_out_who_is_not_there() -> None:
    prototypes = torch.nn.functional.normalize(random(4, 5, seed=1), dim=-1)
    prototypes[2] = 0
    x = random(2, 3, 5, seed=2)
    found = arrow(x, prototypes, 2, 0.5).dense(4)
    for row in range(2):
        for position in range(3):
            near = (prototypes @ x[row, position]).abs() / 0.5
            chosen = sorted((0, 1, 3), key=lambda e, near=near: -float(near[e]))[:2]
            shares = near[chosen].softmax(-1)
            expected = torch.zeros(4, dtype=torch.float64)
            expected[chosen] = shares
            torch.testing.assert_close(found[row, position], expected, **EXACT)


def test_arrow_with_fewer_experts_than_it_may_take() -> None:
    prototypes = torch.zeros(3, 5)
    assert not arrow(torch.ones(1, 2, 5), prototypes, 2, 1.0).dense(3).any()
    prototypes[1, 0] = 1
    assert arrow(torch.ones(1, 2, 5), prototypes, 2, 1.0).dense(3)[0, 0].tolist() == [0, 1, 0]


def test_the_largest_are_all_where_there_are_no_more() -> None:
    assert largest(torch.ones(2, 3), 3).which is None
    assert largest(torch.tensor([[0.1, 0.9, 0.5]]), 1).which.tolist() == [[1]]  # type: ignore[union-attr]


def test_errors_are_known() -> None:
    assert issubclass(RowsMerged, IncompatibleAdapters)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", ["all", "gates", "few", "none"])
def test_autocast_casts_the_base_alone(shape: str, grad: bool) -> None:
    made = experts([2, 2, 2])
    made = Experts(made.a.float(), made.b.float(), made.ranks, "m")
    x, w = random(2, 4, 5, seed=5).float(), random(7, 5, seed=6).float()
    values = random(2, 4, 3, seed=7).float()
    c = {
        "all": Coefficients(values[0, 0]), "gates": Coefficients(values), "few": largest(values, 1),
        "none": None,
    }[shape]  # fmt: skip
    with torch.set_grad_enabled(grad):
        y = torch.nn.functional.linear(x.bfloat16(), w.bfloat16())
        wanted = made.add(y.float(), x, c).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            found = made.add(torch.nn.functional.linear(x, w), x, c)
            whole = made.add(torch.zeros(2, 4, 7), x, c)  # what autocast left in float32
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(whole, made.add(torch.zeros(2, 4, 7), x, c), rtol=0, atol=0)


def test_gates_and_arrow_are_whole_under_autocast() -> None:
    x, w = random(2, 4, 5, seed=5).float(), random(3, 5, seed=6).float()
    wanted = gate(x, w, w[:, 0], 1.0), arrow(x, w, 3, 1.0).values
    with torch.autocast("cpu", torch.bfloat16):
        found = gate(x, w, w[:, 0], 1.0), arrow(x, w, 3, 1.0).values
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("grad", [False, True])
def test_embeddings_are_whole_under_autocast(grad: bool) -> None:
    made = experts([2, 2])
    made = Experts(made.a.float(), made.b.float(), made.ranks, "m")
    ids, c = torch.tensor([[0, 3, 1]]), Coefficients(torch.tensor([0.3, 0.7]))
    with torch.set_grad_enabled(grad):
        wanted = made.add_embedded(torch.zeros(1, 3, 7), ids, c, 2.0)
        with torch.autocast("cpu", torch.bfloat16):
            found = made.add_embedded(torch.zeros(1, 3, 7), ids, c, 2.0)
    assert torch.equal(found, wanted)
