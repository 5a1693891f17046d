"""The methods with given coefficients: PEFT's own on ΔW, and what truncating them costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lorahub_registry.compose.encoder import Rows
from lorahub_registry.compose.forms import FactorForm
from lorahub_registry.compose.results import results
from lorahub_registry.compose.run import compose
from lorahub_registry.compose.static import PRUNES, SUMS, mix
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.recipes import from_mapping
from lorahub_registry.recipes.fields import OutputRank
from lorahub_registry.recipes.static import (
    AnyStatic,
    DareLinear,
    DareTies,
    Entrywise,
    Factor,
    Linear,
    MagnitudePrune,
    Ties,
)
from lorahub_registry.weights.lowrank import LowRank, weighted_sum
from tests import tiny
from tests.compose.making import deltas, member, recipe, rows

PAIR = ("plain", "same")
COEFFICIENTS = (0.7, -1.3)
EXACT = OutputRank(energy=1.0)


def adapters(model: tiny.Tiny, *kinds: str) -> dict[str, dict[str, LowRank]]:
    return {kind: deltas(model, kind) for kind in kinds or PAIR}


def test_every_method_is_a_row_of_the_table() -> None:
    names = {method.name() for method in get_args(AnyStatic)}
    assert SUMS.keys() | PRUNES.keys() == names
    assert not SUMS.keys() & PRUNES.keys()
    assert {m.name() for m in get_args(AnyStatic) if issubclass(m, Entrywise)} == PRUNES.keys()


@pytest.mark.parametrize(
    ("method", "theirs", "more"),
    [
        (Ties(density=0.3), "ties_svd", {"density": 0.3}),
        (
            Ties(density=0.6, majority_sign_method="frequency"),
            "ties_svd",
            {"density": 0.6, "majority_sign_method": "frequency"},
        ),
        (MagnitudePrune(density=0.3), "magnitude_prune_svd", {"density": 0.3}),
        (DareLinear(density=1.0), "dare_linear_svd", {"density": 1.0}),
        (DareTies(density=1.0), "dare_ties_svd", {"density": 1.0}),
        (Linear(), "svd", {}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.filterwarnings("ignore:The density")
def test_methods_on_deltas_are_pefts(
    tiny_llama: tiny.Tiny, method: Any, theirs: str, more: dict[str, Any]
) -> None:
    model = tiny_llama.peft(*PAIR)
    model.add_weighted_adapter(
        list(PAIR), list(COEFFICIENTS), "made", combination_type=theirs, svd_rank=32,
        svd_full_matrices=False, **more,
    )  # fmt: skip
    layers = tiny.tuned_layers(model, "made")
    ours = mix(method, adapters(tiny_llama), COEFFICIENTS, rank=EXACT).deltas
    assert ours.keys() == layers.keys()
    for name, delta in ours.items():
        layer = layers[name]
        expected = layer.lora_B["made"].weight.double() @ layer.lora_A["made"].weight.double()
        size = float(expected.abs().max())
        torch.testing.assert_close(delta.dense().double(), expected, rtol=1e-4, atol=1e-5 * size)


def test_the_factor_form_is_the_one_that_is_learned(tiny_llama: tiny.Tiny) -> None:
    ours = mix(Factor(), adapters(tiny_llama), COEFFICIENTS, rank=OutputRank())
    folders = [member(tiny_llama.adapter(kind)) for kind in PAIR]
    learned = FactorForm([(m.folder, m.facts) for m in folders]).at(COEFFICIENTS)
    assert ours.deltas.keys() == learned.keys()
    for name, delta in ours.deltas.items():
        expected = learned[name].dense()
        torch.testing.assert_close(delta.dense(), expected, rtol=1e-5, atol=1e-5)
    assert not ours.cut


def test_one_adapter_unpruned_with_coefficient_one_is_itself(tiny_llama: tiny.Tiny) -> None:
    one = {"wide": deltas(tiny_llama, "wide")}
    for method in get_args(AnyStatic):
        options = {"density": 1.0} if issubclass(method, Entrywise) else {}
        made = mix(method(**options), one, [1.0], rank=EXACT).deltas
        for name, delta in one["wide"].items():
            size = float(delta.dense().abs().max())
            torch.testing.assert_close(
                made[name].dense(), delta.dense(), rtol=1e-4, atol=2e-6 * size
            )


@pytest.mark.parametrize("method", [Ties(), DareLinear(), DareTies(), MagnitudePrune()])
def test_order_and_company_do_not_change_what_is_pruned(tiny_llama: tiny.Tiny, method: Any) -> None:
    three = adapters(tiny_llama, "plain", "wide", "head")
    c = dict(zip(three, (0.5, 1.0, -0.25), strict=True))
    one = mix(method, three, list(c.values()), rank=EXACT).deltas
    turned = dict(reversed(three.items()))
    other = mix(method, turned, [c[name] for name in turned], rank=EXACT).deltas
    assert list(one) == list(other) == sorted({n for d in three.values() for n in d})
    for name in one:
        torch.testing.assert_close(one[name].dense(), other[name].dense(), rtol=1e-4, atol=1e-5)
    # A module that only one adapter has is that adapter's alone, whoever else is mixed.
    alone = mix(method, {"head": three["head"]}, [-0.25], rank=EXACT).deltas
    torch.testing.assert_close(alone["lm_head"].dense(), one["lm_head"].dense())


def test_the_seed_decides_what_dare_drops(tiny_llama: tiny.Tiny) -> None:
    two = adapters(tiny_llama)
    made = [mix(DareLinear(), two, [1.0, 1.0], rank=EXACT, seed=s).deltas for s in (3, 3, 4)]
    name = next(iter(made[0]))
    assert torch.equal(made[0][name].a, made[1][name].a)
    assert not torch.allclose(made[0][name].dense(), made[2][name].dense())


def test_dare_keeps_the_sum_on_average(tiny_llama: tiny.Tiny) -> None:
    two = adapters(tiny_llama)
    expected = weighted_sum(list(two.values()), COEFFICIENTS)
    name = next(iter(expected))
    many = [mix(DareLinear(density=0.5), two, COEFFICIENTS, rank=EXACT, seed=s) for s in range(60)]
    mean = torch.stack([m.deltas[name].dense() for m in many]).mean(0)
    whole = expected[name].dense()
    assert float((mean - whole).norm() / whole.norm()) < 0.25
    assert float((many[0].deltas[name].dense() - whole).norm() / whole.norm()) > 0.5


def test_what_truncation_of_entries_costs_is_stated(tiny_llama: tiny.Tiny) -> None:
    two = adapters(tiny_llama)
    whole = mix(Ties(density=0.3), two, COEFFICIENTS, rank=EXACT)
    cut = mix(Ties(density=0.3), two, COEFFICIENTS, rank=OutputRank(rank=4))
    for name, made in cut.cut.items():
        assert made.delta.rank == 4
        exact = whole.deltas[name].dense().double()
        gone = float((made.delta.dense().double() - exact).norm() / exact.norm())
        assert made.error == pytest.approx(gone, rel=1e-3)
        assert 0.1 < made.error < 1


def test_embeddings_are_merged_as_embeddings(tiny_llama: tiny.Tiny) -> None:
    one = {"embedding": deltas(tiny_llama, "embedding")}
    for method in (Ties(), Linear(), Factor()):
        made = mix(method, one, [1.0], rank=OutputRank(rank=4)).deltas  # type: ignore[arg-type]
        assert made["model.embed_tokens"].kind == "embedding"


def test_a_module_of_two_shapes_is_refused(tiny_llama: tiny.Tiny) -> None:
    one = {"p": LowRank(torch.ones(1, 3), torch.ones(4, 1))}
    other = {"p": LowRank(torch.ones(1, 4), torch.ones(3, 1))}
    for method in (Ties(), Linear()):
        with pytest.raises(IncompatibleAdapters, match="p is linear 4x3"):
            mix(method, {"a": one, "b": other}, [1.0, 1.0], rank=EXACT)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ties", "factor"])
def test_a_recipe_with_it_is_written_and_its_error_stated(
    tiny_llama: tiny.Tiny, tmp_path: Path, kind: str
) -> None:
    refs = [{"ref": f"./{k}", "coefficient": c} for k, c in zip(PAIR, COEFFICIENTS, strict=True)]
    said = {"type": kind} | ({"density": 0.5} if kind == "ties" else {})
    wanted = from_mapping(
        {
            "version": 1, "name": "mix", "base": "org/base", "adapters": refs, "method": said,
            "output": {"path": "out", "rank": 3}, "data": {"test": {"path": "test.jsonl"}},
        }
    )  # fmt: skip
    members = [member(tiny_llama.adapter(k), c) for k, c in zip(PAIR, COEFFICIENTS, strict=True)]
    (tmp_path / "out").mkdir()
    base = tiny_llama.base()
    made = compose(wanted, members, base, Rows(test=rows(6)), tmp_path / "out")
    assert made.coefficients == dict(zip(PAIR, COEFFICIENTS, strict=True))
    assert made.written.ranks == {3: 4}
    assert made.written.truncation_error == pytest.approx((1 - made.written.total_kept) ** 0.5)
    assert made.written.truncation_error > 0.1
    found = results(wanted, base, made)
    assert found["output"]["truncation_error"] == made.written.truncation_error
    assert found["form"] == ("entries" if kind == "ties" else "factor")
    assert found["about"]["title"] == ("TIES" if kind == "ties" else "Factor form")


def test_methods_of_entries_need_a_rank_to_write() -> None:
    for kind in sorted(PRUNES):
        for rank in ({}, {"rank": "full"}):
            with pytest.raises(Exception, match=rf"output.rank: method {kind} .*rank: energy 0.9"):
                recipe({"type": kind}, [{"ref": "./a", "coefficient": 1}], output=rank)
        assert recipe(
            {"type": kind}, [{"ref": "./a", "coefficient": 1}], output={"rank": "energy 0.9"}
        )
