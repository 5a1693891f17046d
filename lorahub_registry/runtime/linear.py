"""What holds for a base's linear modules, however they are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_trainable(module: nn.Module) -> bool:
    """Whether adapters can be trained on ``module``: linear ones, quantised or Conv1D, too."""
    return isinstance(module, nn.Linear) or type(module).__name__ in {
        "Conv1D",
        "Linear4bit",
        "Linear8bitLt",
    }


def fans(module: Any) -> tuple[int, int]:
    """(fan_in, fan_out) of a linear module, packed or not."""
    if type(module).__name__ == "Conv1D":
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return int(module.in_features), int(module.out_features)


def weight_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The module's matrix as [fan_out, fan_in]; a quantised one is unpacked."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(module).detach().to(dtype)
    return weight.T if type(module).__name__ == "Conv1D" else weight


def apply_to_base(layer: nn.Module, fn: Any, recurse: bool) -> None:
    """What ``model.to(torch.bfloat16)`` and the like do to a tuner layer: they change the base.

    Experts in fewer bits are others than those the router was made with.
    """

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = fn(tensor)
        return tensor.to(found.device) if found.itemsize < tensor.itemsize else found

    for name, child in layer.named_children() if recurse else ():
        child._apply(fn if name == "base_layer" else wide, recurse)
