"""What wraps each adapted module where a dynamic mixture is loaded: a PEFT tuner layer.

Coefficients that are not decided in the module itself are read from what the gate of its decoder
layer has decided (:mod:`lorahub_registry.runtime.gate_layer`). Whatever lives in both is keyed by
PEFT's adapter name, so that several mixtures can be loaded at once, each with its own experts.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn

from lorahub_registry.adapters.dynamic import Arrow, Constant, Dynamic, LoraFlow, PromptRouter
from lorahub_registry.runtime.flow import Flow
from lorahub_registry.runtime.linear import apply_to_base
from lorahub_registry.runtime.mixture import Coefficients, Experts, RowsMerged, turned
from lorahub_registry.runtime.routers import arrow, gate


class Frozen(nn.Module, BaseTunerLayer):
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
        apply_to_base(self, fn, recurse)
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: which experts speak changes from token to token.

        Raises:
            ValueError: always, as PEFT's own layers do that cannot be merged.
        """
        raise ValueError(MERGE)

    def unmerge(self) -> None:
        """Nothing was merged."""


def move(layer: Any, adapter: str, device: torch.device) -> None:
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


class MixtureLayer(Frozen):
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
        a = self.lora_A[adapter] = nn.Linear(self.in_features, sum(ranks), bias=False)
        b = self.lora_B[adapter] = nn.Linear(sum(ranks), self.out_features, bias=False)
        nn.init.zeros_(b.weight)
        for factor in (a, b):  # loading copies into what is here
            factor.weight.data = turned(factor.weight.data)
        if isinstance(mixture.router, LoraFlow) and mixture.router.site == "module":
            self.lora_gate[adapter] = torch.zeros(len(ranks), self.in_features)
            self.lora_gate_bias[adapter] = torch.zeros(len(ranks))
        if isinstance(mixture.router, Arrow):
            self.lora_prototypes[adapter] = torch.zeros(len(ranks), self.in_features)
        self._register(adapter, mixture)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)
        # Made here, as torch.compile would make a graph for each module's name and its ranks.
        self._ready[adapter] = Experts(a.weight, b.weight, ranks, self.name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the base gives, with each row's experts added."""
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.flow.silent:
            return y
        if self.in_experts:
            self._check_rowless()
        for adapter, rows in self.flow.shares(x.shape[0], self.active_adapters):
            if adapter not in self.mixtures:
                continue
            rows = None if rows is None else rows.to(x.device)
            experts, c = self._experts(adapter), self._coefficients(adapter, x, rows)
            if rows is None:
                y = experts.add(y, x, c)
            else:
                y = y.index_copy(0, rows, experts.add(y[rows], x[rows], c))
        return y

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        where, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is not None or where is not None:
            move(self, adapter_name, device or where)

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
        kept = self._ready[adapter]
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if kept.a is not a or kept.b is not b:  # loading may put in others
            kept.a, kept.b = a, b
        return kept
