"""Where in a base things are decided."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lorahub_registry.adapters.dynamic import PromptRouter, Router
from lorahub_registry.errors import IncompatibleAdapters

# Keys and values of attention from a decoder to its encoder: T5's, then BART's and Whisper's.
_CROSS = re.compile(r"\.EncDecAttention\.[kv]\Z|\.encoder_attn\.[kv]_proj\Z")


def layer_of(module: str, model: nn.Module) -> str | None:
    """The decoder layer that ``module`` is in: the outermost element of a list of modules."""
    parts = module.split(".")
    for i in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return ".".join(parts[: i + 1])
    return None


def place_of(module: str, router: Router, model: Any) -> str:
    """The layer whose gate decides for ``module``.

    Each stack of layers has a first one: gates ``per: model`` of an encoder–decoder are two.

    Raises:
        IncompatibleAdapters: no layer can.
    """
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
