"""``LORAMOE`` and ``MOLA`` as PEFT types: experts beside single linear modules.

    y = W x + s Σ_e c_e B_e A_e x,    c = softmax(W_g x)

LoRAMoE (arXiv:2312.09979) weighs all experts so, on the feed-forward's modules, with plain LoRA on
the attention's; MoLA (arXiv:2402.08562) takes the ``top_k`` largest, divided by their sum, on all.
Both are what dynamic mixtures run by, with a router of their own. Files keep m-LoRA's names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn

from lorahub_registry.adapters.dynamic import Dynamic, Expert
from lorahub_registry.adapters.mixlora import MixLora, TopK, parse_mixlora, to_config
from lorahub_registry.errors import IncompatibleAdapters, UsageError
from lorahub_registry.runtime.fits import (
    NativeConfig,
    NativeNames,
    injected,
    loading,
    withdraw,
)
from lorahub_registry.runtime.layers import MixtureLayer
from lorahub_registry.runtime.linear import is_trainable
from lorahub_registry.runtime.mixlora_names import native_tensors, nothing_left, take
from lorahub_registry.runtime.mixlora_plan import check_stems, stem_of
from lorahub_registry.runtime.mixture import Coefficients, largest
from lorahub_registry.runtime.mlp import decoder_layers, mlp_of
from lorahub_registry.runtime.moe import logits_of
from lorahub_registry.runtime.peft_type import MixtureModel
from lorahub_registry.runtime.peft_types import member

NEVER_LOADED = (
    "the experts of {!r} were never loaded: transformers' load_adapter does not know how their "
    "files are laid out"
)
LORAMOE, MOLA = member("LORAMOE"), member("MOLA")


@dataclass(frozen=True)
class Softmax:
    """A linear router in each module.

    Attributes:
        top_k: how many speak; None: all.
        scaling: of what all of them say.
    """

    top_k: int | None
    scaling: float
    type: ClassVar[str] = "softmax"
    site: ClassVar[str] = "module"


@dataclass
class PluggedConfig(NativeConfig, PeftConfig):
    """m-LoRA's ``adapter_config.json`` of LoRAMoE or MoLA; see its keys there."""

    r: int = field(default=8, metadata={"help": "Of each expert."})
    lora_alpha: float = field(default=16, metadata={"help": "Over r: the scaling."})
    lora_dropout: float = field(default=0.0, metadata={"help": "It was trained with."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by the root of r."})
    use_dora: bool = field(default=False, metadata={"help": "Refused."})
    target_modules: Any = field(default=None, metadata={"help": "Ends of names."})
    routing_strategy: str | None = field(default=None, metadata={"help": "loramoe or mola."})
    num_experts: int = field(default=8, metadata={"help": "Of each module."})
    top_k: int | None = field(default=None, metadata={"help": "MoLA's."})
    router_init_range: float | None = field(default=None, metadata={"help": "It began with."})
    router_loss: bool | None = field(default=None, metadata={"help": "It was trained with."})
    router_aux_loss_coef: float | None = field(default=None, metadata={"help": "As router_loss."})
    bias: str = field(default="none", metadata={"help": "none."})

    @property
    def mix(self) -> MixLora:
        """It, read and checked."""
        raw = {**vars(self), "peft_type": str(self.peft_type).rpartition(".")[2]}
        if isinstance(raw["target_modules"], set):
            raw["target_modules"] = sorted(raw["target_modules"])
        return parse_mixlora(raw, self.where)

    def to_dict(self) -> dict[str, Any]:
        """m-LoRA's keys, none of them null."""
        return to_config(self.mix)


@dataclass
class LoraMoeConfig(PluggedConfig):
    """LoRAMoE's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORAMOE


@dataclass
class MolaConfig(PluggedConfig):
    """MoLA's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOLA


class PluggedLayer(MixtureLayer):
    """A linear module with its experts and their router, or with plain LoRA.

    Attributes:
        native: what its tensors' names begin with in a file.
        awaited: adapters whose tensors have yet to be loaded.
    """

    def __init__(self, base_layer: nn.Module, flow: Any, name: str, native: str) -> None:
        super().__init__(base_layer, flow, name)
        self.native, self.awaited = native, set[str]()

    def update_layer(self, adapter: str, mixture: Dynamic, *, inference_mode: bool) -> None:
        """Make room for an adapter's tensors."""
        if len(experts := mixture.experts) > 1:
            self.lora_gate[adapter] = torch.zeros(len(experts), self.in_features)
        if inference_mode:
            self.awaited.add(adapter)
        super().update_layer(adapter, mixture, inference_mode=inference_mode)

    def _coefficients(
        self, adapter: str, x: torch.Tensor, rows: torch.Tensor | None
    ) -> Coefficients:
        if adapter in self.awaited:
            raise IncompatibleAdapters(
                NEVER_LOADED.format(adapter), hint="load it with PeftModel.from_pretrained(base, …)"
            )
        router: Any = self.mixtures[adapter].router
        if adapter not in self.lora_gate:
            return Coefficients(self.lora_A[adapter].weight.new_full((1,), router.scaling))
        own = x if rows is None else x[rows]
        own = own if own.dim() == 3 else own[:, None]
        logits = logits_of(own, self.lora_gate[adapter])
        found = Coefficients(logits) if router.top_k is None else largest(logits, router.top_k)
        found = Coefficients(found.values.softmax(-1) * router.scaling, found.which)
        if self.flow.watched is not None:
            self.flow.watched(adapter, self.name, found)
        return found


class PluggedModel(NativeNames, MixtureModel):
    """The base with LoRAMoE's or MoLA's experts beside its modules."""

    tuner_layer_cls: Any = (PluggedLayer,)
    native_prefixes = ("loramoe.", "mola.")

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own; where it fails, the model is left as it was.

        Raises:
            UsageError: it is to be trained.
        """
        config = self.peft_config[adapter_name]
        mix, known = config.mix, bool(_layers(model, adapter_name))
        if not config.inference_mode:
            raise UsageError(
                f"{mix.kind} adapters run here and are not trained",
                hint="load it to run: PeftModel.from_pretrained(base, …) without is_trainable; "
                "training is for MixLoRA (MixLoraConfig, or method: mixlora in a plan)",
            )
        if mix.experts.use_dora or mix.attention.use_dora:
            raise IncompatibleAdapters(
                f"{mix.kind} with DoRA was never saved whole, and cannot be run",
                hint="train it again without use_dora",
            )
        self._mix, self._places = mix, places_of(model, mix)
        try:
            BaseTuner.inject_adapter(self, model, adapter_name, *args, **kwargs)
        except Exception:
            if not known:
                withdraw(model, adapter_name)
            raise
        injected(model, adapter_name, config)

    def _check_target_module_exists(self, _: Any, key: str) -> bool:
        return key in self._places

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str,
        parent: nn.Module, current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        native, routed = self._places[current_key]
        if not isinstance(target, PluggedLayer):
            made = PluggedLayer(target, self._flow, current_key, native)
            self._replace_module(parent, target_name, made, target)
            target = made
        mix = self._mix
        part = mix.experts if routed else mix.attention
        names = [str(e) for e in range(mix.num_experts if routed else 1)]
        k = mix.routing.k if isinstance(mix.routing, TopK) else None
        router: Any = Softmax(k, part.scaling)
        experts = tuple(Expert(f"expert {name}", part.r) for name in names)
        target.update_layer(
            adapter_name, Dynamic(experts, router), inference_mode=bool(peft_config.inference_mode)
        )

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor],
        *_: Any, **__: Any,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        found = {}
        for name, layer in _layers(model, adapter_name):
            a = state_dict[f"{name}.lora_A.{adapter_name}.weight"]
            b = state_dict[f"{name}.lora_B.{adapter_name}.weight"]
            count = len(layer.mixtures[adapter_name].experts)
            parts = zip(a.chunk(count), b.chunk(count, 1), strict=True)
            for e, (one, other) in enumerate(parts):
                start = layer.native if count == 1 else f"{layer.native}.experts.{e}"
                found[f"{start}.lora_A.weight"] = one.clone()
                found[f"{start}.lora_B.weight"] = other.contiguous()
            if count > 1:
                gate = state_dict[f"{name}.lora_gate.{adapter_name}"]
                found[f"{layer.native}.moe_gate.weight"] = gate
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        where = f"adapter {adapter_name!r}"
        with loading(model, adapter_name, withdraw):
            given = native_tensors(config.mix, state_dict, where)
            found = {}
            for name, layer in _layers(model, adapter_name):
                count = len(layer.mixtures[adapter_name].experts)
                starts = [layer.native]
                if count > 1:
                    starts = [f"{layer.native}.experts.{e}" for e in range(count)]
                    gate = take(given, f"{layer.native}.moe_gate.weight", where)
                    found[f"{name}.lora_gate.{adapter_name}"] = gate
                a = [take(given, f"{start}.lora_A.weight", where) for start in starts]
                b = [take(given, f"{start}.lora_B.weight", where) for start in starts]
                found[f"{name}.lora_A.{adapter_name}.weight"] = torch.cat(a)
                found[f"{name}.lora_B.{adapter_name}.weight"] = torch.cat(b, 1)
            nothing_left(model, given, found, where)
        for _, layer in _layers(model, adapter_name):
            layer.awaited.discard(adapter_name)
        return found


def places_of(model: Any, mix: MixLora) -> dict[str, tuple[str, bool]]:
    """Module → (what its tensors' names begin with in a file, whether it has experts).

    Raises:
        IncompatibleAdapters: the base has no place for it, says what was found; or two of its
            modules have one name in the file.
    """
    place, layers = decoder_layers(model)
    found: dict[str, tuple[str, bool]] = {}
    caught: set[str] = set()
    for index, layer in enumerate(layers):
        inner = _inner(layer, model, f"{place}.{index}")
        for name, module in layer.named_modules():
            last = name.rpartition(".")[2]
            linear = isinstance(module, MixtureLayer) or is_trainable(module)
            if not linear or last not in mix.target_modules:
                continue
            routed = name.startswith(f"{inner}.") or mix.kind == "MOLA"
            module = f"{place}.{index}.{name}"
            native = stem_of(module, place, inner, mix.kind.lower())
            found[module] = native, routed
            caught.add(last)
    if absent := sorted(set(mix.target_modules) - caught):
        raise IncompatibleAdapters(
            f"target_modules: the layers of this base have no linear module {absent[0]!r}",
            hint="the adapter was made for another base",
        )
    check_stems({module: native for module, (native, _) in found.items()})
    return found


def _inner(layer: nn.Module, model: Any, where: str) -> str:
    """The feed-forward's name in a layer, also where its modules have experts already."""
    for name, module in layer.named_modules():
        if isinstance(module, PluggedLayer) and ".mlp." in module.native:
            return name.rpartition(".")[0]
    return mlp_of(layer, model, where)[0]


def _layers(model: nn.Module, adapter: str) -> list[tuple[str, PluggedLayer]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PluggedLayer) and adapter in module.mixtures
    ]


for _type, _config in (("loramoe", LoraMoeConfig), ("mola", MolaConfig)):
    register_peft_method(name=_type, config_cls=_config, model_cls=PluggedModel, prefix="lora_")
