"""What stands in the base where a dynamic mixture is loaded: PEFT tuner layers.

A :class:`MixtureLayer` wraps each adapted module. A :class:`GateLayer` hangs on each decoder layer
(or on the first one) and, by a hook, computes coefficients when the layer is entered; the modules
below read them. Whatever lives in both is keyed by PEFT's adapter name, so that several mixtures
can be loaded at once, each with its own experts.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers import Cache

from lorahub_registry.adapters.dynamic import Arrow, Constant, Dynamic, LoraFlow, PromptRouter
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.flow import Flow
from lorahub_registry.runtime.mixture import Coefficients, Experts, arrow, gate, largest
from lorahub_registry.runtime.nearest import nearest
from lorahub_registry.runtime.operator import RowsMerged
from lorahub_registry.runtime.prompts import mask_of, prompt_means


class _Frozen(nn.Module, BaseTunerLayer):
    """What both kinds share: experts never train, and nothing here can be merged."""

    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...] = ("mixtures",)
    frozen: tuple[str, ...] = ()
    active_adapters: Any  # PEFT's, which mypy does not see
    set_adapter: Any
    _get_base_layer_device_and_dtype: Any
    get_base_layer: Any
    frozen_peft_weight_names: dict[str, tuple[str, ...]]

    def __init__(self, flow: Flow, name: str) -> None:
        super().__init__()
        self.flow, self.name = flow, name
        self.mixtures: dict[str, Dynamic] = {}
        self.frozen_peft_weight_names = {}
        self.merged_adapters: list[str] = []

    def _register(self, adapter: str, mixture: Dynamic) -> None:
        self.mixtures[adapter] = mixture
        self.frozen_peft_weight_names[adapter] = self.frozen

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Let ``model.to(torch.bfloat16)`` and the like change the base alone.

        Experts in fewer bits are others than those the router was made with.
        """

        def wide(tensor: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = fn(tensor)
            return tensor.to(found.device) if found.itemsize < tensor.itemsize else found

        for name, child in self.named_children() if recurse else ():
            child._apply(fn if name == "base_layer" else wide, recurse)
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: which experts speak changes from token to token.

        Raises:
            ValueError: always, as PEFT's own layers do that cannot be merged.
        """
        raise ValueError(MERGE)

    def unmerge(self) -> None:
        """Nothing was merged."""


def _moved(layer: Any, adapter: str, device: torch.device) -> None:
    """Bring a mixture's tensors to ``device``.

    PEFT's own way casts them to the base's dtype, too; they stay as they were written.
    """
    for name in layer.adapter_layer_names:
        held = getattr(layer, name)
        if adapter not in held:
            continue
        one = held[adapter]
        for value in [one] if isinstance(one, nn.Parameter) else one.parameters():
            if value.device.type != "meta":
                value.data = value.data.to(device)


MERGE = (
    "a dynamic mixture cannot be merged: its coefficients depend on the tokens, and a merged "
    "weight has one for all. The plain LoRA beside it (the mixture's folder without `dynamic/`) "
    "can be"
)


class MixtureLayer(_Frozen):
    """One module of the base with every mixture's experts beside it."""

    adapter_layer_names = (
        "lora_A",
        "lora_B",
        "lora_gate",
        "lora_gate_bias",
        "lora_prototypes",
    )
    frozen = ("lora_A", "lora_B", "lora_prototypes")

    def __init__(self, base_layer: nn.Module, flow: Flow, name: str) -> None:
        super().__init__(flow, name)
        self.base_layer: Any = base_layer
        sizes: Any = _get_in_out_features(base_layer)
        self.in_features, self.out_features = sizes
        self.lora_A: Any = nn.ModuleDict()
        self.lora_B: Any = nn.ModuleDict()
        self.lora_gate, self.lora_gate_bias = nn.ParameterDict(), nn.ParameterDict()
        self.lora_prototypes = nn.ParameterDict()
        self.place, self.in_experts = "", False
        self._ready: dict[str, Experts] = {}
        self._constant: dict[str, Coefficients] = {}

    def update_layer(self, adapter: str, mixture: Dynamic, *, inference_mode: bool) -> None:
        """Make room for a mixture's tensors."""
        ranks = mixture.ranks_on(self.name)
        self.lora_A[adapter] = nn.Linear(self.in_features, sum(ranks), bias=False)
        self.lora_B[adapter] = nn.Linear(sum(ranks), self.out_features, bias=False)
        nn.init.zeros_(self.lora_B[adapter].weight)
        if isinstance(mixture.router, LoraFlow) and mixture.router.site == "module":
            self.lora_gate[adapter] = torch.zeros(len(ranks), self.in_features)
            self.lora_gate_bias[adapter] = torch.zeros(len(ranks))
        if isinstance(mixture.router, Arrow):
            self.lora_prototypes[adapter] = torch.zeros(len(ranks), self.in_features)
        self._register(adapter, mixture)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the base gives, with each row's experts added."""
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.flow.silent:
            return y
        if self.in_experts:
            self._check_rowless()
        for adapter, rows in self.flow.shares(x.shape[0], self.active_adapters):
            if adapter not in self.lora_A:
                continue
            if rows is None:
                y = self._experts(adapter).add(y, x, self._coefficients(adapter, x, None))
                continue
            rows = rows.to(x.device)
            c = self._coefficients(adapter, x, rows)
            y = y.index_copy(0, rows, self._experts(adapter).add(y[rows], x[rows], c))
        return y

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        where, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is not None or where is not None:
            _moved(self, adapter_name, device or where)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a mixture."""
        super().delete_adapter(adapter_name)
        self._ready.pop(adapter_name, None)
        self._constant.pop(adapter_name, None)
        self.flow.forget(adapter_name)

    def _coefficients(
        self, adapter: str, x: torch.Tensor, rows: torch.Tensor | None
    ) -> Coefficients:
        router, given = self.mixtures[adapter].router, self.flow.given.get(adapter)
        of = x.shape[0]
        if rows is not None and given is None and router.site == "module":
            x, rows = x[rows], None  # decided here, from these rows alone
        if given is not None:
            found = given
        elif isinstance(router, Constant):
            found, rows = self._constants(adapter, router, x.device), None
        elif isinstance(router, Arrow):
            found = arrow(x, self.lora_prototypes[adapter], router.top_k, router.temperature)
        elif router.site == "module":
            assert isinstance(router, LoraFlow)
            weight, bias = self.lora_gate[adapter], self.lora_gate_bias[adapter]
            whole = x if x.dim() == 3 else x[:, None]
            found = Coefficients(gate(whole, weight, bias, router.temperature))
        else:
            place = "prompt" if isinstance(router, PromptRouter) else self.place
            if getattr(router, "per", "") == "model":  # the first layer's of its stack
                place = f"{self.place.rpartition('.')[0]}.0"
            found = self.flow.read(place, adapter, self.name)
        if rows is not None:
            found = found.rows(rows, of)
        if self.flow.watched is not None:
            self.flow.watched(adapter, self.name, found)
        return found

    def _check_rowless(self) -> None:
        """See that nothing is told row by row where some of a batch's tokens arrive."""
        given = any(c.values.dim() > 1 for c in self.flow.given.values())
        if given or self.flow.names is not None:
            raise RowsMerged(
                f"{self.name} is in an expert of its layer and gets some of a batch's tokens, so "
                "rows cannot be told apart there",
                hint="leave this module out of the adapters' target_modules",
            )

    def _constants(self, adapter: str, router: Constant, device: torch.device) -> Coefficients:
        kept, dtype = self._constant.get(adapter), self.lora_A[adapter].weight.dtype
        if kept is None or kept.values.device != device or kept.values.dtype != dtype:
            with torch.inference_mode(False):
                values = torch.tensor(router.coefficients, device=device, dtype=dtype)
            kept = self._constant[adapter] = Coefficients(values)
        return kept

    def _experts(self, adapter: str) -> Experts:
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        kept = self._ready.get(adapter)
        # Loading may put other parameters in; moving a model changes the device of the same.
        if kept is None or kept.a is not a or kept.b is not b or kept.device != a.device:
            ranks = self.mixtures[adapter].ranks_on(self.name)
            kept = self._ready[adapter] = Experts(a, b, ranks, self.name)
        return kept


class GateLayer(_Frozen):
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
        _moved(self, adapter_name, device or where)

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
