"""A trained adapter as PEFT writes it: its config and its tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.facts import PREFIX
from lorahub_registry.adapters.tensors import WEIGHTS_NAME
from lorahub_registry.train.experts import ExpertParameters
from lorahub_registry.train.parameters import Parameters
from lorahub_registry.weights.files import DTYPES, short_targets
from lorahub_registry.weights.mixlora import write_mixlora


def write_adapter(
    folder: Path,
    parameters: Parameters,
    model: nn.Module,
    *,
    base: str,
    base_revision: str | None,
    task_type: str,
    dtype: str = "float32",
) -> None:
    """Write ``parameters`` so that stock PEFT loads them, or with experts PEFT and our type.

    PiSSA and OLoRA become a plain LoRA of twice the rank, on the base as it is.

    Args:
        folder: exists already.
        dtype: of the written factors; DoRA's magnitudes and routers stay float32.
    """
    if isinstance(parameters, ExpertParameters):
        mix = replace(parameters.mix, base=base, revision=base_revision, task_type=task_type)
        found = {
            name: tensor if _exact(name) else tensor.to(DTYPES[dtype])
            for name, tensor in parameters.native().items()
        }
        write_mixlora(folder, mix, found)
        return
    tensors = {
        # Magnitudes are few, and rounding them moves whole outputs.
        f"{PREFIX}{module}.lora_{name}": tensor.to(
            torch.float32 if name == "magnitude_vector" else DTYPES[dtype]
        ).contiguous()
        for module, parts in parameters.written().items()
        for name, tensor in parts.items()
    }
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    options, rank = parameters.options, parameters.rank
    plain = rank == options.r
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(
            type(model.get_submodule(name)).__name__ == "Conv1D" for name in parameters.factors
        ),
        "inference_mode": True,
        "init_lora_weights": True,
        # Twice the rank with the same scaling; the square root of rsLoRA is of the trained rank.
        "lora_alpha": options.lora_alpha if plain else options.scaling * rank,
        "lora_dropout": options.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": base_revision,
        "target_modules": short_targets(
            parameters.factors, [name for name, _ in model.named_modules() if name]
        ),
        "task_type": task_type,
        "use_dora": options.use_dora,
        "use_rslora": options.use_rslora and plain,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _exact(name: str) -> bool:
    return name.endswith(("moe_gate.weight", "lora_magnitude_vector"))
