"""The trained numbers of a mixture of experts: MixLoRA's, in one buffer as other adapters' are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorahub_registry.adapters.mixlora import (
    LoraPart,
    MixLora,
    Routing,
    Switch,
    TopK,
    TopP,
)
from lorahub_registry.adapters.mixlora_keys import gate_name
from lorahub_registry.recipes.expert_training import MixLoraTraining
from lorahub_registry.recipes.factory import AdapterPlan
from lorahub_registry.recipes.training import ALL_LINEAR, LoraOptions
from lorahub_registry.runtime.grouped_experts import LayerExperts
from lorahub_registry.runtime.linear import fans, weight_of
from lorahub_registry.runtime.mixlora_plan import (
    activation_of,
    adapted,
    all_linear,
    expert_sizes,
    plan_of,
)
from lorahub_registry.runtime.moe import ExpertFactors, MoeExperts
from lorahub_registry.train.parameters import Parameters

_ROUTER_STD = {"mixlora-switch": 1.0}


def parameters_of(plan: AdapterPlan, model: nn.Module, seed: int) -> Parameters:
    """A fresh adapter as ``plan`` has it.

    Raises:
        IncompatibleAdapters: the base has no place for it.
    """
    if plan.method is None:
        return Parameters(model, plan.lora, seed)
    return ExpertParameters(model, plan, seed)


def mix_of(plan: AdapterPlan, model: Any) -> MixLora:
    """What ``plan`` asks for, on this base."""
    method = plan.method
    assert method is not None
    lora = plan.lora
    outer = LoraPart(lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_dora, lora.use_rslora)
    own = {k: v for k, v in method.expert_lora.model_dump().items() if v is not None}
    routing, strategy = _routing(method), method.routing_strategy
    switch = isinstance(routing, Switch)
    return MixLora(
        kind="MIXLORA",
        num_experts=method.num_experts,
        routing=routing,
        attention=outer,
        experts=replace(outer, **own),
        target_modules=all_linear(model)
        if lora.target_modules == ALL_LINEAR
        else tuple(sorted(lora.target_modules)),
        act_fn=method.act_fn,
        router_loss=method.router_loss,
        router_aux_loss_coef=method.router_aux_loss_coef,
        router_z_loss_coef=_or(method.router_z_loss_coef, 0.001),
        router_init_range=_or(method.router_init_range, _ROUTER_STD.get(strategy, 0.02)),
        jitter_noise=_or(method.jitter_noise, 0.01 if switch else 0.0),
    )


class ExpertParameters(Parameters):
    """The trained numbers of one MixLoRA adapter: see :class:`Parameters`.

    Attributes:
        mix: what its config says.
        experts: feed-forward module → its experts, leaf tensors that are views of ``flat``, with
            their gradients in ``grad``.
    """

    def __init__(self, model: Any, plan: AdapterPlan, seed: int) -> None:
        mix = mix_of(plan, model)
        where = plan_of(model, mix)
        own = activation_of((mlp for _, mlp in where.experts.values()), model)
        self.mix = mix = replace(mix, act_fn=mix.act_fn or own)
        self._stems = where.stems
        super().__init__(
            model, plan.lora, seed, names=sorted(where.plain), more=expert_sizes(mix, where)
        )
        at = {part: span.start for part, span in self.parts.items()}
        generator = torch.Generator().manual_seed(seed + 1)

        def leaf(part: str, *shape: int) -> torch.Tensor:
            span = slice(at[part], at[part] + math.prod(shape))
            at[part] = span.stop
            found = nn.Parameter(self.flat[span].view(shape))
            found.grad = self.grad[span].view(shape)
            return found

        count, rank = mix.num_experts, mix.experts.r
        for name, (index, mlp) in sorted(where.experts.items(), key=lambda item: item[1][0]):
            gate = leaf("gate", count, mlp.width[0])
            drawn = torch.empty(gate.shape).normal_(std=mix.router_init_range, generator=generator)
            gate.data.copy_(drawn)
            stacks = {}
            for proj in adapted(mlp, mix):
                fan_in, fan_out = fans(mlp.linear(proj))
                a = leaf("expert_a", count, rank, fan_in)
                _draw(a, plan.lora, rank, generator)
                b, magnitude = leaf("expert_b", count, rank, fan_out), None
                if mix.experts.use_dora:
                    magnitude = leaf("expert_magnitude", count, fan_out)
                    magnitude.data.copy_(weight_of(mlp.linear(proj)).norm(dim=1))
                stacks[proj] = ExpertFactors(a, b, magnitude)
            experts = MoeExperts(gate, stacks, mix.experts.scaling, mix.experts.lora_dropout)
            self.experts[name] = LayerExperts(index, mlp.acting(mix.act_fn), experts, mix)

    def native(self) -> dict[str, torch.Tensor]:
        """Its tensors by m-LoRA's names, float32 on the CPU."""
        found = {}
        for module, parts in self.written().items():
            for part, tensor in parts.items():
                found[f"{self._stems[module]}.lora_{part}"] = tensor
        for module, layer in self.experts.items():
            found[gate_name(layer.index)] = _plain(layer.experts.gate)
            for proj, stack in layer.experts.stacks.items():
                for e in range(self.mix.num_experts):
                    each = f"{self._stems[f'{module}.{proj}']}.experts.{e}"
                    found[f"{each}.lora_A.weight"] = _plain(stack.a[e])
                    found[f"{each}.lora_B.weight"] = _plain(stack.b[e].T)
                    if stack.magnitude is not None:
                        found[f"{each}.lora_magnitude_vector"] = _plain(stack.magnitude[e])
        return found


def _routing(method: MixLoraTraining) -> Routing:
    if method.routing_strategy == "mixlora-dynamic":
        return TopP(_or(method.top_p, 0.8))
    if method.routing_strategy == "mixlora-switch":
        return Switch(method.expert_capacity or 32, _or(method.ffn_dropout, 0.0))
    return TopK(method.top_k or 2)


def _draw(a: torch.Tensor, lora: LoraOptions, rank: int, generator: torch.Generator) -> None:
    drawn = torch.empty(a.shape)
    if lora.init_lora_weights == "gaussian":
        drawn.normal_(std=1 / rank, generator=generator)
    else:
        bound = 1 / math.sqrt(a.shape[-1])
        drawn.uniform_(-bound, bound, generator=generator)
    a.data.copy_(drawn)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
