"""Truncation is the best there is, however it is come by. Judged in dense float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorahub_registry.weights import truncate as module
from lorahub_registry.weights.lowrank import LowRank, weighted_sum
from lorahub_registry.weights.truncate import truncate, truncate_dense
from tests.weights.test_lowrank import SIZES, close, dense, random


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


def spectrum(values: torch.Tensor, m: int, n: int, seed: int = 5) -> torch.Tensor:
    """An m x n matrix with these singular values, float32."""
    made = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, len(values), generator=made, dtype=torch.float64))[0]
        for size in (m, n)
    )
    return ((u * values) @ v.T).float()


K = torch.arange(1, 601, dtype=torch.float64)
SPECTRA = {
    "slow": K**-0.25,
    "power": K**-1.0,
    "steep": torch.exp(-K / 20),
    "flat": torch.ones(600, dtype=torch.float64),
    "step": torch.where(K <= 30, 1.0, 0.01),
    "pairs": torch.exp(-(K // 2) / 10),
}


@pytest.mark.parametrize("name", [*SPECTRA, "noise", "pruned"])
@pytest.mark.parametrize("shape", [(700, 600), (600, 700)], ids=["tall", "wide"])
def test_a_dense_truncation_is_within_a_thousandth_of_the_best(
    name: str, shape: tuple[int, int]
) -> None:
    made = torch.Generator().manual_seed(3)
    if name == "noise":
        matrix = torch.randn(shape, generator=made)
    elif name == "pruned":
        matrix = torch.randn(shape[0], 8, generator=made) @ torch.randn(8, shape[1], generator=made)
        matrix = matrix * (torch.rand(shape, generator=made) < 0.2)
    else:
        matrix = spectrum(SPECTRA[name], *shape)
    before = matrix.clone()
    squares = torch.linalg.svdvals(matrix.double()).square()
    for rank in (1, 8, 64, 200):
        cut = truncate_dense(matrix, rank=rank)
        assert cut.delta.rank == rank
        error = float((matrix.double() - dense(cut.delta)).norm())
        best = float(squares[rank:].sum().sqrt())
        assert error <= 1.001 * best + 1e-6 * float(squares.sum().sqrt())
        # What is reported is what was lost.
        assert cut.error == pytest.approx(error / float(squares.sum().sqrt()), rel=1e-3, abs=1e-6)
        assert cut.kept == pytest.approx(1 - cut.error**2)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_energy_of_a_dense_matrix_takes_the_smallest_rank(name: str, energy: float) -> None:
    matrix = spectrum(SPECTRA[name], 700, 600)
    squares = torch.linalg.svdvals(matrix.double()).square()
    shares = squares.cumsum(0) / squares.sum()
    cut = truncate_dense(matrix, energy=energy)
    assert cut.kept >= energy - 1e-6
    least = int((shares < energy - 1e-6).sum()) + 1
    assert least <= cut.delta.rank <= least + max(1, least // 100)
    assert truncate_dense(matrix, energy=energy, rank=2).delta.rank <= 2


def test_the_search_for_directions_is_what_large_matrices_get(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = spectrum(SPECTRA["power"], 700, 600)

    def refuse(*_: object) -> None:
        raise AssertionError("all directions were computed")

    monkeypatch.setattr(module, "_all", refuse)
    truncate_dense(matrix, rank=8)
    with pytest.raises(AssertionError):
        truncate_dense(matrix, rank=300)
    with pytest.raises(AssertionError):
        truncate_dense(matrix[:100], rank=8)


def test_the_same_seed_gives_the_same_truncation() -> None:
    matrix = spectrum(SPECTRA["slow"], 700, 600)
    one, same, other = (truncate_dense(matrix, rank=4, seed=s).delta for s in (1, 1, 2))
    assert torch.equal(one.a, same.a)
    assert torch.equal(one.b, same.b)
    assert not torch.equal(one.a, other.a)


@given(st.integers(0, 10**6), SIZES, SIZES, SIZES)
def test_small_dense_matrices_are_truncated_as_their_factors_are(
    seed: int, rank: int, m: int, n: int
) -> None:
    delta = random(seed, rank, m, n)
    one, other = truncate(delta, rank=2), truncate_dense(delta.dense(), rank=2)
    assert other.energy == pytest.approx(one.energy, rel=1e-5)
    size = math.sqrt(one.energy)
    assert math.sqrt(other.lost) == pytest.approx(math.sqrt(one.lost), abs=1e-5 * size)
    whole = truncate_dense(delta.dense(), energy=1.0)
    close(dense(whole.delta), dense(delta), size)


def test_a_dense_matrix_of_zeros_is_truncated_to_one_rank_of_nothing() -> None:
    for shape in ((3, 4), (600, 700)):
        for asked in ({"rank": 2}, {"energy": 0.9}, {}):
            cut = truncate_dense(torch.zeros(shape), **asked)  # type: ignore[arg-type]
            assert cut.delta.norm() == 0.0
            assert (cut.kept, cut.error) == (1.0, 0.0)
            assert torch.isfinite(cut.delta.a).all()


def test_factors_larger_than_the_matrix_are_truncated_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SMALL", 16)
    delta = random(1, 60, 40, 30)
    whole = dense(delta)
    values = torch.linalg.svdvals(whole)
    for rank in (1, 5, 30):
        cut = truncate(LowRank(delta.a, delta.b, "embedding"), rank=rank)
        assert (cut.delta.rank, cut.delta.kind) == (rank, "embedding")
        best = float(values[rank:].square().sum().sqrt())
        error = float((dense(cut.delta) - whole).norm())
        assert error <= 1.001 * best + 2e-6 * float(values.norm())


def test_singular_values_of_a_truncated_sum_hold_to_a_hundred_thousandth() -> None:
    made = [random(seed, 16, 1024, 1024) for seed in (1, 2, 3)]
    mixed = weighted_sum([{"p": d} for d in made], [0.7, 0.5, -0.4])["p"]
    expected = torch.linalg.svdvals(dense(mixed))[:16]
    found = truncate(mixed, rank=16).delta
    sizes = found.b.double().norm(dim=0) * found.a.double().norm(dim=1)
    assert float((sizes - expected).abs().max()) <= 1e-5 * float(expected[0])


def test_the_whole_energy_is_the_whole_matrix_however_fast_it_falls() -> None:
    made = torch.Generator().manual_seed(2)
    left = torch.linalg.qr(torch.randn(700, 16, generator=made))[0]
    right = torch.linalg.qr(torch.randn(640, 16, generator=made))[0]
    matrix = (left * 0.5 ** torch.arange(16)) @ right.T
    cut = truncate_dense(matrix, energy=1.0)
    assert float((cut.delta.dense() - matrix).norm() / matrix.norm()) < 1e-6


def test_terms_that_cancel_keep_what_is_left_where_factors_are_as_large_as_the_matrix() -> None:
    made = torch.Generator().manual_seed(4)
    a, b = torch.randn(200, 600, generator=made), torch.randn(600, 200, generator=made)
    small_a, small_b = torch.randn(4, 600, generator=made), torch.randn(600, 4, generator=made)
    whole = LowRank(torch.cat([a, a, small_a * 1e-3]), torch.cat([b, -b, small_b * 1e-3], 1))
    wanted = (small_b.double() * 1e-3) @ (small_a.double() * 1e-3)
    found = truncate(whole, rank=4).delta
    gap = found.b.double() @ found.a.double() - wanted
    assert float(gap.norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize(
    ("leading", "times", "slope", "rank"),
    [(16, 30.0, 0.5, 64), (4, 1000.0, 1.0, 16), (1, 1.0, 0.0, 24), (8, 5.0, 0.1, 32)],
)
def test_the_search_ends_near_the_least_error_on_slow_tails(
    leading: int, times: float, slope: float, rank: int
) -> None:
    """Gains level off where a few directions stand above a tail that hardly falls."""
    size = 768
    made = torch.Generator().manual_seed(1)
    u, v = (
        torch.linalg.qr(torch.randn(size, size, generator=made, dtype=torch.float64))[0]
        for _ in range(2)
    )
    values = 1 - slope * torch.arange(size, dtype=torch.float64) / size
    values[:leading] *= times
    matrix = ((u * values) @ v.T).float()
    found = truncate_dense(matrix, rank=rank)
    least = float(values[rank:].norm())
    assert float((matrix.double() - found.delta.dense().double()).norm()) <= 1.001 * least
