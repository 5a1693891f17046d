"""What a base with MixLoRA experts does before and after each forward."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorahub_registry.adapters.mixlora import MixLora
from lorahub_registry.runtime.fits import ran
from lorahub_registry.runtime.moe_flow import MoeFlow
from lorahub_registry.runtime.moe_layer import layers_of

_HELD = "_mixlora_hooks"
_NO_LABEL = -100


class Watch:
    """Knows what the model is called with, and adds the router's losses to what it gives.

    An object, and no closure: a copy of the model, or a pickle, has to have hooks with its own
    layers' flow.
    """

    def __init__(self, model: nn.Module, flow: MoeFlow) -> None:
        self.flow, self.told = flow, False
        self.names = list(inspect.signature(model.forward).parameters)

    # What is kept from forward to forward is no part of a graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a forward."""
        ran(model)
        given = self._given(args, kwargs)
        read = given.get("input_ids")
        read = given.get("inputs_embeds") if read is None else read
        mask, real = given.get("attention_mask"), None
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and read is not None:
            real = mask[:, -read.shape[1] :].bool()
        odd = mask is not None and real is None
        self.flow.begin(real, odd, given.get("past_key_values"), model.training)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self, model: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """After it, and after one that failed, which gives None."""
        try:
            if model.training and out is not None:
                out = self._with_losses(model, self._given(args, kwargs), out)
        except Exception:
            self.flow.end(None, ())
            raise
        held = list(out.values()) if isinstance(out, Mapping) else out
        held = held if isinstance(held, list | tuple) else [held]
        cache = next((each for each in held if hasattr(each, "get_seq_length")), None)
        self.flow.end(cache, [each for each in held if isinstance(each, torch.Tensor)])
        return out

    def _given(self, args: Any, kwargs: Any) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def _with_losses(self, model: nn.Module, given: Mapping[str, Any], out: Any) -> Any:
        mixes: dict[str, MixLora] = {}
        for _, layer in layers_of(model):
            mixes |= layer.mixes
        found: dict[str, torch.Tensor] = {}
        for adapter, mix in mixes.items():
            for name, value in self.flow.losses(adapter, mix).items():
                found[name] = value
        if not found:
            return out
        device = next(iter(found.values())).device
        total = torch.stack([value.to(device) for value in found.values()]).sum()
        total = total * _share(given)
        if isinstance(out, tuple):
            apart = out and isinstance(out[0], torch.Tensor) and out[0].dim() == 0
            if not apart:
                self._tell(total)
            return (out[0] + total.to(out[0]), *out[1:]) if apart else out
        if getattr(out, "loss", None) is not None:
            out.loss = out.loss + total.to(out.loss)
        else:
            self._tell(total)
        for name, value in found.items():
            out[f"{name}_loss"] = value
        return out

    def _tell(self, total: torch.Tensor) -> None:
        """Say, once, that whoever trains the router has to add its loss."""
        if self.told or not (self.flow.learning and total.requires_grad):
            return
        self.told = True
        warnings.warn(
            "the model was given no labels, so its output has no loss that MixLoRA's balancing "
            "loss could be added to: whoever computes the loss (label_smoothing_factor, "
            "compute_loss_func) has to add out.aux_loss, and out.z_loss of switch routing; or set "
            "router_loss=False",
            UserWarning,
            stacklevel=2,
        )


def _share(given: Mapping[str, Any]) -> torch.Tensor | float:
    """What part of a step's tokens this batch has.

    transformers' Trainer tells how many labels all batches of a step have, and the model divides
    its loss by that; a router's that was added whole would count once for every batch.
    """
    items, labels = given.get("num_items_in_batch"), given.get("labels")
    shifted = given.get("shift_labels")  # what the loss is of where both are given
    if shifted is None and labels is not None:
        shifted = labels[..., 1:]
    if items is None or shifted is None:
        return 1.0
    here: torch.Tensor = (shifted != _NO_LABEL).sum()
    return here / (items.to(here.device) if isinstance(items, torch.Tensor) else items)


def watch(model: nn.Module, flow: MoeFlow) -> None:
    """Hang the hooks on a model, once."""
    if _HELD in model.__dict__:
        return
    made = Watch(model, flow)
    model.__dict__[_HELD] = (
        model.register_forward_pre_hook(made.begin, with_kwargs=True),
        model.register_forward_hook(made.end, with_kwargs=True, always_call=True),
    )


def tidy(model: nn.Module) -> None:
    """Take the hooks off where nothing needs them."""
    if not any(layer.mixes for _, layer in layers_of(model)):
        for module in model.modules():
            for handle in module.__dict__.pop(_HELD, ()):
                handle.remove()
