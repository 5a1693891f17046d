"""Pruning and election of signs: PEFT's own arithmetic, on ΔW, one adapter at a time."""

from __future__ import annotations

from typing import Any

import peft.utils.merge_utils as pefts
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.weights.lowrank import LowRank
from lorahub_registry.weights.sparsify import Part, at_random, by_magnitude, mask_seed, merge
from tests.weights.test_lowrank import random

DENSITY = st.floats(0.05, 1.0)


def parts(seed: int, count: int, m: int = 7, n: int = 5) -> list[Part]:
    return [
        Part(random(seed + i, 1 + i % 3, m, n), (0.7, -0.4, 1.3, 0.0)[i % 4], i)
        for i in range(count)
    ]


def theirs(name: str, given: list[Part], density: float, **more: Any) -> torch.Tensor:
    weights = torch.tensor([p.coefficient for p in given])
    return getattr(pefts, name)([p.delta.dense() for p in given], weights, density, **more)


@pytest.mark.filterwarnings("ignore:The density")
@given(st.integers(0, 10**6), st.integers(1, 5), DENSITY, st.sampled_from(["total", "frequency"]))
def test_ties_on_dense_deltas_is_pefts(seed: int, count: int, density: float, elect: Any) -> None:
    given = parts(seed, count)
    ours = merge(given, by_magnitude, density, elect)
    expected = theirs("ties", given, density, majority_sign_method=elect)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The density")
@given(st.integers(0, 10**6), st.integers(1, 5), DENSITY)
def test_magnitude_pruning_on_dense_deltas_is_pefts(seed: int, count: int, density: float) -> None:
    given = parts(seed, count)
    ours = merge(given, by_magnitude, density)
    torch.testing.assert_close(
        ours, theirs("magnitude_prune", given, density), rtol=1e-5, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_dare_on_dense_deltas_is_pefts_with_the_same_masks(
    name: str, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = parts(1, 4)
    left = iter([p.seed for p in given])

    def mask(tensor: torch.Tensor) -> torch.Tensor:
        made = torch.Generator().manual_seed(next(left))
        return (torch.rand(tensor.shape, generator=made) < tensor).float()

    monkeypatch.setattr(torch, "bernoulli", mask)
    ours = merge(given, at_random, density, "total" if name == "dare_ties" else None)
    torch.testing.assert_close(ours, theirs(name, given, density), rtol=1e-5, atol=1e-6)


def test_a_draw_is_positive_and_who_is_alone_is_its_own_mean() -> None:
    one = LowRank(torch.tensor([[1.0, -2.0, 3.0]]), torch.ones(1, 1))
    other = LowRank(torch.tensor([[-1.0, 0.0, 5.0]]), torch.ones(1, 1))
    made = merge([Part(one, 1.0, 0), Part(other, 1.0, 0)], by_magnitude, 1.0, "total")
    assert made.tolist() == [[1.0, -2.0, 4.0]]


def test_the_order_of_the_adapters_does_not_matter() -> None:
    given = parts(4, 4)
    for prune in (by_magnitude, at_random):
        for elect in (None, "total", "frequency"):
            one = merge(given, prune, 0.4, elect)  # type: ignore[arg-type]
            other = merge(given[::-1], prune, 0.4, elect)  # type: ignore[arg-type]
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_pruning_by_magnitude_keeps_the_largest() -> None:
    matrix = torch.tensor([[3.0, -5.0, 0.5], [1.0, 0.0, -2.0]])
    assert by_magnitude(matrix, 0.5).tolist() == [[3.0, -5.0, 0.0], [0.0, 0.0, -2.0]]
    assert by_magnitude(matrix, 0.1).abs().sum() == 0.0
    assert by_magnitude(matrix, 1.0) is matrix
    # Equal ones at the threshold all stay, wherever they are.
    assert by_magnitude(torch.tensor([[2.0, -2.0, 1.0]]), 0.34).tolist() == [[2.0, -2.0, 0.0]]


def test_random_pruning_keeps_the_mean_and_the_share() -> None:
    made = at_random(torch.ones(400, 500), 0.3, 7)
    assert float(made.mean()) == pytest.approx(1.0, abs=0.02)
    assert float((made > 0).float().mean()) == pytest.approx(0.3, abs=0.006)
    assert torch.equal(made, at_random(torch.ones(400, 500), 0.3, 7))
    assert not torch.equal(made, at_random(torch.ones(400, 500), 0.3, 8))


def test_a_masks_seed_is_its_recipes_adapters_and_modules_own() -> None:
    seeds = {mask_seed(s, a, m) for s in (0, 1) for a in ("a", "b", "a\0b") for m in ("m", "n")}
    assert len(seeds) == 12
    assert all(0 <= s < 2**63 for s in seeds)
    assert mask_seed(0, "a", "m") == 4617113466224076474  # on every machine


def test_no_more_than_one_adapters_matrix_is_held_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gc
    import weakref

    made: list[weakref.ref[torch.Tensor]] = []
    most = 0
    whole = LowRank.dense

    def watched(delta: LowRank) -> torch.Tensor:
        nonlocal most
        gc.collect()
        matrix = whole(delta)
        made.append(weakref.ref(matrix))
        most = max(most, sum(ref() is not None for ref in made))
        return matrix

    monkeypatch.setattr(LowRank, "dense", watched)
    merge(parts(1, 12), by_magnitude, 0.5, "total")
    assert len(made) == 24
    assert most <= 3
