"""Adapters taken apart for MixLoRA: what becomes an expert, and what the attention gets.

An adapter's deltas on a layer's feed-forward module are one expert of that layer. Those on its
other modules are summed up, with coefficients that are the same for all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorahub_registry.adapters.config import MAX_RANK
from lorahub_registry.adapters.mixlora import LoraPart, MixLora, TopK
from lorahub_registry.adapters.mixlora_keys import gate_name
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.recipes.mixlora import MixLora as Method
from lorahub_registry.runtime.linear import fans
from lorahub_registry.runtime.mixlora_plan import Plan, activation_of, plan_of
from lorahub_registry.runtime.mlp import decoder_layers, mlp_of
from lorahub_registry.runtime.places import width_of
from lorahub_registry.weights.files import DTYPES
from lorahub_registry.weights.lowrank import Deltas, LowRank, same_shape, weighted_sum
from lorahub_registry.weights.truncate import truncate

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Site:
    """One module that the mixture changes.

    Attributes:
        layer: its layer's number.
        stem: what its tensors' native names begin with.
        shape: (fan_out, fan_in) of the deltas on it.
        routed: whether it has experts.
    """

    layer: int
    stem: str
    shape: tuple[int, int]
    routed: bool


@dataclass(frozen=True)
class Parts:
    """Adapters as a MixLoRA has them.

    Attributes:
        place: name of the base's list of layers.
        layers: how many have experts.
        sites: module → what it is.
        experts: of each adapter, its deltas on the modules with experts.
        attention: the sum of the others.
    """

    mix: MixLora
    place: str
    layers: int
    sites: Mapping[str, Site]
    experts: tuple[Deltas, ...]
    attention: Deltas

    def layer_name(self, index: int) -> str:
        """A layer's name in the base."""
        return f"{self.place}.{index}"


def take_apart(
    method: Method,
    adapters: Mapping[str, Deltas],
    coefficients: Sequence[float],
    model: Any,
    *,
    base: str | None,
    base_revision: str | None,
    task_type: str,
) -> Parts:
    """Where everything goes.

    Args:
        adapters: by name.
        coefficients: of each adapter's part of the attention.

    Raises:
        IncompatibleAdapters: a module that is no layer's, or that experts have no place for; no
            adapter changes any feed-forward; or the base has none that experts can be put on.
    """
    place, layers = decoder_layers(model)
    for name, deltas in adapters.items():
        for module, delta in deltas.items():
            if delta.kind != "linear" or not module.startswith(f"{place}."):
                what = "is an embedding" if delta.kind == "embedding" else "is in no decoder layer"
                raise IncompatibleAdapters(
                    f"{name}: {module} {what}, and MixLoRA changes modules of the layers alone",
                    hint="leave the adapter out, or mix with fixed coefficients "
                    "(method: {type: learn})",
                )
    inner, mlp = mlp_of(layers[0], model, f"{place}.0")
    there = [module for deltas in adapters.values() for module in deltas]
    targets = {module.rpartition(".")[2] for module in there}
    if not any(f".{inner}.{each}" in f".{module}" for module in there for each in mlp.names):
        raise IncompatibleAdapters(
            f"none of the adapters changes the feed-forward modules ({', '.join(mlp.names)}), and "
            "it is their parts there that become experts",
            hint="take adapters that do, or weigh these by gates (method: {type: lora_flow})",
        )
    mix = MixLora(
        kind="MIXLORA", num_experts=len(adapters), routing=TopK(method.top_k),
        attention=LoraPart(1, 1), experts=LoraPart(1, 1), target_modules=tuple(sorted(targets)),
        router_loss=method.router_aux_loss_coef > 0,
        router_aux_loss_coef=method.router_aux_loss_coef,
        router_init_range=method.router_init_range, base=base, revision=base_revision,
        task_type=task_type,
    )  # fmt: skip
    plan = plan_of(model, mix)
    routed = {
        f"{module}.{name}": index
        for module, (index, mlp) in plan.experts.items()
        for name in mlp.names
        if name in targets
    }
    for name, deltas in adapters.items():
        for module in deltas:
            if module not in routed and module not in plan.plain:
                raise IncompatibleAdapters(
                    f"{name}: {module} is no part of what MixLoRA can change in its layer",
                    hint="leave the adapter out, or weigh it by gates (method: {type: lora_flow})",
                )
    sites = _sites(routed, plan, adapters, model)
    experts = tuple({n: d for n, d in each.items() if n in routed} for each in adapters.values())
    others = [{n: d for n, d in each.items() if n not in routed} for each in adapters.values()]
    # Many adapters' ranks may be more than the module has.
    attention = {
        name: truncate(delta, rank=min(delta.shape)).delta
        if delta.rank > min(delta.shape)
        else delta
        for name, delta in weighted_sum(others, coefficients).items()
    }
    rank = _rank(each for deltas in experts for each in deltas.values())
    beside = _rank(attention.values())
    made = replace(
        mix,
        attention=LoraPart(beside, beside),
        experts=LoraPart(rank, rank),
        act_fn=activation_of((mlp for _, mlp in plan.experts.values()), model),
    )
    return Parts(made, place, len(plan.experts), sites, experts, attention)


