"""Adapters from files and to files: PEFT's format, read and written without PEFT."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.facts import AdapterFacts
from lorahub_registry.adapters.tensors import WEIGHTS_NAME
from lorahub_registry.errors import BrokenAdapter
from lorahub_registry.weights.lowrank import Deltas, LowRank

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def load_deltas(folder: Path, facts: AdapterFacts) -> dict[str, LowRank]:
    """The adapter's deltas in float32 on the CPU, scaling folded into B.

    Args:
        facts: of the same folder; its modules must be linear.

    Raises:
        BrokenAdapter: a tensor holds NaN or infinity.
    """
    return {
        name: LowRank(a, b * scaling)
        for name, (a, b, scaling) in load_factors(folder, facts).items()
    }


def load_factors(
    folder: Path, facts: AdapterFacts
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Module → (A, B, scaling), float32 on the CPU, as they lie in the file."""
    tensors = load_file(folder / WEIGHTS_NAME)
    factors = {}
    for module in facts.modules:
        a, b = tensors[module.key_a].float(), tensors[module.key_b].float()
        for key, tensor in ((module.key_a, a), (module.key_b, b)):
            if not torch.isfinite(tensor).all():
                raise BrokenAdapter(
                    f"{folder / WEIGHTS_NAME}: {key} holds NaN or infinity",
                    hint="leave this adapter out; its training diverged or the file is damaged",
                )
        factors[module.name] = (a, b, module.scaling)
    return factors


def save_adapter(
    folder: Path,
    deltas: Deltas,
    *,
    base: str,
    base_revision: str | None,
    task_type: str,
    dtype: str = "float32",
    all_modules: Collection[str] = (),
    fan_in_fan_out: bool = False,
) -> None:
    """Write ``deltas`` as a PEFT LoRA folder that adds exactly B·A (α = r everywhere).

    Args:
        folder: exists already.
        dtype: of the written tensors, ``float32``, ``float16`` or ``bfloat16``.
        all_modules: names of the base's modules, so that targets can be written shortly where
            that means the same; without them every module is named in full.
    """
    ranks = {name: delta.rank for name, delta in deltas.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    config: dict[str, Any] = {
        "alpha_pattern": others,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": others,
        "revision": base_revision,
        "target_modules": short_targets(deltas, all_modules),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for name, delta in deltas.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = delta.a.to(DTYPES[dtype]).contiguous()
        tensors[f"{key}.lora_B.weight"] = delta.b.to(DTYPES[dtype]).contiguous()
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def short_targets(modules: Collection[str], all_modules: Collection[str]) -> list[str]:
    """``target_modules`` for ``modules``: last parts of names where they mean just these.

    PEFT takes a target for every module whose name ends in it; a short name that would catch a
    module of the base which is not adapted is written in full.
    """
    by_end: dict[str, set[str]] = {}
    for name in modules:
        by_end.setdefault(name.rsplit(".", 1)[-1], set()).add(name)
    targets: list[str] = []
    for end, names in by_end.items():
        caught = {m for m in all_modules if m == end or m.endswith(f".{end}")}
        targets += [end] if caught == names else sorted(names)
    return sorted(targets)
