"""The algebra: sums are exact, truncation is the best there is. Judged in dense float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.weights.compare import compare
from lorahub_registry.weights.lowrank import (
    LowRank,
    factor_sum,
    weighted_sum,
)

SIZES = st.integers(1, 6)
COEFFICIENT = st.floats(-3, 3, allow_subnormal=False).filter(lambda c: abs(c) > 1e-3)


def random(seed: int, rank: int, fan_in: int, fan_out: int, scale: float = 1.0) -> LowRank:
    made = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, fan_in, generator=made)
    return LowRank(a, torch.randn(fan_out, rank, generator=made) * scale)


def dense(delta: LowRank) -> torch.Tensor:
    return delta.b.double() @ delta.a.double()


def close(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor | float = 0.0) -> None:
    """Equal to float32 rounding of numbers as large as ``scale``."""
    size = max(float(other.abs().max()), float(torch.as_tensor(scale).abs().max()), 1e-30)
    assert float((one.double() - other).abs().max()) <= 4e-6 * size


@st.composite
def adapters(draw: Any) -> list[dict[str, LowRank]]:
    """Some adapters on some of three modules; ranks and scalings differ everywhere."""
    shapes = {name: (draw(SIZES), draw(SIZES)) for name in "pqr"}
    seeds = iter(range(1000 * draw(st.integers(0, 99)), 10**9))
    return [
        {
            name: random(next(seeds), draw(SIZES), *shapes[name], draw(st.floats(0.01, 10)))
            for name in draw(st.sets(st.sampled_from("pqr"), min_size=1))
        }
        for _ in range(draw(st.integers(1, 4)))
    ]


@given(adapters(), st.data())
def test_a_sum_is_the_dense_sum(parts: list[dict[str, LowRank]], data: st.DataObject) -> None:
    coefficients = [data.draw(COEFFICIENT) for _ in parts]
    mixed = weighted_sum(parts, coefficients)
    assert list(mixed) == sorted({name for part in parts for name in part})
    for name, delta in mixed.items():
        terms = [c * dense(p[name]) for p, c in zip(parts, coefficients, strict=True) if name in p]
        close(dense(delta), sum(terms), sum(t.abs() for t in terms))
        assert delta.rank == sum(p[name].rank for p in parts if name in p)


@given(adapters())
def test_coefficient_one_returns_the_adapter_bit_for_bit(parts: list[dict[str, LowRank]]) -> None:
    mixed = weighted_sum(parts[:1], [1.0])
    assert mixed.keys() == parts[0].keys()
    for name, delta in mixed.items():
        assert torch.equal(delta.a, parts[0][name].a)
        assert torch.equal(delta.b, parts[0][name].b)


@given(adapters(), st.randoms(use_true_random=False), st.data())
def test_order_does_not_matter(
    parts: list[dict[str, LowRank]], random: Any, data: st.DataObject
) -> None:
    pairs = [(part, data.draw(COEFFICIENT)) for part in parts]
    one = weighted_sum(*zip(*pairs, strict=True))
    random.shuffle(pairs)
    other = weighted_sum(*zip(*pairs, strict=True))
    assert one.keys() == other.keys()
    for name in one:
        close(dense(one[name]), dense(other[name]))


@given(adapters())
def test_sums_are_linear_in_their_coefficients(parts: list[dict[str, LowRank]]) -> None:
    ones = weighted_sum(parts, [1.0] * len(parts))
    halves = weighted_sum([ones, ones], [0.25, 0.25])
    for name in ones:
        close(2 * dense(halves[name]), dense(ones[name]))


def test_a_zero_coefficient_leaves_no_trace() -> None:
    one, other = {"p": random(1, 2, 3, 4)}, {"p": random(2, 5, 3, 4), "q": random(3, 1, 2, 2)}
    mixed = weighted_sum([one, other], [1.0, 0.0])
    assert mixed.keys() == {"p"}
    assert mixed["p"].rank == 2
    assert weighted_sum([one, other], [0.0, 0.0]) == {}


def test_there_is_one_coefficient_for_each_adapter() -> None:
    with pytest.raises(ValueError):
        weighted_sum([{"p": random(1, 2, 3, 4)}], [1.0, 2.0])


@given(st.integers(0, 10**6), SIZES, SIZES, SIZES, st.floats(1e-3, 1e3))
def test_the_norm_is_the_dense_matrixs(seed: int, rank: int, m: int, n: int, scale: float) -> None:
    delta = random(seed, rank, m, n, scale)
    assert delta.norm() == pytest.approx(float(dense(delta).norm()), rel=1e-9)


def test_scaling_and_densifying() -> None:
    delta = random(1, 2, 3, 4)
    close(delta.scaled(-2.5).dense(), -2.5 * dense(delta))
    assert delta.scaled(0.0).norm() == 0.0


@given(adapters(), st.data())
def test_inner_products_and_norms_are_those_of_all_entries(
    parts: list[dict[str, LowRank]], data: st.DataObject
) -> None:
    one, other = data.draw(st.sampled_from(parts)), data.draw(st.sampled_from(parts))
    expected = sum(
        float((dense(one[name]) * dense(other[name])).sum()) for name in one.keys() & other.keys()
    )
    sizes = [sum(float(dense(d).square().sum()) for d in p.values()) ** 0.5 for p in (one, other)]
    [pair] = compare([one, other])
    found = sum(meeting.inner for meeting in pair.meetings)
    assert found == pytest.approx(expected, abs=1e-9 * sizes[0] * sizes[1])
    assert pair.norms == pytest.approx(tuple(sizes), rel=1e-9)
    assert pair.cosine == pytest.approx(expected / (sizes[0] * sizes[1]), abs=1e-9)
    assert compare([one, one])[0].cosine == pytest.approx(1.0, abs=1e-12)
    turned = {n: d.scaled(-3.0) for n, d in one.items()}
    assert compare([one, turned])[0].cosine == pytest.approx(-1.0)


def test_adapters_that_share_no_module_are_orthogonal() -> None:
    one, other = {"p": random(1, 2, 3, 4)}, {"q": random(2, 2, 3, 4)}
    assert compare([one, other])[0].cosine == 0.0
    assert set(weighted_sum([one, other], [1.0, 1.0])) == {"p", "q"}


def test_an_adapter_of_zeros_has_no_norm_direction_or_rank() -> None:
    zero = LowRank(torch.zeros(2, 3), torch.zeros(4, 2))
    [pair] = compare([{"p": zero}, {"p": random(1, 2, 3, 4)}])
    assert zero.norm() == pair.norms[0] == 0.0
    assert pair.cosine is None
    assert zero.effective_rank() == 0.0
    assert weighted_sum([{"p": zero}], [2.0])["p"].norm() == 0.0


def test_what_is_left_of_terms_that_cancel_is_not_lost_in_them() -> None:
    one = random(1, 3, 50, 40).to("cpu", torch.float64)
    almost = LowRank(one.a, one.b * (1 + 1e-10))
    left = weighted_sum([{"p": one}, {"p": almost}], [1.0, -1.0])["p"]
    # Squares of the entries' products would hold nothing below 1e-8 of the terms.
    assert left.norm() == pytest.approx(1e-10 * one.norm(), rel=1e-4)


@given(st.integers(0, 10**6), st.integers(1, 9), SIZES, SIZES)
def test_singular_values_and_effective_rank_are_the_dense_matrixs(
    seed: int, rank: int, m: int, n: int
) -> None:
    delta = random(seed, rank, m, n)
    expected = torch.linalg.svdvals(dense(delta))[: min(rank, m, n)]
    torch.testing.assert_close(delta.singular_values(), expected, rtol=1e-9, atol=1e-9)
    shares = expected.square() / expected.square().sum()
    entropy = -float((shares * shares.log()).nan_to_num(0.0).sum())
    assert delta.effective_rank() == pytest.approx(math.exp(entropy), rel=1e-6)
    assert 1 - 1e-9 <= delta.effective_rank() <= min(rank, m, n) + 1e-9


def test_the_effective_rank_of_equal_directions_is_their_number() -> None:
    q = torch.linalg.qr(torch.randn(9, 4, generator=torch.Generator().manual_seed(1)))[0]
    assert LowRank(q.T, 3 * q).effective_rank() == pytest.approx(4.0)
    # The same direction four times is one.
    assert LowRank(q.T[:1].repeat(4, 1), q[:, :1].repeat(1, 4)).effective_rank() == pytest.approx(1)


@given(adapters(), st.data())
def test_the_factor_form_is_the_product_of_sums(
    parts: list[dict[str, LowRank]], data: st.DataObject
) -> None:
    one = parts[0]
    other = {n: LowRank(d.a.flip(1), d.b.flip(0)) for n, d in one.items()}
    c, e = data.draw(COEFFICIENT), data.draw(COEFFICIENT)
    mixed = factor_sum([one, other], [c, e])
    assert list(mixed) == sorted(one)
    for name, delta in mixed.items():
        b = c * one[name].b.double() + e * other[name].b.double()
        a = c * one[name].a.double() + e * other[name].a.double()
        close(dense(delta), b @ a, (b.abs() @ a.abs()).max() + dense(one[name]).abs().max())
        flipped = factor_sum([one, other], [-c, -e])[name]
        close(dense(flipped), dense(delta))
    with pytest.raises(ValueError):
        factor_sum([one, other], [1.0])


def test_a_module_of_two_shapes_is_refused_by_name() -> None:
    one, other = {"p": random(1, 2, 3, 4)}, {"p": random(2, 2, 4, 3)}
    with pytest.raises(IncompatibleAdapters, match=r"p is linear 4x3 in one .* linear 3x4"):
        weighted_sum([one, other], [1.0, 1.0])
    with pytest.raises(IncompatibleAdapters, match=r"linear 4x3 in one .* linear 3x4"):
        compare([one, other])
    token = {"p": LowRank(one["p"].a, one["p"].b, "embedding")}
    with pytest.raises(IncompatibleAdapters, match=r"linear 4x3 in one .* embedding 4x3"):
        weighted_sum([one, token], [1.0, 1.0])


def test_a_delta_knows_what_it_is_and_stays_it() -> None:
    delta = LowRank(random(1, 2, 3, 4).a, random(1, 2, 3, 4).b, "embedding")
    assert (delta.shape, delta.rank, delta.dtype) == ((4, 3), 2, torch.float32)
    half = delta.to("cpu", torch.bfloat16)
    assert (half.dtype, half.kind) == (torch.bfloat16, "embedding")
    for made in (delta.scaled(2.0), *weighted_sum([{"p": delta}], [1.0]).values(),
                 *factor_sum([{"p": delta}], [1.0]).values()):  # fmt: skip
        assert made.kind == "embedding"
