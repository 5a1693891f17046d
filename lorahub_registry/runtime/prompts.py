"""Where a prompt lies in the base's hidden space."""

from __future__ import annotations

import inspect
from typing import Any

import torch


@torch.no_grad()
def prompt_means(
    reader: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    layer: int,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean hidden state over each prompt's tokens, [rows, width], float32.

    Args:
        reader: what gets the token ids: a decoder without its head, or an encoder.
        ids: [rows, positions].
        mask: the same, 0 at padding; None: no padding.
        layer: 0 for the embeddings, n for what the n-th layer gives.
        counted: 1 at the tokens of prompts, 0 at answers that follow; None: all but padding.
    """
    if layer == 0:
        states = reader.get_input_embeddings()(ids)
    else:
        more: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        taken = inspect.signature(reader.forward).parameters
        if mask is not None and "position_ids" in taken:
            # A prompt lies where it lies alone, also with padding to its left.
            more["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
        if "use_cache" in taken:
            more["use_cache"] = False
        found = reader(input_ids=ids, output_hidden_states=True, return_dict=True, **more)
        states = found.hidden_states[layer]
    seen = counted if counted is not None else torch.ones_like(ids) if mask is None else mask
    weight = seen[:, -ids.shape[1] :, None].to(torch.float32)
    return (states.float() * weight).sum(1) / weight.sum(1).clamp_min(1)
