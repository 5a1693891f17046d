"""A tiny Llama with MixLoRA on it, and the same by plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import PeftModel
from torch.nn import functional as F

import lorahub_registry.runtime  # noqa: F401
from lorahub_registry.adapters.mixlora import MixLora, TopK, TopP, parse_mixlora
from tests.mixlora import Made, make, save

IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 9], [1, 57, 8, 60, 13, 20, 3], [1, 5, 6, 7, 8, 9, 10]])
# Of unequal lengths; 0 is padding.
LEFT = torch.tensor([[0, 0, 1, 40, 41, 42], [1, 57, 8, 60, 13, 20], [0, 0, 0, 0, 1, 5]])
RIGHT = torch.tensor([[1, 40, 41, 42, 0, 0], [1, 57, 8, 60, 13, 20], [1, 5, 0, 0, 0, 0]])
ROUTED = ("mixlora", "mixlora-dynamic", "mixlora-switch")
LOUD: dict[str, Any] = {"scale": 0.3, "lora_dropout": 0.0, "jitter_noise": 0.0}
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 63,
}  # fmt: skip


def base(seed: int = 0, **more: Any) -> Any:
    """A fresh Llama, the same for the same seed."""
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | more)).eval()
    with torch.no_grad():  # large enough that routing and experts are heard
        for name, value in model.named_parameters():
            if value.dim() == 2:
                value.mul_(4 if "embed" not in name else 10)
    return model


def checkpoint(folder: Path, strategy: Any = "mixlora", **more: Any) -> Path:
    """A checkpoint whose experts are heard; of switch, with little room."""
    if strategy == "mixlora-switch":
        more = {"expert_capacity": 2, **more}
    return save(folder / f"{strategy}-{len(list(folder.iterdir()))}", make(strategy, **LOUD | more))


def load(folder: Path, model: Any = None, **options: Any) -> Any:
    """As PEFT loads it, in evaluation mode."""
    return PeftModel.from_pretrained(base() if model is None else model, str(folder), **options)


def logits(model: Any, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, **more).logits
    return found


def tree(model: Any) -> Any:
    """What stands in a model: modules, parameters, whether they train, hooks."""
    return (
        [(name, type(m).__name__, len(m._forward_hooks), len(m._forward_pre_hooks))
         for name, m in model.named_modules()],
        [(name, p.requires_grad, p.sum().item()) for name, p in model.named_parameters()],
        sorted(getattr(model, "peft_config", {})),
        "_mixlora_hooks" in getattr(model, "__dict__", {}),
    )  # fmt: skip


@contextmanager
def by_hand(model: Any, made: Made) -> Iterator[None]:
    """A native checkpoint on a bare base: for every token, every expert's dense weights."""
    config, tensors = made
    mix, before = parse_mixlora(config, "x"), []
    for i, layer in enumerate(model.model.layers):
        for proj in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, proj)
            before.append((linear, linear.forward))
            stem = f"mixlora.layers.{i}.self_attn.{proj}"
            weight, _ = _adapted(linear.weight, tensors, stem, mix.attention)
            linear.forward = partial(F.linear, weight=weight)
        before.append((layer.mlp, layer.mlp.forward))
        layer.mlp.forward = partial(_experts, layer.mlp, tensors, f"mixlora.layers.{i}.mlp", mix)
    try:
        yield
    finally:
        for module, forward in before:
            module.forward = forward


def _adapted(weight: torch.Tensor, tensors: Any, stem: str, part: Any) -> tuple[Any, bool]:
    if f"{stem}.lora_A.weight" not in tensors:
        return weight, False
    a, b = (tensors[f"{stem}.lora_{x}.weight"].to(weight) for x in "AB")
    weight = weight + part.scaling * b @ a
    if part.use_dora:
        size = tensors[f"{stem}.lora_magnitude_vector"].to(weight)
        weight = (size / weight.norm(dim=1))[:, None] * weight
    return weight, True


def _experts(mlp: Any, tensors: Any, stem: str, mix: MixLora, x: torch.Tensor) -> torch.Tensor:
    gate = tensors.get(f"{stem}.moe_gate.weight")

    def feed(x: torch.Tensor, e: int | None) -> torch.Tensor:
        part, inner = (mix.attention, "") if e is None else (mix.experts, f".experts.{e}")
        up, wide, down = (
            _adapted(getattr(mlp, n).weight, tensors, f"{stem}.{n}{inner}", part)[0]
            for n in ("gate_proj", "up_proj", "down_proj")
        )
        return F.linear(F.silu(F.linear(x, up)) * F.linear(x, wide), down)

    if gate is None:
        return feed(x, None)
    out = torch.empty_like(x)
    for row, line in enumerate(x):
        used = [0] * mix.num_experts
        for t, token in enumerate(line):
            p = (gate.to(x) @ token).softmax(-1)
            order = sorted(range(mix.num_experts), key=lambda e, p=p: -float(p[e]))
            if isinstance(mix.routing, TopK):
                kept = order[: mix.routing.k]
                y = sum(p[e] * feed(token, e) for e in kept) / sum(p[e] for e in kept)
            elif isinstance(mix.routing, TopP):
                y, run = torch.zeros_like(token), 0.0
                for e in order:
                    y, run = y + p[e] * feed(token, e), run + float(p[e])
                    if run > mix.routing.p:
                        break
            else:
                e = order[0]
                used[e] += 1
                full = used[e] > mix.routing.capacity  # type: ignore[union-attr]
                y = p[e] * (token if full else feed(token, e))
            out[row, t] = y
    return out
