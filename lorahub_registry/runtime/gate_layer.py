"""What hangs on decoder layers (or on the first one) where a dynamic mixture is loaded.

A :class:`GateLayer` computes coefficients when its layer is entered, or when a prompt is read; the
modules below take them from the model's flow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache

from lorahub_registry.adapters.dynamic import Dynamic, LoraFlow, PromptRouter
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.flow import Flow
from lorahub_registry.runtime.layers import Frozen, move
from lorahub_registry.runtime.mixture import Coefficients, largest
from lorahub_registry.runtime.nearest import nearest
from lorahub_registry.runtime.prompts import mask_of, prompt_means
from lorahub_registry.runtime.routers import gate


class GateLayer(Frozen):
    """What decides, on entering a decoder layer, how loud each expert speaks in it."""

    adapter_layer_names = ("lora_gate", "lora_gate_bias", "lora_centroids")
    frozen = ("lora_centroids",)

    def __init__(self, layer: nn.Module, flow: Flow, name: str, width: int) -> None:
        super().__init__(flow, name)
        self.width = width
        self.lora_gate, self.lora_gate_bias = nn.ParameterDict(), nn.ParameterDict()
        self.lora_centroids = nn.ParameterDict()
        # In lists, so that they do not become modules of this one.
        self._layer, self._reader, self._hooks = [layer], list[nn.Module](), list[Any]()

    @property
    def weight(self) -> torch.Tensor:
        """None: a gate stands beside a layer and wraps nothing (PEFT's own would look for ever)."""
        raise AttributeError("a gate has no weight of a base layer")

    @property
    def bias(self) -> torch.Tensor:
        """None, as ``weight``."""
        raise AttributeError("a gate has no bias of a base layer")

    def update_layer(self, adapter: str, mixture: Dynamic, *, inference_mode: bool) -> None:
        """Make room for a mixture's gate, or for its experts' centroids."""
        experts = len(mixture.experts)
        if isinstance(mixture.router, PromptRouter):
            self.lora_centroids[adapter] = torch.zeros(experts, self.width)
        else:
            self.lora_gate[adapter] = torch.zeros(experts, self.width)
            self.lora_gate_bias[adapter] = torch.zeros(experts)
        self._register(adapter, mixture)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)
        self._hook()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a mixture; with the last one the hooks go."""
        super().delete_adapter(adapter_name)
        self.flow.forget(adapter_name)
        if not self.mixtures:
            self.remove()

    def read_prompts(self, reader: nn.Module) -> None:
        """Decide when ``reader``, which gets the token ids, is called with a prompt."""
        self.remove()
        self._reader = [reader]
        self._hook()

    def _hook(self) -> None:
        if self._hooks:
            return
        for module, hook in ((self._layer, self._decide), (self._reader, self._read)):
            self._hooks += [m.register_forward_pre_hook(hook, with_kwargs=True) for m in module]
        self._hooks += [m.register_forward_hook(self._remember) for m in self._reader]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # The layer holds this gate, so the device is that of its base parameters.
        own = {id(parameter) for parameter in self.parameters()}
        where = next(p.device for p in self._layer[0].parameters() if id(p) not in own)
        move(self, adapter_name, device or where)

    def _decide(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        for adapter in self._asked():
            if adapter not in self.lora_gate:
                continue
            router = self.mixtures[adapter].router
            assert isinstance(router, LoraFlow)
            weight, bias = self.lora_gate[adapter], self.lora_gate_bias[adapter]
            found = Coefficients(gate(x, weight, bias, router.temperature))
            trains = weight.requires_grad or bias.requires_grad
            self.flow.decide(self.name, adapter, found, trains=trains)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _read(self, reader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        asked = self._routed()
        if not asked:
            return
        past, run = kwargs.get("past_key_values"), self.flow.generation
        if run is not None and run.decided.keys() >= set(asked):
            known = run.decided
        elif past is not None and past.get_seq_length():
            known = self.flow.caches.get(past, {})
            if run is not None:
                run.decided.update(known)
        else:
            known = self._route(asked, reader, args, kwargs)
        for adapter in asked:
            if adapter not in known:
                raise IncompatibleAdapters(
                    f"the cache was not begun with mixture {adapter!r}, so it is not known what "
                    "its prompt is to be routed to",
                    hint="give the model the whole prompt, or the cache that it returned for it",
                )
            self.flow.decide("prompt", adapter, known[adapter], trains=False)
        if past is not None:
            self.flow.caches.setdefault(past, {}).update({name: known[name] for name in asked})

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _remember(self, _: Any, __: Any, out: Any) -> None:
        """Know a cache that the call has made by what its prompt was routed to."""
        past = getattr(out, "past_key_values", None)
        if isinstance(out, tuple):
            past = next((part for part in out if isinstance(part, Cache)), None)
        if past is not None and past not in self.flow.caches and (asked := self._routed()):
            self.flow.caches[past] = {name: self.flow.decided["prompt", name] for name in asked}

    def _route(
        self, asked: list[str], reader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Coefficients]:
        """What the prompt that ``reader`` is called with is routed to, by each of ``asked``."""
        ids, run = kwargs.get("input_ids", args[0] if args else None), self.flow.generation
        if ids is None:
            raise IncompatibleAdapters(
                "a prompt router reads token ids, and the model was called with embeddings",
                hint="call it with input_ids, or give it coefficients",
            )
        mask = mask_of(kwargs.get("attention_mask"), ids)
        if run is not None and run.length is not None:
            if ids.shape[1] < run.length:
                raise IncompatibleAdapters(
                    f"a prompt router reads prompts whole, and of {run.length} tokens the model "
                    f"was given {ids.shape[1]}",
                    hint="generate without prefill_chunk_size",
                )
            # What is guessed ahead stands behind the prompt.
            ids, mask = ids[:, : run.length], None if mask is None else mask[:, : run.length]
        found, self.flow.silent = {}, True
        try:
            for adapter in asked:
                router = self.mixtures[adapter].router
                assert isinstance(router, PromptRouter)
                vectors = prompt_means(reader, ids, mask, router.layer, self.flow.prompts)
                centroids = self.lora_centroids[adapter]
                near = nearest(vectors, centroids, router.top_k, router.temperature)
                found[adapter] = largest(near[:, None], router.top_k)
        finally:
            self.flow.silent = False
        if run is not None:
            run.decided.update(found)
        return found

    def _routed(self) -> list[str]:
        return [adapter for adapter in self._asked() if adapter in self.lora_centroids]

    def _asked(self) -> list[str]:
        """Whose coefficients are to be decided here and now."""
        if self.disable_adapters or self.flow.silent:
            return []
        names = self.active_adapters if self.flow.names is None else sorted(set(self.flow.names))
        return [name for name in names if name not in self.flow.given]
