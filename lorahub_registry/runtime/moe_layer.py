"""MixLoRA's experts on one feed-forward module of a loaded model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional

from lorahub_registry.adapters.mixlora import MixLora, Switch
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.flow import NO_BACKWARD
from lorahub_registry.runtime.linear import apply_to_base, fans, weight_of
from lorahub_registry.runtime.mixture import RowsMerged
from lorahub_registry.runtime.mlp import Mlp
from lorahub_registry.runtime.moe import (
    Chosen,
    ExpertFactors,
    MoeExperts,
    combined,
    logits_of,
    route,
)
from lorahub_registry.runtime.moe_flow import MoeFlow

MERGE = (
    "MixLoRA cannot be merged: which experts a token sees depends on the token, and they stand on "
    "both sides of the activation"
)


class ExpertsOf(nn.Module):
    """One adapter's parameters on one feed-forward module: ``gate``, and of each projection ``_A``
    [experts, rank, fan_in], ``_B`` [experts, rank, fan_out] and, of DoRA, ``_magnitude``
    [experts, fan_out]. Float32. ``gaussian``: A starts normal, of deviation 1 / rank, as PEFT's."""

    def __init__(self, mlp: Mlp, mix: MixLora, *, gaussian: bool = False) -> None:
        super().__init__()
        part, count = mix.experts, mix.num_experts
        wide = torch.float32
        self.gate = nn.Parameter(torch.empty(count, mlp.width[0], dtype=wide))
        nn.init.normal_(self.gate, std=mix.router_init_range)
        self.names = [name for name in mlp.names if name in mix.target_modules]
        for name in self.names:
            weight = mlp.linear(name)
            fan_in, fan_out = fans(weight)
            a = nn.Parameter(torch.empty(count, part.r, fan_in, dtype=wide))
            if gaussian:
                nn.init.normal_(a, std=1 / part.r)
            else:
                nn.init.uniform_(a, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
            setattr(self, f"{name}_A", a)
            b = nn.Parameter(torch.zeros(count, part.r, fan_out, dtype=wide))
            setattr(self, f"{name}_B", b)
            if part.use_dora:
                norms = torch.empty(fan_out, dtype=wide)
                if norms.device.type != "meta":
                    norms = weight_of(weight).norm(dim=1).cpu()
                setattr(self, f"{name}_magnitude", nn.Parameter(norms.repeat(count, 1)))

    def stacks(self) -> dict[str, ExpertFactors]:
        """As the operator takes them."""
        return {
            name: ExpertFactors(
                getattr(self, f"{name}_A"),
                getattr(self, f"{name}_B"),
                getattr(self, f"{name}_magnitude", None),
            )
            for name in self.names
        }


class MoeLayer(nn.Module, BaseTunerLayer):
    """A feed-forward module with the experts of one or more adapters in it.

    Attributes:
        place, index: name of the decoder layers' list, and which of them this is in.
        awaited: adapters whose tensors have yet to be loaded.
    """

    adapter_layer_names: tuple[str, ...] = ("lora_experts",)
    other_param_names: tuple[str, ...] = ("mixes", "mlps")
    active_adapters: Any  # PEFT's, which mypy does not see
    set_adapter: Any

    def __init__(self, mlp: Mlp, flow: MoeFlow, place: str, index: int) -> None:
        super().__init__()
        self.base_layer: Any = mlp.module
        self.flow, self.place, self.index = flow, place, index
        self.plain, self.mlps = mlp, dict[str, Mlp]()
        self.mixes: dict[str, MixLora] = {}
        self.lora_experts = nn.ModuleDict()
        self.awaited: set[str] = set()
        self.merged_adapters: list[str] = []

    @property
    def weight(self) -> torch.Tensor:
        """None: what it wraps is several modules."""
        raise AttributeError("a feed-forward module has no single weight")

    @property
    def bias(self) -> torch.Tensor:
        """None, as ``weight``."""
        raise AttributeError("a feed-forward module has no single bias")

    def update_layer(
        self, adapter: str, mix: MixLora, *, inference_mode: bool, gaussian: bool = False
    ) -> None:
        """Make room for an adapter's experts."""
        self.mixes[adapter] = mix
        self.mlps[adapter] = self.plain.acting(mix.act_fn)
        self.lora_experts[adapter] = ExpertsOf(self.plain, mix, gaussian=gaussian)
        if inference_mode:
            self.awaited.add(adapter)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the experts give, or the base for rows that have none: [rows, positions, width]."""
        found: torch.Tensor
        if self.disable_adapters:
            found = self.base_layer(x)
            return found
        shares = self.flow.shares(x.shape[0], self.active_adapters)
        shares = [(name, rows) for name, rows in shares if name in self.lora_experts]
        if not shares:
            found = self.base_layer(x)
            return found
        if shares[0][1] is None:
            if len(shares) > 1:
                raise IncompatibleAdapters(
                    f"{', '.join(name for name, _ in shares)} are active together, and the experts "
                    "of two MixLoRA adapters cannot be added up",
                    hint="set_adapter to one of them, or give adapter_names row by row",
                )
            return self._mixed(shares[0][0], x, None)
        if x.dim() != 3:
            raise RowsMerged(
                f"layer {self.index}'s feed-forward gets its rows as {tuple(x.shape[:-1])}, so "
                "they cannot have adapters of their own",
                hint="give all rows the same adapter",
            )
        found = self.base_layer(x)
        for name, rows in shares:
            assert rows is not None
            here = rows.to(x.device)
            found = found.index_copy(0, here, self._mixed(name, x[here], here))
        return found

    # How many tokens come to an expert is not known while torch.compile makes a graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _mixed(self, adapter: str, x: torch.Tensor, which: torch.Tensor | None) -> torch.Tensor:
        """One adapter's experts on rows of its own.

        Args:
            which: the rows' numbers in the batch; None: these are all.
        """
        if adapter in self.awaited:
            raise IncompatibleAdapters(
                f"the experts of {adapter!r} were never loaded: transformers' load_adapter does "
                "not know how MixLoRA files are laid out",
                hint="load it with PeftModel.from_pretrained(base, …)",
            )
        mix, held, mlp = self.mixes[adapter], self.lora_experts[adapter], self.mlps[adapter]
        assert isinstance(held, ExpertsOf)
        switch = isinstance(mix.routing, Switch)
        if switch and x.dim() != 3:
            raise RowsMerged(
                f"layer {self.index}'s feed-forward gets its rows as {tuple(x.shape[:-1])}, and "
                "switch routing counts each row's tokens",
                hint="this base takes the other routings",
            )
        flat, gate = x.reshape(-1, x.shape[-1]), held.gate
        seen = flat
        if self.training and mix.jitter_noise:
            noise = torch.empty_like(flat).uniform_(1 - mix.jitter_noise, 1 + mix.jitter_noise)
            seen = flat * noise
            flat = flat if switch else seen  # switch shakes what the router sees alone
        logits = logits_of(seen, gate)
        real = self._real(which, flat)
        experts = MoeExperts(gate, held.stacks(), mix.experts.scaling, mix.experts.lora_dropout)
        if switch:
            chosen = self._by_room(adapter, mix, logits, len(x), real)
        else:
            chosen = route(logits, mix.routing)
        found = combined(mlp, experts, flat, chosen, dropout=self.training)
        if isinstance(mix.routing, Switch) and self.training and mix.routing.dropout:
            found = functional.dropout(found, mix.routing.dropout)
        self._note(adapter, logits, chosen, real, learns=gate.requires_grad)
        return found.view(x.shape)

    def _real(self, which: torch.Tensor | None, flat: torch.Tensor) -> torch.Tensor | None:
        real = self.flow.real
        if torch._C._current_graph_task_id() != NO_BACKWARD:
            switches = any(isinstance(mix.routing, Switch) for mix in self.mixes.values())
            real = self.flow.again() if switches else None
        if real is not None and which is not None and which.max() < len(real):
            real = real[which.to(real.device)]
        if real is None or real.numel() != len(flat):
            return None
        return real.flatten().to(flat.device)

    def _by_room(
        self, adapter: str, mix: MixLora, logits: torch.Tensor, rows: int,
        real: torch.Tensor | None,
    ) -> Chosen:  # fmt: skip
        again = torch._C._current_graph_task_id() != NO_BACKWARD
        if not (self.flow.within or again):
            raise IncompatibleAdapters(
                f"layer {self.index} was called apart from its model, which tells it what is "
                "padding and what the cache holds",
                hint="call the whole model, not one of its parts",
            )
        if self.flow.padded:
            raise IncompatibleAdapters(
                "switch routing counts each row's tokens, and this attention mask does not tell "
                "tokens from padding",
                hint="give one of [rows, positions], or generate with the dynamic cache",
            )
        key = adapter, self.index
        taken = self.flow.taken(key, rows)
        chosen = route(logits, mix.routing, rows=rows, real=real, seen=taken)
        hot = functional.one_hot(logits.argmax(-1), mix.num_experts)
        hot = hot if real is None else hot * real[:, None]
        now = hot.view(rows, -1, mix.num_experts).sum(1)
        self.flow.room[key] = now if taken is None else taken + now
        return chosen

    def _note(
        self, adapter: str, logits: torch.Tensor, chosen: Chosen, real: torch.Tensor | None,
        *, learns: bool,
    ) -> None:  # fmt: skip
        if torch._C._current_graph_task_id() != NO_BACKWARD:
            return  # checkpointing computes again what was noted
        if self.flow.collects:
            self.flow.logits[adapter, self.index] = logits
            if learns:
                self.flow.learning.add((adapter, self.index))
        if self.flow.seen is not None:
            self.flow.seen(adapter, self.index, logits.detach(), chosen, real)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        where = device or next(self.base_layer.parameters()).device
        for value in self.lora_experts[adapter_name].parameters():
            if value.device.type != "meta":
                value.data = value.data.to(where)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        apply_to_base(self, fn, recurse)
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        self.awaited.discard(adapter_name)
        self.flow.forget(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            ValueError: always, as PEFT's own layers do that cannot be merged.
        """
        raise ValueError(MERGE)

    def unmerge(self) -> None:
        """Nothing was merged."""


def layers_of(model: nn.Module) -> Iterator[tuple[str, MoeLayer]]:
    """(name, layer) of all that have experts."""
    for name, module in model.named_modules():
        if isinstance(module, MoeLayer):
            yield name, module
