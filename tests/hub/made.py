"""Small adapters, made byte by byte."""

from __future__ import annotations

import json
from typing import Any

BASE = "mistralai/Mistral-7B-v0.1"
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")


def weights(
    rank: int = 4, *, modules: tuple[str, ...] = MODULES, fill: int = 1, **metadata: str
) -> bytes:
    """An ``adapter_model.safetensors`` over an 8 wide base."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for module in modules:
        for side, shape in (("A", [rank, 8]), ("B", [8, rank])):
            size = 4 * 8 * rank
            header[f"base_model.model.{module}.lora_{side}.weight"] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [end, end + size],
            }
            end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes([fill]) * end


def config(rank: int = 4, base: str | None = BASE, **more: Any) -> str:
    """An ``adapter_config.json``."""
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        **more,
    }
    return json.dumps(fields)


def adapter(folder: str = "", rank: int = 4, *, fill: int = 1, **more: Any) -> dict[str, Any]:
    """The two files of an adapter."""
    start = f"{folder}/" if folder else ""
    return {
        f"{start}adapter_config.json": config(rank, **more),
        f"{start}adapter_model.safetensors": weights(rank, fill=fill),
    }


def card(base: str = BASE, body: str = "", **more: Any) -> str:
    """A README with front matter."""
    fields = {"base_model": base, "library_name": "peft", "license": "apache-2.0", **more}
    return f"---\n{json.dumps(fields)}\n---\n\n{body}"
