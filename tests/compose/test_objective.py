"""Candidates measured in three ways: the same numbers, the slope of them, and an untouched base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.compose import objective
from lorahub_registry.compose.forms import DeltaForm, FactorForm, Form, Layout
from lorahub_registry.compose.objective import Coefficients, Measure
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.tokens import Encoded, TokenRule, batches, encode
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.lowrank import LowRank
from tests import tiny
from tests.compose.making import deltas

POINTS: list[Coefficients] = [(0.5, -0.25), (0.0, 0.0), (1.0, 1.5), (-0.75, 0.1), (0.25, 0.0)]


def rows(base: Any, count: int = 7, tokens: int = 90) -> list[Any]:
    """Some rows in several small batches."""
    found = encode(base.tokenizer, tiny.rows(count), TokenRule(), seq2seq=base.seq2seq)
    made = batches(found, pad=0, seq2seq=base.seq2seq, device="cpu", tokens=tokens)
    assert len(made) > 1
    return made


def case(model: tiny.Tiny) -> Form:
    if model.kind == "llama":
        return DeltaForm([deltas(model, kind) for kind in ("wide", "embedding")])
    one = deltas(model, model.kind)
    made = torch.Generator().manual_seed(9)
    other = {}
    for n, d in list(one.items())[1:]:
        a, b = (
            torch.randn(3, d.shape[1], generator=made),
            torch.randn(d.shape[0], 3, generator=made),
        )
        other[n] = LowRank(a * 0.2, b * 0.2)
    return DeltaForm([one, other])


def nlls(base: Any, form: Form, given: Sequence[Any], how: str, **more: Any) -> list[float]:
    before = {n: t.clone() for n, t in base.model.state_dict().items()}
    with Measure(base.model, form, given, **more) as measure:
        assert measure.how == how
        found = [loss.nll for loss in measure(POINTS)]
    assert all(torch.equal(before[n], t) for n, t in base.model.state_dict().items())
    assert not any(module._forward_hooks for module in base.model.modules())
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_three_ways_give_one_loss_and_leave_the_base_alone(
    request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = request.getfixturevalue(f"tiny_{kind}").base()
    form, given = case(request.getfixturevalue(f"tiny_{kind}")), rows(base)
    monkeypatch.setattr(objective, "_FULL", {"cpu": 1})
    alone = nlls(base, form, given, "in place")
    slopes = nlls(base, form, given, "gradient", slopes=True)
    monkeypatch.setattr(objective, "_FULL", {"cpu": 2 * 100})
    together = nlls(base, form, given, "operator", population=8)
    for c, *found in zip(POINTS, alone, slopes, together, strict=True):
        with applied(base.model, form.at(c)):
            assert found == pytest.approx([score(base.model, given).mean] * 3, rel=2e-6)
    assert len({round(nll, 3) for nll in alone}) == len(POINTS)


@pytest.mark.parametrize("copies", [1, 2, 3, 5, 8])
def test_any_number_side_by_side_gives_the_same(
    tiny_llama: tiny.Tiny, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama.base(torch.bfloat16)
    form, given = case(tiny_llama), rows(base)
    largest = max(b.inputs["input_ids"].numel() for b in given)
    monkeypatch.setattr(objective, "_FULL", {"cpu": -(-copies * largest // 4)})
    with Measure(base.model, form, given, population=8) as measure:
        assert (measure.how, measure.copies) == ("operator", copies)
        found = [loss.nll for loss in measure(POINTS)]
    for c, nll in zip(POINTS, found, strict=True):
        with applied(base.model, form.at(c)):
            # What bfloat16 rounds depends on how the products are cut up.
            assert nll == pytest.approx(score(base.model, given).mean, rel=2e-3)


def test_a_search_that_proposes_one_at_a_time_composes_in_place(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    measure = Measure(base.model, case(tiny_llama), rows(base))
    assert (measure.how, measure.copies) == ("in place", 1)


def test_long_answers_count_as_long_prompts_do(tiny_t5: tiny.Tiny) -> None:
    base = tiny_t5.base()
    few = batches([Encoded([5] * 3, [6] * 200)], pad=0, seq2seq=True, device="cpu")
    assert Measure(base.model, case(tiny_t5), few, population=64).copies == 2


def test_half_precision_is_never_composed_in_place(
    tiny_llama: tiny.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "_FULL", {"cpu": 1})
    base = tiny_llama.base(torch.bfloat16)
    nlls(base, case(tiny_llama), rows(base), "operator")
    places = [(tiny_llama.adapter(k), read_facts(tiny_llama.adapter(k))) for k in ("plain", "same")]
    nlls(base, FactorForm(places), rows(base), "beside")


def places(model: tiny.Tiny) -> list[tuple[Path, Any]]:
    return [(model.adapter(k), read_facts(model.adapter(k))) for k in ("plain", "same")]


@pytest.mark.parametrize("kind", ["llama delta", "llama factor", "llama module", "gpt2", "t5"])
def test_the_slope_is_how_the_loss_changes(request: pytest.FixtureRequest, kind: str) -> None:
    name, _, what = kind.partition(" ")
    model: tiny.Tiny = request.getfixturevalue(f"tiny_{name}")
    base = model.base()
    given = rows(base)
    if what == "factor":
        form: Form = FactorForm(places(model))
    elif what == "module":
        pair = [deltas(model, k) for k in ("plain", "same")]
        form = DeltaForm(pair, layout=Layout(pair[0], "module"))
    else:
        form = case(model)
    made = torch.Generator().manual_seed(2)
    point = (torch.rand(form.size, generator=made) * 0.5 + 0.1).tolist()
    with Measure(base.model, form, given, slopes=True) as measure:
        [loss] = measure([tuple(point)])
        assert loss.slope is not None
        assert len(loss.slope) == form.size
        # Along random directions: one difference checks all coefficients.
        for _ in range(3):
            to = torch.randn(form.size, generator=made)
            step = 4e-3 * to / to.norm()
            there = [tuple((torch.tensor(point) + s * step).tolist()) for s in (2, 1, -1, -2)]
            two, one, back, far = (found.nll for found in measure(there))
            # Five points: what is left of third powers would be more than the rounding.
            rise = (8 * (one - back) - (two - far)) / 12
            expected = sum(s * float(d) for s, d in zip(loss.slope, step, strict=True))
            assert rise == pytest.approx(expected, rel=2e-2, abs=2e-6)


def test_a_loss_that_overflows_is_no_number_in_any_way(
    tiny_llama: tiny.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama.base()
    given = rows(base)
    huge = {n: LowRank(d.a * 1e30, d.b * 1e30) for n, d in deltas(tiny_llama, "plain").items()}
    form = DeltaForm([huge, deltas(tiny_llama, "wide")])
    for full, slopes in ((1, False), (200, False), (1, True)):
        monkeypatch.setattr(objective, "_FULL", {"cpu": full})
        with Measure(base.model, form, given, slopes=slopes) as measure:
            bad, good, again = (loss.nll for loss in measure([(1.0, 0.0), (0.0, 0.5), (0.0, 0.5)]))
        assert bad != bad, measure.how
        # What one candidate overflows does not reach the one beside it.
        assert good == pytest.approx(again, rel=1e-6)
        assert 0 < good < 100


def test_one_adapter_on_one_row_is_enough(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    [given] = batches(
        encode(base.tokenizer, tiny.rows(1), TokenRule(), seq2seq=False),
        pad=0, seq2seq=False, device="cpu",
    )  # fmt: skip
    form = DeltaForm([deltas(tiny_llama, "plain")])
    with Measure(base.model, form, [given]) as measure:
        found = [loss.nll for loss in measure([(0.0,), (1.0,), (0.5,)])]
    assert found[0] == pytest.approx(score(base.model, [given]).mean, rel=1e-6)
    assert len(set(found)) == 3


def test_a_base_that_flattens_its_rows_is_measured_one_by_one(tmp_path: Path) -> None:
    """OPT's second half of a layer sees no rows; an adapter there keeps its numbers."""
    import transformers as hf

    torch.manual_seed(3)
    text = tiny.tokenizer(bos=True, eos=False)
    model = hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=len(text), hidden_size=32, ffn_dim=48, num_hidden_layers=2,
            num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=128,
            init_std=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    from lorahub_registry.evaluate.base import adopt

    base = adopt(model, text, name="tiny-opt")
    given = rows(base)
    made = torch.Generator().manual_seed(1)
    name = "model.decoder.layers.0.fc1"
    form = DeltaForm(
        [
            {name: LowRank(torch.randn(2, 32, generator=made), torch.randn(48, 2, generator=made))}
            for _ in range(2)
        ]
    )
    with Measure(base.model, form, given, population=8) as measure:
        assert measure.how == "operator"
        assert measure.copies > 1
        found = [loss.nll for loss in measure(POINTS)]
        assert measure.copies == 1
    for c, nll in zip(POINTS, found, strict=True):
        with applied(base.model, form.at(c)):
            assert nll == pytest.approx(score(base.model, given).mean, rel=1e-6)
