"""What a model is made of, by its config alone: modules and parameters on torch's meta device."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from lorahub_registry.errors import BaseModelError

LOADING = threading.Lock()
"""Held while transformers builds or loads a model: it patches itself for that time, and of two at
once one would leave it patched, without tied weights."""

Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights.

    Attributes:
        model_type: as its config calls it.
        kinds: every module that holds parameters of its own, by dotted name. ``conv1d`` is
            transformers' linear module whose weight is [fan_in, fan_out].
        shapes: every parameter and buffer that is stored, by the name that the loaded model gives
            it; of tied ones, the first name.
        tied: other name → the first name of the same parameter.
        task_type: PEFT's name for what the model does.
        head: the module that makes the logits; None where the model has none.
        quantization: the config's ``quantization_config``, if any.
    """

    model_type: str
    kinds: Mapping[str, Kind]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    task_type: str
    head: str | None = None
    quantization: Mapping[str, Any] | None = None

    @cached_property
    def linear(self) -> frozenset[str]:
        """The modules whose weight is a matrix that multiplies what comes in."""
        return frozenset(n for n, kind in self.kinds.items() if kind in {"linear", "conv1d"})

    def stored(self, tensors: Collection[str]) -> dict[str, str]:
        """Parameter → its name among a checkpoint's ``tensors``; those that are not there lack.

        A checkpoint may leave out the head's prefix (gpt2 stores ``h.0…`` for
        ``transformer.h.0…``), or hold a tied parameter under its other name.
        """
        found: dict[str, str] = {}
        others: dict[str, list[str]] = {}
        for other, first in self.tied.items():
            others.setdefault(first, []).append(other)
        for name in self.shapes:
            for known in (name, *others.get(name, ())):
                parts = known.split(".")
                ends = (".".join(parts[start:]) for start in range(min(3, len(parts))))
                there = next((end for end in ends if end in tensors), None)
                if there is not None:
                    found[name] = there
                    break
        return found


def read_skeleton(folder: Path) -> Skeleton:
    """The skeleton of the model in ``folder``.

    Raises:
        BaseModelError: no config there, none that transformers knows, or one that needs code of
            its own (never run).
    """
    try:
        raw = json.loads((folder / "config.json").read_text("utf-8"))
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with LOADING, torch.device("meta"):
            model = _class_of(config).from_config(config)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"{folder}: its architecture cannot be told: {why}",
            hint="lorareg takes models that transformers knows, without code of their own",
        ) from None
    named = dict(model.named_modules())
    kinds = {
        name: _kind(module)
        for name, module in named.items()
        if next(module.parameters(recurse=False), None) is not None
    }
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        if (other := first.setdefault(id(tensor), name)) != name:
            tied[name] = other
    return Skeleton(
        model_type=str(config.model_type),
        kinds=kinds,
        shapes={n: tuple(t.shape) for n, t in state.items() if n not in tied},
        tied=tied,
        task_type="SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM",
        head=next((n for n, m in named.items() if m is model.get_output_embeddings()), None),
        quantization=raw.get("quantization_config"),
    )


def _class_of(config: Any) -> Any:
    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.Linear):
        return "linear"
    if type(module).__name__ == "Conv1D":
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else "other"
