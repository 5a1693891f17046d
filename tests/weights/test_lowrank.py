"""The algebra: sums are exact, truncation is the best there is. Judged in dense float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorahub_registry.weights.lowrank import LowRank, truncate, weighted_sum

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


@given(st.integers(0, 10**6), st.integers(1, 9), SIZES, SIZES)
def test_truncation_at_full_rank_is_the_sum_itself(seed: int, rank: int, m: int, n: int) -> None:
    delta = random(seed, rank, m, n)
    cut = truncate(delta)
    assert cut.kept == pytest.approx(1.0, abs=1e-12)
    assert cut.delta.rank == min(rank, m, n)
    close(dense(cut.delta), dense(delta))
    close(dense(truncate(delta, rank=100).delta), dense(delta))


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 8), st.integers(2, 8), SIZES)
@settings(max_examples=60)
def test_truncation_is_the_best_of_its_rank(seed: int, rank: int, m: int, n: int, r: int) -> None:
    delta = random(seed, rank, m, n)
    cut = truncate(delta, rank=r)
    whole = dense(delta)
    values = torch.linalg.svdvals(whole)
    best = float(values[r:].square().sum().sqrt())  # Eckart–Young
    error = float((dense(cut.delta) - whole).norm())
    assert error <= best + 1e-5 * float(values[0])
    total = float(values.square().sum())
    assert cut.kept == pytest.approx(float(values[:r].square().sum()) / total, abs=1e-9)
    assert cut.delta.rank <= min(r, m, n)


@given(
    st.integers(0, 10**6), st.integers(1, 10), st.sampled_from([0.1, 0.5, 0.9, 0.99, 0.999999, 1.0])
)
def test_energy_takes_the_smallest_rank_that_keeps_it(seed: int, rank: int, energy: float) -> None:
    delta = random(seed, rank, 8, 7)
    squares = torch.linalg.svdvals(dense(delta)).square()[: min(rank, 7)]
    shares = squares.cumsum(0) / squares.sum()
    cut = truncate(delta, energy=energy)
    kept = cut.delta.rank
    assert float(shares[kept - 1]) >= energy - 1e-9
    assert kept == 1 or float(shares[kept - 2]) < energy
    assert cut.kept == pytest.approx(float(shares[kept - 1]), abs=1e-9)


def test_energy_on_the_very_share_of_a_rank_takes_that_rank() -> None:
    delta = LowRank(torch.eye(3), torch.diag(torch.tensor([2.0, 1.0, 1.0])))  # squares 4, 1, 1
    assert truncate(delta, energy=4 / 6).delta.rank == 1
    assert truncate(delta, energy=5 / 6).delta.rank == 2
    assert truncate(delta, energy=5 / 6 + 1e-6).delta.rank == 3
    assert truncate(delta, energy=1.0, rank=2).delta.rank == 2


def test_a_truncation_has_at_least_rank_one() -> None:
    zero = LowRank(torch.zeros(3, 4), torch.zeros(5, 3))
    for asked in ({"rank": 1}, {"energy": 0.5}, {"rank": 0}, {"energy": 1e-9}):
        for delta in (zero, random(1, 3, 4, 5)):
            assert truncate(delta, **asked).delta.rank == 1  # type: ignore[arg-type]
    assert truncate(zero).kept == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_truncation_keeps_the_dtype_and_shares_the_singular_values(dtype: torch.dtype) -> None:
    delta = random(4, 5, 8, 6)
    cut = truncate(LowRank(delta.a.to(dtype), delta.b.to(dtype)), rank=3).delta
    assert cut.a.dtype == cut.b.dtype == dtype
    assert cut.a.is_contiguous()
    assert cut.b.is_contiguous()
    norms = cut.a.double().norm(dim=1), cut.b.double().norm(dim=0)
    assert torch.allclose(*norms, rtol=0.02)


def test_a_nearly_singular_sum_is_truncated_without_losing_its_small_values() -> None:
    # QR in float32 would lose the second direction, which is 1e-6 of the first.
    one = random(1, 1, 30, 20)
    two = random(2, 1, 30, 20, 1e-6)
    stacked = weighted_sum([{"p": one}, {"p": two}], [1.0, 1.0])["p"]
    values = torch.linalg.svdvals(dense(stacked))[:2]
    cut = truncate(stacked).delta
    found = cut.b.double().norm(dim=0) * cut.a.double().norm(dim=1)
    assert math.isclose(found[1], values[1], rel_tol=1e-5)
