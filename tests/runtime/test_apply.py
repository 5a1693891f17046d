"""Deltas on a loaded model: the right outputs, exchanged in place, and no trace afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.apply import Applied, applied
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import LowRank
from tests import tiny

IDS = torch.arange(3, 35)[None] % 250 + 3


def deltas(model: tiny.Tiny, kind: str) -> dict[str, LowRank]:
    folder = model.adapter(kind)
    return load_deltas(folder, read_facts(folder))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            return model(input_ids=IDS, decoder_input_ids=IDS[:, :9]).logits
        return model(input_ids=IDS).logits


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(params=["llama", "gpt2", "t5"])
def case(request: pytest.FixtureRequest) -> tuple[tiny.Tiny, str]:
    """A tiny model and a kind of adapter on it: Linear, Conv1D, encoder and decoder."""
    name = request.param
    return request.getfixturevalue(f"tiny_{name}"), "wide" if name == "llama" else name


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight counts as shared, so that each delta runs beside its weight."""

    class Shared(dict[int, int]):
        def __missing__(self, key: int) -> int:
            return 2

    monkeypatch.setattr("lorahub_registry.runtime.apply._owners", lambda model: Shared())


def test_in_place_gives_what_peft_gives(case: tuple[tiny.Tiny, str]) -> None:
    model, kind = case
    bare = model.model()
    expected, base = logits(model.peft(kind)), logits(bare)
    scale = float(base.std())
    with applied(bare, deltas(model, kind)):
        torch.testing.assert_close(logits(bare), expected, rtol=1e-4, atol=1e-5 * scale)
    assert float((expected - base).abs().max()) > 0.1 * scale
    torch.testing.assert_close(logits(bare), base, rtol=0, atol=0)


@pytest.mark.usefixtures("beside")
def test_beside_the_weight_gives_what_peft_gives(case: tuple[tiny.Tiny, str]) -> None:
    model, kind = case
    bare = model.model()
    before, base = snapshot(bare), logits(bare)
    with applied(bare, deltas(model, kind)):
        assert same(before, snapshot(bare))  # no weight is touched
        expected = logits(model.peft(kind))
        torch.testing.assert_close(logits(bare), expected, rtol=1e-4, atol=1e-5 * float(base.std()))
    torch.testing.assert_close(logits(bare), base, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in bare.modules())


def test_weights_come_back_bit_for_bit(case: tuple[tiny.Tiny, str]) -> None:
    model, kind = case
    bare, on = model.model(), deltas(model, kind)
    before = snapshot(bare)
    with Applied(bare, on.keys()) as place:
        for factor in (1.0, -3.7, 1e4):
            place.set({name: delta.scaled(factor) for name, delta in on.items()})
        assert not same(before, snapshot(bare))
    assert same(before, snapshot(bare))


def test_weights_come_back_after_an_error(tiny_llama: tiny.Tiny) -> None:
    bare, on = tiny_llama.model(), deltas(tiny_llama, "plain")
    before = snapshot(bare)
    with pytest.raises(ZeroDivisionError), applied(bare, on):
        raise ZeroDivisionError
    assert same(before, snapshot(bare))
    misshapen = {n: LowRank(d.a[:, 1:], d.b) for n, d in on.items() if "1.self_attn.v" in n}
    with pytest.raises(RuntimeError), applied(bare, {**on, **misshapen}):
        pass
    assert same(before, snapshot(bare))
    assert not any(module._forward_hooks for module in bare.modules())


def test_deltas_are_exchanged_and_do_not_add_up(tiny_llama: tiny.Tiny) -> None:
    one, other = deltas(tiny_llama, "plain"), deltas(tiny_llama, "wide")
    bare, fresh = tiny_llama.model(), tiny_llama.model()
    with Applied(bare, one.keys() | other.keys()) as place:
        place.set(one)
        place.set(other)
        with applied(fresh, other):
            assert same(snapshot(fresh), snapshot(bare))
        place.set(one)  # "wide" sits on more modules: there the base has to be back
        with applied(fresh, one):
            assert same(snapshot(fresh), snapshot(bare))


@pytest.mark.usefixtures("beside")
def test_deltas_beside_are_exchanged_too(tiny_llama: tiny.Tiny) -> None:
    one, other = deltas(tiny_llama, "plain"), deltas(tiny_llama, "wide")
    bare = tiny_llama.model()
    with applied(bare, one):
        expected = logits(bare)
    with Applied(bare, one.keys() | other.keys()) as place:
        place.set(other)
        place.set(one)
        torch.testing.assert_close(logits(bare), expected, rtol=0, atol=0)


