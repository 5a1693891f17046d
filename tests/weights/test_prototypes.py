"""Prototypes are top right singular vectors, judged by the dense SVD in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.weights.lowrank import LowRank
from lorahub_registry.weights.prototypes import prototypes, without_general
from tests.weights.test_lowrank import adapters, dense, random


def with_values(values: list[float], fan_in: int = 12, fan_out: int = 9, seed: int = 0) -> LowRank:
    """A delta with these singular values, its factors mixed so that neither is orthogonal."""
    made = torch.Generator().manual_seed(seed)
    rank = len(values)
    left, right = (
        torch.linalg.qr(torch.randn(n, rank, generator=made, dtype=torch.float64))[0]
        for n in (fan_out, fan_in)
    )
    mix = torch.randn(rank, rank, generator=made, dtype=torch.float64) + 3 * torch.eye(rank)
    b = left * torch.tensor(values, dtype=torch.float64) @ torch.linalg.inv(mix)
    return LowRank((mix @ right.T).float(), b.float())


@given(adapters())
def test_every_row_is_as_large_in_the_delta_as_a_unit_vector_can_be(parts: Any) -> None:
    found = prototypes(parts)
    assert list(found) == sorted({name for part in parts for name in part})
    for name, rows in found.items():
        assert rows.dtype == torch.float32
        assert rows.shape == (len(parts), next(p[name].shape[1] for p in parts if name in p))
        for row, part in zip(rows, parts, strict=True):
            if name not in part:
                assert not row.any()
                continue
            whole = dense(part[name])
            norm = float(torch.linalg.matrix_norm(whole, 2))
            assert float(row.double().norm()) == pytest.approx(1, abs=2e-7)
            assert float((whole @ row.double()).norm()) >= (1 - 1e-6) * norm
            assert row[row.abs().argmax()] > 0


@pytest.mark.parametrize("second", [0.0, 0.5, 0.9, 0.999, 0.9999])
def test_the_vector_itself_is_exact_where_there_is_one(second: float) -> None:
    delta = with_values([2.0, 2.0 * second, 0.3])
    [row] = prototypes([{"m": delta}])["m"].double()
    _, values, right = torch.linalg.svd(dense(delta))
    assert values[0] > values[1]
    # What rounding to float32 can turn; in float64 a gap of 1e-4 is a wide one.
    assert 1 - float((row @ right[0]).abs() / row.norm()) < 1e-13


def test_equal_singular_values_give_a_vector_of_their_subspace() -> None:
    delta = with_values([1.0, 1.0, 0.2])
    [row] = prototypes([{"m": delta}])["m"].double()
    _, _, right = torch.linalg.svd(dense(delta))
    assert float((right[:2] @ row).norm()) == pytest.approx(1, abs=1e-6)
    again = prototypes([{"m": delta}])["m"]
    assert torch.equal(again[0].double(), row)


def test_neither_a_delta_s_size_nor_its_sign_matters() -> None:
    delta = with_values([1.0, 0.4])
    for factor in (-1.0, 1e-12, 1e12):
        one, other = prototypes([{"m": delta}, {"m": delta.scaled(factor)}])["m"]
        assert torch.allclose(one, other, atol=1e-6)


def test_a_delta_that_is_nothing_has_no_direction() -> None:
    delta = random(3, 4, 6, 5)
    zero = LowRank(delta.a, torch.zeros_like(delta.b))
    cancelled = LowRank(torch.cat([delta.a, delta.a]), torch.cat([delta.b, -delta.b], 1))
    assert not prototypes([{"m": zero}, {"m": cancelled}])["m"].any()
    # 1/3 is no float32, so this leaves rounding.
    assert not prototypes(without_general([{"m": delta}], [{"m": delta}] * 3))["m"].any()


def test_ranks_and_targets_may_differ_and_shapes_may_not() -> None:
    one, other = {"a": random(1, 2, 6, 5)}, {"a": random(2, 5, 6, 5), "b": random(3, 3, 4, 4)}
    found = prototypes([one, other])
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {"a": (2, 6), "b": (2, 4)}
    assert not found["b"][0].any()
    assert found["b"][1].any()
    with pytest.raises(IncompatibleAdapters, match="a is linear 5x6"):
        prototypes([one, {"a": random(2, 5, 7, 5)}])


@pytest.mark.parametrize("second", [0.0, 0.3, 0.5])
def test_it_is_what_pefts_arrow_finds_where_that_converges(second: float) -> None:
    # PEFT takes 15 steps of power iteration in float32, which shrink what is not the first
    # direction by (s2/s1)^30: at 0.5 to 1e-9. At 0.9 four percent of the start would be left.
    config = ArrowConfig(rng_seed=0)
    config.task_adapter_names = []
    layer = ArrowLoraLinearLayer(12, config)
    delta = with_values([2.0, 2.0 * second, 0.3 * second])
    theirs = layer.top_right_singular_vec_from_BA(delta.a, delta.b)
    [ours] = prototypes([{"m": delta}])["m"]
    assert torch.allclose(ours, theirs * (ours @ theirs).sign(), atol=2e-6)


@given(adapters(), adapters())
def test_general_knowledge_is_taken_off_exactly(parts: Any, general: Any) -> None:
    shapes: dict[str, tuple[int, int]] = {}
    for part in (*parts, *general):
        for name, delta in part.items():
            if shapes.setdefault(name, delta.shape) != delta.shape:
                return  # drawn for two bases
    for before, after in zip(parts, without_general(parts, general), strict=True):
        assert set(after) == set(before).union(*general)
        for name, delta in after.items():
            terms = [dense(g[name]) for g in general if name in g]
            own = dense(before[name]) if name in before else torch.zeros(shapes[name]).double()
            wanted = own - sum(terms, torch.zeros(shapes[name]).double()) / len(general)
            size = float(sum((t.norm() for t in terms), own.norm()))
            assert float((dense(delta) - wanted).norm()) <= 1e-6 * size


def test_nothing_general_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="general"):
        without_general([{"m": random(1, 2, 3, 3)}], [])
