"""The same checkpoint through ``mixlora`` 0.2.3, on every architecture that it knows.

As it comes it cannot be compared: its experts drop out even in evaluation, for they stand in plain
dicts that ``eval`` does not reach; without ``act_fn`` it has no activation; what ``expert_lora``
says it does not use; and the magnitudes of DoRA it neither reads nor writes. So dropout is taken
off, its own files are given ``act_fn`` (ours say it), and the other two are left out. Both sides
compute in float32, and sums are taken in another order: 1e-5 of the largest logit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model

import lorahub_registry.runtime  # noqa: F401
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.runtime.mixlora import MixLoraConfig
from lorahub_registry.train.write import write_adapter
from lorahub_registry.weights.mixlora import read_any, write_mlora
from tests.mixlora import make, save
from tests.train.making import learner, llama

peer: Any = pytest.importorskip("mixlora", reason="pip install --no-deps mixlora==0.2.3")

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GELU = "gelu_pytorch_tanh"
KNOWN: dict[str, tuple[str, list[str]]] = {
    "Llama": ("silu", GATED),
    "Mistral": ("silu", GATED),
    "Qwen2": ("silu", GATED),
    "Gemma": (GELU, GATED),
    "Gemma2": (GELU, GATED),
    "Phi": ("gelu_new", ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]),
    "Phi3": ("silu", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
}
IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 9, 3], [1, 57, 8, 60, 13, 20, 3, 5]])


def build(kind: str) -> Any:
    """A base with biases where it has some, the same each time."""
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**SIZES)).eval()
    model.name_or_path = "tiny"  # its reader wants a base's name
    with torch.no_grad():  # large enough that routing and experts are heard
        for value in model.parameters():
            value.copy_(
                torch.randn_like(value) * (value.shape[-1] ** -0.5 if value.dim() > 1 else 0.3)
            )
    return model


def by_peer(model: Any, folder: Path) -> torch.Tensor:
    """Logits of its own loader's."""
    config, weights = peer.load_adapter_weights(str(folder), device="cpu")
    peer.inject_adapter_in_model(model, config, weights)
    for layer in model.model.layers:
        for expert in layer.mlp.mixlora_moes["default"].experts_.values():
            expert.dropout_.p = 0.0
    return logits(model.eval())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def same(found: torch.Tensor, wanted: torch.Tensor, apart: torch.Tensor) -> None:
    size = wanted.abs().max()
    assert (found - wanted).abs().max() <= 1e-5 * size
    assert (found - apart).abs().max() > 1e-2 * size


@pytest.mark.parametrize("kind", KNOWN)
def test_what_is_trained_here_is_read_there(kind: str, tmp_path: Path) -> None:
    act, targets = KNOWN[kind]
    config = MixLoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.05, target_modules=targets, num_experts=4, top_k=2,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(build(kind), config).eval()
    made = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = torch.randn(value.shape, generator=made) * 0.3
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / CONFIG_NAME).read_text())["act_fn"] == act
    (tmp_path / "native").mkdir()
    write_mlora(tmp_path / "native", *read_any(tmp_path / "saved"))
    wanted = by_peer(build(kind), tmp_path / "native")
    same(logits(model), wanted, logits(build(kind)))
    again = PeftModel.from_pretrained(build(kind), str(tmp_path / "saved")).eval()
    same(logits(again), wanted, logits(build(kind)))


@pytest.mark.parametrize("said", [{}, {"use_rslora": True}, {"top_k": 1}, {"top_k": 4}], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma2"])
def test_its_own_files_are_read_here(kind: str, said: dict[str, Any], tmp_path: Path) -> None:
    act, _ = KNOWN[kind]
    folder = save(tmp_path / "its", make(scale=0.3, act_fn=act, **said), pickled=True)
    found = PeftModel.from_pretrained(build(kind), str(folder)).eval()
    same(logits(found), by_peer(build(kind), folder), logits(build(kind)))


def test_what_a_factory_trains_is_read_there(tmp_path: Path) -> None:
    base: Any = llama()
    base.name_or_path = "tiny"
    plain = logits(base)
    parameters = learner(base, method={}, lora={"lora_dropout": 0.05}).parameters
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        parameters.flat.copy_(torch.randn(parameters.flat.shape, generator=made) * 0.3)
    for folder in (tmp_path / "written", tmp_path / "native"):
        folder.mkdir()
    write_adapter(
        tmp_path / "written", parameters, base, base="tiny", base_revision="c0ffee",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    assert write_mlora(tmp_path / "native", *read_any(tmp_path / "written")) == ()
    wanted = by_peer(llama(), tmp_path / "native")
    same(logits(PeftModel.from_pretrained(base, str(tmp_path / "written")).eval()), wanted, plain)


def test_targets_without_some_of_the_projections(tmp_path: Path) -> None:
    for targets in (("q_proj", "up_proj"), ("down_proj",), ("gate_proj", "up_proj")):
        made = make(scale=0.3, targets=targets)
        folder = save(tmp_path / targets[-1], made, pickled=True)
        found = PeftModel.from_pretrained(build("Llama"), str(folder)).eval()
        same(logits(found), by_peer(build("Llama"), folder), logits(build("Llama")))
