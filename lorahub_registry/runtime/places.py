"""Where in a base things are decided."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lorahub_registry.adapters.dynamic import PromptRouter, Router
from lorahub_registry.errors import IncompatibleAdapters

# Keys and values of attention from a decoder to its encoder, or to an image: T5's, BART's and
# Whisper's, Mllama's, then BERT's and GPT-2's.
_CROSS = re.compile(
    r"\.(EncDecAttention|encoder_attn|cross_attn|crossattention)\."
    r"(?:.+\.)?(k|v|kv|key|value|[kv]_proj|kv_proj|[kv]_lin|to_[kv]|c_attn)\Z"
)

_LISTS = nn.ModuleList, nn.ModuleDict


def layer_of(module: str, model: nn.Module) -> str | None:
    """The decoder layer that ``module`` is in: the outermost element of a list of modules."""
    parts = module.split(".")
    for i in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return ".".join(parts[: i + 1])
    return None


def in_experts(module: str, model: nn.Module) -> bool:
    """Whether ``module`` is in one of a layer's experts, which get some of its tokens only."""
    layer = layer_of(module, model)
    if layer is None:
        return False
    parts = module.removeprefix(f"{layer}.").split(".")
    # A list alone tells nothing: T5 has its attention and its feed-forward in one.
    return any(
        "expert" in part
        and isinstance(model.get_submodule(".".join([layer, *parts[: i + 1]])), _LISTS)
        for i, part in enumerate(parts)
    )


def place_of(module: str, router: Router, model: Any) -> str:
    """The layer whose gate decides for ``module``.

    Each stack of layers has a first one: gates ``per: model`` of an encoder–decoder are two.

    Raises:
        IncompatibleAdapters: no layer can.
    """
    if in_experts(module, model):
        raise IncompatibleAdapters(
            f"{module} is in an expert of its layer and gets some of its tokens, so it cannot be "
            "told whose coefficients are whose",
            hint="take adapters without it, or arrow, or gates per: module",
        )
    if isinstance(router, PromptRouter):
        reader = reader_of(model)
        name = next(name for name, found in model.named_modules() if found is reader)
        lists = (n for n, m in reader.named_modules() if isinstance(m, nn.ModuleList))
        return ".".join(part for part in (name, next(lists), "0") if part)
    place = layer_of(module, model)
    if place is None:
        raise IncompatibleAdapters(
            f"{module} is in no layer of the base, so no layer's gate decides for it",
            hint="take adapters without it, or gates per: module",
        )
    if _CROSS.search(module):
        raise IncompatibleAdapters(
            f"{module} sees the encoder's tokens, and the gate of {place} the decoder's",
            hint="take adapters without it, or gates per: module",
        )
    return f"{place.rpartition('.')[0]}.0" if getattr(router, "per", "") == "model" else place


def reader_of(model: Any) -> nn.Module:
    """What gets the prompt's token ids: the encoder of an encoder–decoder, else the decoder."""
    if getattr(model.config, "is_encoder_decoder", False):
        encoder: nn.Module = model.get_encoder()
        return encoder
    found: nn.Module = model.base_model
    return found


def width_of(model: Any) -> int:
    """Width of the residual stream."""
    config = model.config.get_text_config()
    return int(getattr(config, "hidden_size", None) or config.d_model)
