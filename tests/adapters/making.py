"""Adapters' files, written byte by byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.compat import Member
from lorahub_registry.adapters.config import AdapterConfig, parse_config
from lorahub_registry.adapters.facts import read_facts

Tensors = Mapping[str, tuple[str, list[int], bytes]]
"""Name → (dtype, shape, data)."""

BASE = "mistralai/Mistral-7B-v0.1"
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"


def safetensors(tensors: Tensors, **metadata: str) -> bytes:
    """A safetensors file with its tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    return framed(header, data)


def framed(header: Any, data: bytes = b"") -> bytes:
    """The file that has this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def lora(
    modules: tuple[str, ...] = (Q, V), *, rank: int = 4, fan_in: int = 8, fan_out: int = 8
) -> dict[str, tuple[str, list[int], bytes]]:
    """A and B for each module, float32."""
    tensors = {}
    for module in modules:
        for side, shape in (("A", [rank, fan_in]), ("B", [fan_out, rank])):
            content = bytes(4 * shape[0] * shape[1])
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = ("F32", shape, content)
    return tensors


def fields(**more: Any) -> dict[str, Any]:
    """What an ``adapter_config.json`` says."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        **more,
    }


def config(**more: Any) -> AdapterConfig:
    """The same, parsed."""
    return parse_config(json.dumps(fields(**more)), where="here")


def adapter(folder: Path, tensors: Tensors | None = None, **more: Any) -> Path:
    """An adapter in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields(**more)))
    content = safetensors(lora(rank=more.get("r", 4)) if tensors is None else tensors)
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def member(folder: Path, **said: Any) -> Member:
    """That adapter as one of a mixture."""
    known = {"name": folder.name, "key": "k", "ref": f"./{folder.name}", "base": BASE}
    return Member(folder=folder, facts=read_facts(folder), **{**known, **said})
