"""What MixLoRA, LoRAMoE and MoLA have, from their config and their modules' shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.facts import read_config, read_facts
from lorahub_registry.adapters.mixlora import (
    KINDS,
    LoraPart,
    MixLora,
    Switch,
    TopK,
    TopP,
    parse_mixlora,
)
from lorahub_registry.adapters.mixlora_keys import INWARD, OUTWARD

Modules = Sequence[Mapping[str, Any]]


def of_folder(folder: Path) -> dict[str, Any] | None:
    """:func:`of_mix` of the adapter in ``folder``; None where it is of another kind.

    Raises:
        AdapterError: see :func:`lorahub_registry.adapters.facts.read_facts`.
    """
    config = read_config(folder)
    if config.peft_type not in KINDS:
        return None
    modules = [asdict(module) for module in read_facts(folder).modules]
    return of_mix(
        parse_mixlora(config.raw, str(folder / CONFIG_NAME)),
        [{**module, "in": module["fan_in"], "out": module["fan_out"]} for module in modules],
    )


def of_mix(mix: MixLora, modules: Modules = ()) -> dict[str, Any]:
    """What ``show --json`` and a card's facts hold of experts.

    Args:
        modules: as the registry has them; without any, widths and layers are unknown.
    """
    routing = mix.routing
    chooses: dict[str, Any] = {}
    if isinstance(routing, TopK):
        chooses = {"top_k": routing.k}
    elif isinstance(routing, TopP):
        chooses = {"top_p": routing.p, "temperature": routing.temperature}
    elif isinstance(routing, Switch):
        chooses = {"expert_capacity": routing.capacity, "sparse_step": routing.sparse_step,
                   "router_z_loss_coef": mix.router_z_loss_coef,
                   "ffn_dropout": routing.dropout}  # fmt: skip
    hidden, inner = _widths(modules)
    return {
        "num_experts": mix.num_experts,
        "routing_strategy": mix.strategy,
        **chooses,
        "router_loss": mix.router_loss,
        "router_aux_loss_coef": mix.router_aux_loss_coef,
        "act_fn": mix.act_fn,
        "experts": _part(mix.experts),
        "attention": _part(mix.attention) if _attends(mix, modules) else None,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "layers": len({_layer(m) for m in modules}) or None,
        "layers_with_experts": len({_layer(m) for m in modules if m["kind"] == "experts"}) or None,
    }


def told(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What :func:`of_mix` has found, for people."""
    layers = ""
    if some := found["layers_with_experts"]:
        layers = f" in {some} of {found['layers']} layers"
    elif found.get("sparse_step"):
        layers = f" in some layers, or in all (sparse_step {found['sparse_step']})"
    loss = f"{found['router_aux_loss_coef']:g}" if found["router_loss"] else "none"
    if found.get("router_z_loss_coef") and found["router_loss"]:
        loss += f", z loss {found['router_z_loss_coef']:g}"
    attention = found["attention"]
    rows = [
        ("experts", f"{found['num_experts']}{layers}; {_settings(found['experts'])}"),
        ("router", f"{found['routing_strategy']}: {_chooses(found)}"),
        ("router loss", loss),
    ]
    if attention or found["routing_strategy"] == "mola":
        rows.append(("attention", _settings(attention) if attention else "experts there, too"))
    widths = {"hidden": found["hidden_size"], "feed-forward": found["intermediate_size"]}
    if said := ", ".join(f"{name} {width}" for name, width in widths.items() if width):
        rows.append(("base's size", said))
    return rows


def _chooses(found: Mapping[str, Any]) -> str:
    if "top_k" in found:
        return f"the {found['top_k']} likeliest of each token (top_k), their weights normalised"
    if "top_p" in found:
        heat = f", temperature {found['temperature']:g}" if found["temperature"] else ""
        return (
            f"the likeliest of each token up to a probability of {found['top_p']:g} (top_p){heat}"
        )
    if "expert_capacity" in found:
        return (
            "the likeliest of each token, for at most "
            f"{found['expert_capacity']} tokens of a sequence (expert_capacity)"
        )
    return "all of them, weighted by a softmax"


def _attends(mix: MixLora, modules: Modules) -> bool:
    """Whether plain LoRA is in the attention: by the modules, or else by the config."""
    if mix.kind == "MOLA":
        return False
    if modules:
        return any(".self_attn." in str(module["name"]) for module in modules)
    return not set(mix.target_modules) <= INWARD | OUTWARD


def _part(part: LoraPart) -> dict[str, Any]:
    return {
        "r": part.r,
        "lora_alpha": part.lora_alpha,
        "scaling": part.scaling,
        "lora_dropout": part.lora_dropout,
        "use_dora": part.use_dora,
        "use_rslora": part.use_rslora,
    }


def _settings(part: Mapping[str, Any]) -> str:
    kinds = [name for name, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora")) if part[key]]
    said = f"rank {part['r']}, alpha {part['lora_alpha']:g}, scaled by {part['scaling']:g}"
    return ", ".join([said, *kinds])


def _layer(module: Mapping[str, Any]) -> str:
    return str(module["name"]).split(".")[2]


def _widths(modules: Modules) -> tuple[int | None, int | None]:
    """(hidden size, the feed-forward's), by the modules that tell."""
    hidden = inner = None
    for module in modules:
        end = str(module["name"]).rsplit(".", 1)[-1]
        if end in INWARD:
            # Both halves lie in one matrix there.
            hidden, inner = module["in"], module["out"] // (2 if end == "gate_up_proj" else 1)
        elif end in OUTWARD:
            hidden, inner = module["out"], module["in"]
    return hidden, inner
