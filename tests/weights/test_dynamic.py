"""A dynamic mixture's folder: what is written is read back, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lorahub_registry.runtime  # noqa: F401
from lorahub_registry.adapters.dynamic import Arrow, Constant, LoraFlow, PromptRouter, parse_dynamic
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters, LoraregError
from lorahub_registry.weights.dynamic import Origin, load_dynamic, read_dynamic, save_dynamic
from lorahub_registry.weights.lowrank import LowRank
from tests import tiny
from tests.compose.making import deltas

GATE = "base_model.model.model.layers.0.mixture.lora_gate"


@pytest.fixture
def folder(tiny_llama: tiny.Tiny, tmp_path: Path) -> Path:
    experts = [deltas(tiny_llama, kind) for kind in ("plain", "wide", "patterns")]
    tensors = {}
    for layer in range(2):
        tensors[f"model.layers.{layer}.mixture.lora_gate"] = torch.randn(3, 32)
        tensors[f"model.layers.{layer}.mixture.lora_gate_bias"] = torch.randn(3)
    out = tmp_path / "dynamic"
    out.mkdir()
    save_dynamic(
        out, experts, [Origin(n, f"org/{n}", "0" * 40) for n in "abc"], LoraFlow(), tensors,
        base="org/base", base_revision=None, task_type="CAUSAL_LM",
    )  # fmt: skip
    return out


def test_what_is_written_is_read_back(folder: Path, tiny_llama: tiny.Tiny) -> None:
    dynamic, experts, router = load_dynamic(folder)
    assert dynamic.names == ("a", "b", "c")
    assert dynamic.experts[0].ref == "org/a"
    assert len(router) == 4
    for found, kind in zip(experts, ("plain", "wide", "patterns"), strict=True):
        expected = deltas(tiny_llama, kind)
        assert found.keys() == expected.keys()
        for name, delta in expected.items():
            assert torch.equal(found[name].a, delta.a)
            assert torch.equal(found[name].b, delta.b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_experts_survive_loading_and_saving(
    tiny_llama: tiny.Tiny, tmp_path: Path, dtype: str
) -> None:
    one = deltas(tiny_llama, "plain")
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
    save_dynamic(
        tmp_path / "first", [one, one], [Origin("a"), Origin("b")], Constant((1.0, -0.5)), {},
        base=str(tiny_llama.folder), base_revision=None, task_type="CAUSAL_LM", dtype=dtype,
    )  # fmt: skip
    model = PeftModel.from_pretrained(tiny_llama.model(), str(tmp_path / "first"))
    model.save_pretrained(str(tmp_path / "again"))
    assert load_dynamic(tmp_path / "again")[0] == read_dynamic(tmp_path / "first")


def poison(t: dict[str, torch.Tensor]) -> None:
    t[GATE][0, 0] = torch.nan


def change_expert(t: dict[str, torch.Tensor]) -> None:
    t[next(k for k in t if ".lora_B." in k)][0, 0] += 1


def widen(t: dict[str, torch.Tensor]) -> None:
    t[GATE] = torch.zeros(3, 64)


def another(t: dict[str, torch.Tensor]) -> None:
    t[GATE] = torch.zeros(4, 32)


def fewer_ranks(t: dict[str, torch.Tensor]) -> None:
    key = next(k for k in t if ".lora_A." in k)
    t[key] = t[key][1:]


def stand_alone(t: dict[str, torch.Tensor]) -> None:
    del t[next(k for k in t if ".lora_B." in k)]


def no_a(t: dict[str, torch.Tensor]) -> None:
    del t[next(k for k in t if ".lora_A." in k)]


def scalar(t: dict[str, torch.Tensor]) -> None:
    t[GATE] = torch.tensor(1.0)


def poison_expert(t: dict[str, torch.Tensor]) -> None:
    t[next(k for k in t if ".lora_B." in k)][0, 0] = torch.inf


def other_gate(t: dict[str, torch.Tensor]) -> None:
    t[GATE] += 1


def drop_layer(t: dict[str, torch.Tensor]) -> None:
    del t[GATE.replace("layers.0", "layers.1")]


def deeper(t: dict[str, torch.Tensor]) -> None:
    t[GATE.replace("layers.0", "layers.2")] = t[GATE].clone()


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (poison, BrokenAdapter, "lora_gate holds NaN"),
        (change_expert, BrokenAdapter, "is not the one that the router was made with"),
        (widen, IncompatibleAdapters, "lora_gate is 3x64, and on this base it would be 3x32"),
        (stand_alone, BrokenAdapter, "lora_A.weight stands alone"),
        (no_a, BrokenAdapter, "lora_B.weight stands alone"),
        (scalar, BrokenAdapter, "lora_gate is of shape []"),
        (poison_expert, BrokenAdapter, "lora_B.weight holds NaN or infinity"),
        (other_gate, BrokenAdapter, "its router is not the one"),
        (another, BrokenAdapter, "is for 4 experts, and there are 3"),
        (fewer_ranks, BrokenAdapter, "ranks where its experts have"),
        (drop_layer, BrokenAdapter, "has no model.layers.1.mixture.lora_gate"),
        (deeper, IncompatibleAdapters, "holds model.layers.2.mixture.lora_gate"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(
    folder: Path, tiny_llama: tiny.Tiny, change: Callable[[Any], None],
    kind: type[LoraregError], said: str,
) -> None:  # fmt: skip
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    base = tiny_llama.model()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(kind) as caught:
        PeftModel.from_pretrained(base, str(folder))
    assert said in str(caught.value)
    # And the base is as it was.
    assert [name for name, _ in base.named_modules()] == names
    assert not [m for m in base.modules() if m._forward_pre_hooks]


@pytest.mark.parametrize(
    ("change", "name"), [(poison, "lora_gate"), (poison_expert, "lora_B.weight")]
)
def test_nan_is_told_with_its_file_and_tensor(
    folder: Path, change: Callable[[Any], None], name: str
) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BrokenAdapter) as caught:
        load_dynamic(folder)
    said = str(caught.value)
    assert said.startswith(f"{file}: model.layers.")
    assert said.endswith(f"{name} holds NaN or infinity")


@pytest.mark.parametrize("part", ["expert", "router", "temperature", "order"])
def test_a_config_without_sums_or_with_another_router_is_refused(
    folder: Path, tiny_llama: tiny.Tiny, part: str
) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    mixture = config["mixture"]
    if part == "expert":
        del mixture["experts"][1]["sha256"]
    elif part == "router":
        del mixture["sha256"]
    elif part == "temperature":
        mixture["router"]["temperature"] = 9.0
    else:
        mixture["experts"].reverse()
    file.write_text(json.dumps(config))
    with pytest.raises(BrokenAdapter, match=r"not the one that|ranks where its experts have"):
        load_dynamic(folder)
    base = tiny_llama.model()
    with pytest.raises(BrokenAdapter, match=r"not the one that|ranks where its experts have"):
        PeftModel.from_pretrained(base, str(folder))
    assert not [name for name, _ in base.named_modules() if "lora_" in name or "mixture" in name]


def test_trained_gates_are_signed_anew(folder: Path, tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama.model(), str(folder), is_trainable=True)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    model.save_pretrained(str(tmp_path / "again"))
    dynamic, _, router = load_dynamic(tmp_path / "again")
    assert dynamic.sha256 != read_dynamic(folder).sha256
    assert torch.equal(router[GATE[17:]], load_dynamic(folder)[2][GATE[17:]] + 1)


def test_a_model_made_half_saves_the_experts_it_was_given(
    folder: Path, tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    model = PeftModel.from_pretrained(tiny_llama.model(), str(folder)).to(torch.bfloat16)
    assert model.base_model.model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert torch.isfinite(model(torch.tensor([[1, 5, 6]])).logits).all()
    model.save_pretrained(str(tmp_path / "again"))
    assert load_dynamic(tmp_path / "again")[0] == read_dynamic(folder)


def test_a_second_one_that_is_broken_leaves_the_first(folder: Path, tiny_llama: tiny.Tiny) -> None:
    model = PeftModel.from_pretrained(tiny_llama.model(), str(folder)).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    expected = model(ids).logits
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    poison(tensors)
    save_file(tensors, file)
    with pytest.raises(BrokenAdapter):
        model.load_adapter(str(folder), adapter_name="two")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(ids).logits, expected)


def test_embeddings_are_no_experts(tmp_path: Path) -> None:
    one = {"embed": LowRank(torch.ones(1, 2), torch.ones(3, 1), "embedding")}
    with pytest.raises(IncompatibleAdapters, match="embed is an embedding"):
        save_dynamic(
            tmp_path, [one], [Origin("a")], Constant((1.0,)), {}, base="b", base_revision=None,
            task_type="CAUSAL_LM",
        )  # fmt: skip


@pytest.mark.parametrize(
    "router", [Constant((0.5, 1.0)), LoraFlow("model", 2.0), Arrow(1), PromptRouter(2, 0.5, 3)]
)
def test_routers_are_read_as_they_were_written(folder: Path, router: Any) -> None:
    made = read_dynamic(folder)
    raw = json.loads(json.dumps(type(made)(made.experts[:2], router).dump()))
    assert parse_dynamic(raw, where="x").router == router


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "of version 2"),
        ({"experts": []}, "no names"),
        ({"router": {"type": "ghost"}}, "unknown router 'ghost'"),
        ({"router": {"type": "arrow", "top_k": 9}}, "top_k 9 of 3"),
        ({"router": {"type": "lora_flow", "temperature": 0}}, "a temperature of 0"),
        ({"router": {"type": "lora_flow", "per": "word"}}, "gates per 'word'"),
        ({"router": {"type": "constant", "coefficients": [1]}}, "3 experts, 1 coefficients"),
    ],
)
def test_a_config_that_cannot_be_is_refused(
    folder: Path, change: dict[str, Any], said: str
) -> None:
    raw = read_dynamic(folder).dump() | change
    with pytest.raises(BrokenAdapter, match="x: its mixture") as caught:
        parse_dynamic(raw, where="x")
    assert said in str(caught.value)
