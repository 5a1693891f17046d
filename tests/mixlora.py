"""MixLoRA, LoRAMoE and MoLA checkpoints in miniature, in m-LoRA's exact layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

Strategy = Literal["mixlora", "mixlora-dynamic", "mixlora-switch", "loramoe", "mola"]
STRATEGIES: tuple[Strategy, ...] = (
    "mixlora", "mixlora-dynamic", "mixlora-switch", "loramoe", "mola",
)  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
OLD = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
Made = tuple[dict[str, Any], dict[str, torch.Tensor]]


def make(
    strategy: Strategy = "mixlora",
    *,
    hidden: int = 32,
    inner: int = 48,
    experts: int = 4,
    r: int = 4,
    layers: int = 2,
    kv: int | None = None,
    targets: tuple[str, ...] = ATTENTION + MLP,
    expert_lora: Mapping[str, Any] | None = None,
    dora: bool = False,
    scale: float = 0.05,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Made:
    """(``adapter_config.json``, tensors by native name) of a checkpoint as m-LoRA saves it.

    Args:
        hidden, inner: D and F of a Llama.
        kv: what ``k_proj`` and ``v_proj`` give; default: ``hidden``.
        expert_lora: what the config says of experts; its ``r`` counts.
        dora: with the magnitudes that this program saves.
        scale: standard deviation of the factors; the gates' is 1/√in.
        config: over what the config says; None leaves a key out.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = scale) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    peft_type = strategy.upper() if strategy in {"loramoe", "mola"} else "MIXLORA"
    prefix = peft_type.lower()
    rank = int((expert_lora or {}).get("r", r))
    sizes = {
        "q_proj": (hidden, hidden), "o_proj": (hidden, hidden),
        "k_proj": (hidden, kv or hidden), "v_proj": (hidden, kv or hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    for i in range(layers):
        start = f"{prefix}.layers.{i}"
        if peft_type == "MIXLORA":
            tensors[f"{start}.mlp.moe_gate.weight"] = normal(experts, hidden, std=hidden**-0.5)
        for proj in targets:
            fan_in, fan_out = sizes[proj]
            stem = f"{start}.{'self_attn' if proj in ATTENTION else 'mlp'}.{proj}"
            routed = proj in MLP or peft_type == "MOLA"
            if routed and peft_type != "MIXLORA":
                tensors[f"{stem}.moe_gate.weight"] = normal(experts, fan_in, std=fan_in**-0.5)
            for at in [f"{stem}.experts.{e}" for e in range(experts)] if routed else [stem]:
                own = rank if routed else r
                tensors[f"{at}.lora_A.weight"] = normal(own, fan_in)
                tensors[f"{at}.lora_B.weight"] = normal(fan_out, own)
                if dora:
                    tensors[f"{at}.lora_magnitude_vector"] = normal(fan_out).abs() + 0.1
    said = {
        "bias": "none",
        "peft_type": peft_type,
        "r": r,
        "lora_alpha": 2 * r,
        "lora_dropout": 0.05,
        "target_modules": list(targets),
        "expert_lora": {"bias": "none", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05}
        | dict(expert_lora)
        if expert_lora is not None
        else None,
        "routing_strategy": strategy,
        "num_experts": experts,
        "act_fn": "silu" if peft_type == "MIXLORA" else None,
        "use_dora": dora or None,
        **_routing(strategy, experts),
        "base_model_name_or_path": "tiny-llama",
        "task_type": "CAUSAL_LM",
        **config,
    }
    return {k: v for k, v in said.items() if v is not None}, tensors


def _routing(strategy: Strategy, experts: int) -> dict[str, Any]:
    if strategy in {"mixlora", "mola"}:
        return {"top_k": min(2, experts)}
    if strategy == "mixlora-dynamic":
        return {"top_p": 0.8, "temperature": 0.0}
    return {"expert_capacity": 8} if strategy == "mixlora-switch" else {}


def legacy(made: Made, *, sparse_step: int | None = None, old_proj: bool = True) -> Made:
    """It as m-LoRA's first releases saved it.

    Args:
        sparse_step: of switch: the other layers' feed-forward has plain LoRA, which is the first
            expert's here, and no gate.
        old_proj: ``w1_proj w2_proj w3_proj``; else only the rest is old.
    """
    config, tensors = made
    names = OLD if old_proj else {}
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        start, layer = ".".join(parts[:3]), int(parts[2])
        if sparse_step and layer % sparse_step != 1 and parts[3] == "mlp":
            if parts[5:7] == ["experts", "0"]:
                proj, leaf = names.get(parts[4], parts[4]), ".".join(parts[7:])
                found[f"{start}.self_attn.{proj}.{leaf}"] = tensor
        elif parts[4] == "moe_gate":
            found[f"{start}.gate.weight"] = tensor
        elif parts[3] == "mlp":
            proj, leaf = names.get(parts[4], parts[4]), ".".join(parts[7:])
            found[f"{start}.experts.{parts[6]}.{proj}.{leaf}"] = tensor
        else:
            found[name] = tensor
    strategy = {"mixlora": "mixtral", "mixlora-switch": "switch"}[config["routing_strategy"]]
    config = config | {
        "routing_strategy": strategy,
        "target_modules": {names.get(t, t): True for t in config["target_modules"]}
        | {"dense": False},
    }
    return config | ({"sparse_step": sparse_step} if sparse_step else {}), found


def save(folder: Path, made: Made, *, pickled: bool = False) -> Path:
    """The folder that holds it: safetensors, or m-LoRA's own ``.bin``."""
    config, tensors = made
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if pickled:
        torch.save(dict(tensors), folder / "adapter_model.bin")
    else:
        save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
