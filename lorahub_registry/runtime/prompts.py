"""Where a prompt lies in the base's hidden space."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from lorahub_registry.errors import IncompatibleAdapters, UsageError


def mask_of(mask: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """An attention mask as [rows, positions], 1 at tokens and 0 at padding.

    Args:
        mask: that, or what static caches come with, [rows, 1, queries, keys]: bool, or added to
            the logits. Its last query sees all that is no padding.
        ids: [rows, positions], before which nothing was cached.

    Raises:
        IncompatibleAdapters: it is none of these.
    """
    if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        return mask
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[2] != ids.shape[1]:
        raise IncompatibleAdapters(
            "a prompt router cannot tell prompts from padding by this attention mask",
            hint="give one of [rows, positions], or generate with the dynamic cache",
        )
    seen = mask[:, 0, -1, : ids.shape[1]]
    return (seen if seen.dtype == torch.bool else seen == 0).long().expand(len(ids), -1)


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

    Raises:
        UsageError: ``counted`` is not of the rows and positions of ``ids``.
    """
    if counted is not None and not _covers(counted, ids):
        said = list(counted.shape) if isinstance(counted, torch.Tensor) else type(counted).__name__
        raise UsageError(
            f"reading was given {said} for a batch of {list(ids.shape)} tokens",
            hint=f"give a tensor {list(ids.shape)}, 1 at the tokens of prompts and 0 elsewhere",
        )
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


def _covers(counted: Any, ids: torch.Tensor) -> bool:
    """Whether there is one for each token, or one row for all; a cut prompt has some in front."""
    return (
        isinstance(counted, torch.Tensor)
        and counted.dim() == 2
        and len(counted) in {1, len(ids)}
        and counted.shape[1] >= ids.shape[1]
    )
