"""LoRA-Flow's published layout in miniature, and its formula as a plain loop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests import tiny

NOWHERE = "/data/someone/models/tiny-llama"
"""What the adapters' configs say: a folder of their maker's."""
RANKS = {"zh_lora": 4, "math_lora": 16}
ALPHA = 16


def pair(made: tiny.Tiny, root: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """``LoRAs/zh_lora`` (rank 4) and ``LoRAs/math_lora`` (16) with pickled weights in ``root``."""
    for seed, (name, rank) in enumerate(RANKS.items()):
        torch.manual_seed(seed)
        tensors = {}
        for module, layer in made.model().named_modules():
            if module.rsplit(".", 1)[-1] in tiny.LINEAR:
                key = f"base_model.model.{module}.lora_"
                a, b = torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank)
                tensors[f"{key}A.weight"] = (a * 0.05).to(dtype)
                tensors[f"{key}B.weight"] = (b * 0.05).to(dtype)
        adapter(root / "LoRAs" / name, tensors, rank, **config)
    return root


def adapter(folder: Path, tensors: Mapping[str, Any], rank: int, **config: Any) -> None:
    """One adapter with a pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {
        "base_model_name_or_path": NOWHERE,
        "bias": "none",
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": tiny.LINEAR,
        "task_type": "CAUSAL_LM",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))
    torch.save(dict(tensors), folder / "adapter_model.bin")


def gates(
    layers: int = 2, experts: int = 2, width: int = 32, *, biases: bool = True
) -> dict[str, torch.Tensor]:
    """Half-precision gates that differ from layer to layer."""
    torch.manual_seed(7)
    found = {}
    for i in range(layers):
        key = f"encoder.layers.{i}"
        found[f"{key}.lora_fusion_gate.weight"] = (torch.randn(experts, width) * 0.4).half()
        if biases:
            found[f"{key}.weight_bias"] = (torch.randn(1, experts) * 0.5).half()
    return found


def save(tensors: Mapping[str, Any], path: Path) -> Path:
    """As it is published: a pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(tensors), path)
    return path


def logits(
    model: Any, root: Path, gate: Mapping[str, torch.Tensor], ids: torch.Tensor, heat: float
) -> torch.Tensor:
    """``W x + Σ_k w_k (16/r_k) B_k A_k x`` with ``w = softmax(W_g h / heat) + b``, where h enters
    the layer: from the files as they were written, by hooks on the stock model, in float32."""
    loras = [torch.load(root / "LoRAs" / n / "adapter_model.bin", weights_only=True) for n in RANKS]
    now: dict[str, torch.Tensor] = {}

    def enter(i: int) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            h = args[0] if args else kwargs["hidden_states"]
            weight = gate[f"encoder.layers.{i}.lora_fusion_gate.weight"].float()
            bias = gate.get(f"encoder.layers.{i}.weight_bias", torch.zeros(1, 2)).float()
            now["w"] = torch.softmax(h @ weight.T / heat, dim=-1) + bias[0]

        return hook

    def add(name: str) -> Any:
        def hook(_: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
            [x] = args
            for k, (lora, rank) in enumerate(zip(loras, RANKS.values(), strict=True)):
                a = lora[f"base_model.model.{name}.lora_A.weight"].float()
                b = lora[f"base_model.model.{name}.lora_B.weight"].float()
                y = y + now["w"][..., k : k + 1] * (ALPHA / rank) * (x @ a.T @ b.T)
            return y

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(enter(i), with_kwargs=True)
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in tiny.LINEAR:
            module.register_forward_hook(add(name))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found
