"""What LoRA-Flow's gates and Arrow make of a module's or a layer's input."""

from __future__ import annotations

import torch
from torch.nn import functional

from lorahub_registry.runtime.autocast import no_autocast
from lorahub_registry.runtime.mixture import Coefficients, largest


def gate(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, temperature: float
) -> torch.Tensor:
    """LoRA-Flow's gate, ``softmax(W x / T) + b``, at least in float32: [..., E].

    The bias stands outside the softmax: weights need not sum to 1, and may be negative.

    Args:
        x: [..., width].
        weight, bias: [E, width] and [E].
    """
    if not x.dtype == weight.dtype == bias.dtype == torch.float32:
        wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        x, weight, bias = x.to(wide), weight.to(wide), bias.to(wide)
    with no_autocast(x.device):
        logits = functional.linear(x, weight)
    if temperature != 1:
        logits = logits / temperature
    return logits.softmax(-1) + bias


def arrow(
    x: torch.Tensor, prototypes: torch.Tensor, top_k: int, temperature: float
) -> Coefficients:
    """Arrow's coefficients: softmax over the ``top_k`` largest ``|x · prototype|``.

    Args:
        x: [rows, positions, fan_in], or [tokens, fan_in].
        prototypes: [E, fan_in], unit vectors; zero where an expert does not sit on the module.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x.device):
        near = functional.linear(x.to(wide), prototypes.to(wide)).abs()
    # Who is not there has nothing to say, and takes no share.
    near = near.masked_fill(~prototypes.any(-1), float("-inf"))
    found = largest(near / temperature, top_k)
    values = found.values.softmax(-1).nan_to_num(0.0)
    if values.dim() == 2:  # tokens without rows
        return Coefficients(values[:, None], None if found.which is None else found.which[:, None])
    return Coefficients(values, found.which)
