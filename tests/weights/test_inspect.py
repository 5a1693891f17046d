"""Norms, spectra and places of modules: judged in dense float64 and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lorahub_registry.weights.inspect import Place, by_kind, energy_by_rank, inspect, rank_for
from lorahub_registry.weights.lowrank import LowRank


def diagonal(*values: float, size: int = 5) -> LowRank:
    """A delta with these singular values, its factors turned so that neither is diagonal."""
    made = torch.Generator().manual_seed(7)
    rank = len(values)
    u, v = (torch.linalg.qr(torch.randn(size, rank, generator=made).double())[0] for _ in "uv")
    mix = torch.randn(rank, rank, generator=made).double()
    b = u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ mix
    return LowRank((torch.linalg.inv(mix) @ v.T).float(), b.float())


def test_a_module_s_numbers_are_the_dense_matrix_s():
    delta = diagonal(4.0, 3.0, 0.0)
    [module] = inspect({"m": delta}).modules
    dense = delta.b.double() @ delta.a.double()
    assert (module.name, module.rank, module.shape) == ("m", 3, (5, 5))
    assert module.norm == pytest.approx(float(dense.norm()), rel=1e-6)
    assert module.singular_values == pytest.approx([4, 3, 0], abs=1e-5)
    p = (16 / 25, 9 / 25)
    assert module.effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert module.energy_by_rank == pytest.approx([16 / 25, 1, 1], abs=1e-6)


def test_energy_of_an_adapter_counts_each_module_by_its_size():
    weights = inspect({"a": diagonal(3.0, 1.0), "b": diagonal(2.0, 2.0, 1.0), "c": diagonal(1.0)})
    assert weights.norm == pytest.approx(math.sqrt(20))
    assert weights.energy_by_rank == pytest.approx([14 / 20, 19 / 20, 1.0])
    assert energy_by_rank(weights.modules[:1]) == pytest.approx([0.9, 1.0])
    ranks = [m.effective_rank for m in weights.modules]
    assert weights.effective_rank == pytest.approx(sum(ranks) / 3)


def test_a_share_s_rank_is_the_smallest_that_keeps_it():
    assert [rank_for(s, (0.5, 0.9, 1.0)) for s in (0.3, 0.5, 0.6, 0.9, 0.91, 1)] == [
        1, 1, 2, 2, 3, 3,
    ]  # fmt: skip


def test_nothing_has_no_energy():
    zero = LowRank(torch.zeros(2, 3), torch.zeros(4, 2))
    weights = inspect({"a": zero})
    assert (weights.norm, weights.effective_rank, weights.energy_by_rank) == (0, 0, ())
    assert inspect({}).energy_by_rank == ()


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("model.layers.0.self_attn.q_proj", ("model.layers", 0, "self_attn.q_proj")),
        ("encoder.block.3.layer.1.X.q", ("encoder.block", 3, "layer.1.X.q")),
        ("lm_head", ("", None, "lm_head")),
        ("0.proj", ("", 0, "proj")),
        ("model.h2.11.c", ("model.h2", 11, "c")),
        ("layers.5", ("", None, "layers.5")),
        ("layers.٣.q", ("", None, "layers.٣.q")),
    ],
)
def test_places(module, place):
    assert Place.of(module) == Place(*place)


def test_rows_are_one_kind_each_through_all_layers_of_a_stack():
    names = [f"m.layers.{n}.{kind}" for n in (3, 10) for kind in ("attn.q", "mlp.up")]
    rows = by_kind([*names, "m.layers.7.mlp.up", "lm_head"])
    assert [(r.label, r.layers) for r in rows] == [
        ("lm_head", (None,)), ("q", (3, 7, 10)), ("up", (3, 7, 10)),
    ]  # fmt: skip
    assert rows[1].modules == ("m.layers.3.attn.q", None, "m.layers.10.attn.q")


def test_labels_are_as_long_as_they_have_to_be():
    gpt = [f"transformer.h.0.{end}" for end in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    assert [row.label for row in by_kind(gpt)] == ["c_attn", "attn.c_proj", "mlp.c_proj"]
    t5 = [
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "encoder.block.0.layer.0.SelfAttention.q",
    ]
    assert [row.label for row in by_kind(t5)] == [
        "decoder SelfAttention.q", "decoder EncDecAttention.q", "encoder q",
    ]  # fmt: skip
    alike = by_kind(["x.0.q", "x.0.a.q", "q"])
    assert len({row.label for row in alike}) == 3