def tensors_of(parts: Parts, model: Any, *, dtype: str, seed: int, trains: bool) -> Tensors:
    """Everything by its native name: routers as they start, in float32, the rest in ``dtype``.

    What an adapter does not change has an expert of zeros. Smaller ranks are filled up so that
    nothing changes: both factors with zeros, or, where experts are trained, B with zeros and A as
    LoRA starts it, for two zeros have no gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    wanted = DTYPES[dtype]
    for layer in sorted({site.layer for site in parts.sites.values() if site.routed}):
        gate = torch.randn(parts.mix.num_experts, width_of(model), generator=generator)
        found[gate_name(layer)] = gate * parts.mix.router_init_range
    for module, site in parts.sites.items():
        if not site.routed:
            rank = parts.mix.attention.r
            _put(found, site.stem, parts.attention.get(module), site, rank, wanted, None)
            continue
        for e, expert in enumerate(parts.experts):
            stem, rank = f"{site.stem}.experts.{e}", parts.mix.experts.r
            own = generator if trains else None
            _put(found, stem, expert.get(module), site, rank, wanted, own)
    return found


def experts_in(parts: Parts, tensors: Mapping[str, torch.Tensor]) -> tuple[Deltas, ...]:
    """The experts that ``tensors`` hold, on those modules that their adapters change or that
    training gave them."""
    found = []
    for e in range(parts.mix.num_experts):
        own = {}
        for module, site in parts.sites.items():
            if site.routed:
                a = tensors[f"{site.stem}.experts.{e}.lora_A.weight"].float()
                b = tensors[f"{site.stem}.experts.{e}.lora_B.weight"].float()
                if a.any() and b.any():
                    own[module] = LowRank(a, b)
        found.append(own)
    return tuple(found)


def _sites(
    routed: Mapping[str, int], plan: Plan, adapters: Mapping[str, Deltas], model: Any
) -> dict[str, Site]:
    found: dict[str, Site] = {}
    for module in sorted({*routed, *plan.plain}):
        number = module.removeprefix(f"{plan.place}.").partition(".")[0]
        there = [deltas[module] for deltas in adapters.values() if module in deltas]
        same_shape(module, *there)
        shape = there[0].shape if there else fans(model.get_submodule(module))[::-1]
        found[module] = Site(int(number), plan.stems[module], shape, module in routed)
    return found


def _rank(deltas: Any) -> int:
    """The largest of them; 1 of none.

    Raises:
        IncompatibleAdapters: it is more than a config may say.
    """
    rank = max((delta.rank for delta in deltas), default=1)
    if rank > MAX_RANK:
        raise IncompatibleAdapters(
            f"the adapters' ranks add up to {rank}, and {MAX_RANK} is the most",
            hint="take fewer adapters, or resize them (lorareg resize)",
        )
    return int(rank)


def _put(
    found: Tensors, stem: str, delta: LowRank | None, site: Site, rank: int, dtype: torch.dtype,
    trains: torch.Generator | None,
) -> None:  # fmt: skip
    fan_out, fan_in = site.shape
    a, b = torch.zeros(rank, fan_in), torch.zeros(fan_out, rank)
    if trains is not None:
        bound = 1 / math.sqrt(fan_in)
        a.uniform_(-bound, bound, generator=trains)
    if delta is not None:
        a[: delta.rank], b[:, : delta.rank] = delta.a, delta.b
    found[f"{stem}.lora_A.weight"] = a.to(dtype)
    found[f"{stem}.lora_B.weight"] = b.to(dtype)
