"""Which modules of a base become what when MixLoRA is put on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from lorahub_registry.adapters.mixlora import MixLora
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.linear import fans, is_trainable
from lorahub_registry.runtime.mlp import Mlp, decoder_layers, mlp_of
from lorahub_registry.runtime.moe_layer import MoeLayer


@dataclass(frozen=True)
class Plan:
    """Which modules of a base get what: by full names."""

    place: str
    experts: dict[str, tuple[int, Mlp]]
    plain: frozenset[str]


def plan_of(model: Any, mix: MixLora) -> Plan:
    """Which modules of a base get what.

    Raises:
        IncompatibleAdapters: the base has no place for it; says what was found.
    """
    place, layers = decoder_layers(model)
    experts: dict[str, tuple[int, Mlp]] = {}
    plain: set[str] = set()
    caught: set[str] = set()
    for index, layer in enumerate(layers):
        name = f"{place}.{index}"
        inner, mlp = _mlp(layer, model, name)
        mlp.acting(mix.act_fn)  # known before anything is changed
        routed = isinstance(layer.get_submodule(inner), MoeLayer)
        inside = {f"{inner}.{'base_layer.' * routed}{each}" for each in mlp.names}
        wanted = _linear(layer)
        here = {path for path, last in wanted.items() if last in mix.target_modules}
        caught |= {wanted[path] for path in here}
        if here & inside and mix.has_experts(index):
            experts[f"{name}.{inner}"] = index, mlp
            here -= inside
        elif here & inside and routed:
            raise _sparse(name)
        plain |= {f"{name}.{path}" for path in here}
    if absent := sorted(set(mix.target_modules) - caught):
        raise IncompatibleAdapters(
            f"target_modules: the layers of this base have no linear module {absent[0]!r}",
            hint=f"its layers have {', '.join(sorted({*wanted.values()}))}",
        )
    if not experts:
        raise IncompatibleAdapters(
            f"target_modules {', '.join(mix.target_modules)} name nothing of the feed-forward "
            f"module ({', '.join(mlp.names)}), so there is nothing to make experts of",
            hint="name at least one of them",
        )
    return Plan(place, experts, frozenset(plain))


def all_linear(model: Any) -> tuple[str, ...]:
    """The last parts of the names of the linear modules in the decoder's layers."""
    _, layers = decoder_layers(model)
    return tuple(sorted({last for layer in layers for last in _linear(layer).values()}))


def _linear(layer: nn.Module) -> dict[str, str]:
    """Linear module of a layer → the last part of its name, also where adapters stand."""
    return {
        path: path.rpartition(".")[2]
        for path, module in layer.named_modules()
        if (is_trainable(module) or isinstance(module, LoraLayer))
        and not path.endswith(".base_layer")
        and ".lora_" not in path
    }


def _mlp(layer: nn.Module, model: Any, where: str) -> tuple[str, Mlp]:
    known = next(((n, m) for n, m in layer.named_modules() if isinstance(m, MoeLayer)), None)
    if known:
        return known[0], known[1].plain
    try:
        return mlp_of(layer, model, where)
    except IncompatibleAdapters:
        if any(isinstance(m, LoraLayer) for m in layer.modules()):  # on the feed-forward module
            raise _sparse(where) from None
        raise


def _sparse(where: str) -> IncompatibleAdapters:
    return IncompatibleAdapters(
        f"{where}: an adapter has plain LoRA there in place of experts (sparse_step), and no "
        "other can stand beside it",
        hint="load each of them on a base of its own",
    )


def adapted(mlp: Mlp, mix: MixLora) -> list[str]:
    """The feed-forward's linear modules that experts adapt."""
    return [name for name in mlp.names if name in mix.target_modules]


def expert_sizes(mix: MixLora, plan: Plan) -> dict[str, int]:
    """How many numbers the experts have: ``expert_a``, ``expert_b``, ``expert_magnitude``,
    ``gate``."""
    sizes = dict.fromkeys(("expert_a", "expert_b", "expert_magnitude", "gate"), 0)
    for _, mlp in plan.experts.values():
        sizes["gate"] += mix.num_experts * mlp.width[0]
        for name in adapted(mlp, mix):
            fan_in, fan_out = fans(mlp.linear(name))
            sizes["expert_a"] += mix.num_experts * mix.experts.r * fan_in
            sizes["expert_b"] += mix.num_experts * mix.experts.r * fan_out
            sizes["expert_magnitude"] += mix.experts.use_dora * mix.num_experts * fan_out
    return sizes
