"""Which modules of a base become what when MixLoRA is put on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.activations import ACT2FN

from lorahub_registry.adapters.mixlora import MixLora
from lorahub_registry.adapters.mixlora_keys import native_stem
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.linear import fans, is_trainable
from lorahub_registry.runtime.mlp import Mlp, decoder_layers, mlp_of
from lorahub_registry.runtime.moe_layer import MoeLayer


@dataclass(frozen=True)
class Plan:
    """Which modules of a base get what: by full names.

    Attributes:
        place: name of the base's list of layers.
        experts: feed-forward module → its layer's number, and how it computes.
        plain: linear modules with LoRA.
        stems: linear module, with experts or LoRA → what its tensors' names in a file begin with.
    """

    place: str
    experts: dict[str, tuple[int, Mlp]]
    plain: frozenset[str]
    stems: dict[str, str]


def plan_of(model: Any, mix: MixLora) -> Plan:
    """Which modules of a base get what.

    Raises:
        IncompatibleAdapters: the base has no place for it, says what was found; or two of its
            modules would have one name in a file.
    """
    place, layers = decoder_layers(model)
    experts: dict[str, tuple[int, Mlp]] = {}
    plain: set[str] = set()
    stems: dict[str, str] = {}
    caught: set[str] = set()
    for index, layer in enumerate(layers):
        name = f"{place}.{index}"
        inner, mlp = _mlp(layer, model, name)
        mlp.acting(mix.act_fn)  # known before anything is changed
        routed = isinstance(layer.get_submodule(inner), MoeLayer)
        inside = {f"{inner}.{'base_layer.' * routed}{each}" for each in mlp.names}
        wanted = _linear(layer)
        here = {path for path, last in wanted.items() if last in mix.target_modules}
        routed_here: list[str] = []
        caught |= {wanted[path] for path in here}
        if here & inside and mix.has_experts(index):
            experts[f"{name}.{inner}"] = index, mlp
            here -= inside
            routed_here = [f"{name}.{inner}.{each}" for each in adapted(mlp, mix)]
        elif here & inside and routed:
            raise _sparse(name)
        plain |= {f"{name}.{path}" for path in here}
        for module in (*routed_here, *sorted(f"{name}.{path}" for path in here)):
            stems[module] = stem_of(module, place, inner)
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
    check_stems(stems)
    return Plan(place, experts, frozenset(plain), stems)


def stem_of(module: str, place: str, inner: str, prefix: str = "mixlora") -> str:
    """What the names of a linear module's tensors in a file begin with.

    Args:
        module: its name in the model, whatever stands before ``place``.
        place: name of the base's list of layers.
        inner: the feed-forward module's name in a layer.
    """
    index, _, rest = module.rpartition(f"{place}.")[2].partition(".")
    part = "mlp" if rest.startswith(f"{inner}.") else "self_attn"
    return native_stem(index, part, rest.rpartition(".")[2], prefix)


def check_stems(stems: Mapping[str, str]) -> None:
    """Whether files have a name for each module: they know the last part of its name alone.

    Args:
        stems: module → what its tensors' names begin with.

    Raises:
        IncompatibleAdapters: two have the same.
    """
    first: dict[str, str] = {}
    for module, stem in stems.items():
        if (other := first.setdefault(stem, module)) != module:
            last = stem.rpartition(".")[2]
            raise IncompatibleAdapters(
                f"{other} and {module} have one name in m-LoRA's files ({stem})",
                hint=f"leave {last} out of target_modules; adapters that are there already can be "
                "weighed by gates instead (method: {type: lora_flow})",
            )


def activation_of(mlps: Iterable[Mlp], model: Any) -> str | None:
    """The name of the activation that all these feed-forward modules have, without which the
    package ``mixlora`` computes nothing; None where transformers has none for it."""
    config, acts = model.config.get_text_config(), {type(mlp.act) for mlp in mlps}
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        name = getattr(config, key, None)
        if isinstance(name, str) and name in ACT2FN and {type(ACT2FN[name])} == acts:
            return name
    return None


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