def test_a_tied_weight_is_never_changed_in_place(tiny_gpt2: tiny.Tiny) -> None:
    model = tiny_gpt2.model()
    assert model.lm_head.weight is model.transformer.wte.weight
    made = torch.Generator().manual_seed(1)
    size = model.lm_head.weight.shape
    head = LowRank(torch.randn(2, size[1], generator=made), torch.randn(size[0], 2, generator=made))
    before, base = snapshot(model), logits(model)
    with torch.inference_mode():
        hidden = model.transformer(input_ids=IDS).last_hidden_state
    with applied(model, {"lm_head": head}):
        assert same(before, snapshot(model))
        # Only the head changes: the embedding would change the hidden states, too.
        expected = base + hidden @ head.dense().T
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model), base, rtol=0, atol=0)


def test_a_module_that_the_base_does_not_have_is_refused_by_name(tiny_llama: tiny.Tiny) -> None:
    model = tiny_llama.model()
    with pytest.raises(IncompatibleAdapters, match=r"no module model\.layers\.2\.mlp\.up_proj$"):
        Applied(model, ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"])
    with pytest.raises(IncompatibleAdapters, match=r"no module a \(nor 2 others\)"):
        Applied(model, ["c", "a", "b"])


@pytest.mark.parametrize("name", ["model.norm", "model.rotary_emb", "model.layers.0.mlp"])
def test_a_module_that_takes_no_lora_is_refused_by_name(tiny_llama: tiny.Tiny, name: str) -> None:
    said = f"^{name} is a .* in the base, neither a linear module nor an embedding$"
    with pytest.raises(IncompatibleAdapters, match=said):
        Applied(tiny_llama.model(), [name])


def test_a_bf16_base_runs_its_deltas_beside_and_agrees_with_peft(tiny_llama: tiny.Tiny) -> None:
    from peft import PeftModel

    on, exact = deltas(tiny_llama, "wide"), tiny_llama.model()
    bare = tiny_llama.model().to(torch.bfloat16)
    peft = PeftModel.from_pretrained(
        tiny_llama.model().to(torch.bfloat16), str(tiny_llama.adapter("wide"))
    ).eval()
    base = logits(bare).float()
    with applied(exact, on), applied(bare, on):
        ours, theirs, true = logits(bare).float(), logits(peft).float(), logits(exact)
    assert float((true - base).norm()) > 0.3 * float(base.norm())
    # Both keep the factors in float32 and round each output once, so only that rounding differs;
    # activations of eight bits of mantissa cost both the same against the truth.
    assert float((ours - theirs).norm()) < 0.01 * float(theirs.norm())
    assert float((ours - true).norm()) < 1.3 * float((theirs - true).norm())


def test_a_bf16_base_keeps_a_small_delta_that_merging_would_lose() -> None:
    made = torch.Generator().manual_seed(3)
    weight = torch.randn(128, 128, generator=made).bfloat16()
    delta = LowRank(torch.randn(4, 128, generator=made), torch.randn(128, 4, generator=made))
    delta = delta.scaled(0.01 * float(weight.float().norm()) / delta.norm())
    base = nn.Sequential(nn.Linear(128, 128, bias=False)).to(torch.bfloat16)
    base[0].weight.data.copy_(weight)
    # One row of the identity each: the outputs are the effective weight itself.
    probe = torch.eye(128, dtype=torch.bfloat16)
    merged = (weight.float() + delta.dense()).bfloat16()
    lost = (merged.float() - weight.float() - delta.dense()).norm() / delta.norm()
    with torch.inference_mode(), applied(base, {"0": delta}):
        factors = next(iter(base[0]._forward_hooks.values()))(
            base[0], (probe,), torch.zeros(128, 128, dtype=torch.bfloat16)
        )
    beside = (factors.float().T - delta.dense()).norm() / delta.norm()
    assert float(lost) > 0.1
    assert float(beside) < 0.02


def test_the_base_stays_a_base_for_the_next_adapter(tiny_llama: tiny.Tiny) -> None:
    model = tiny_llama.model()
    alone = {}
    for kind in ("plain", "wide", "head"):
        with applied(tiny_llama.model(), {}):
            fresh = tiny_llama.model()
            with applied(fresh, deltas(tiny_llama, kind)):
                alone[kind] = logits(fresh)
    for kind in ("wide", "plain", "head", "plain"):
        with applied(model, deltas(tiny_llama, kind)):
            torch.testing.assert_close(logits(model), alone[kind], rtol=0, atol=0)
