"""``MIXLORA`` as a PEFT type: what m-LoRA writes loads, trains and saves through PEFT.

The experts stand in :class:`~.moe_layer.MoeLayer`, one for each feed-forward module; what the
attention has is PEFT's own LoRA. Files keep m-LoRA's names of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from lorahub_registry.adapters.mixlora import MixLora, Switch, parse_mixlora, to_config
from lorahub_registry.errors import IncompatibleAdapters, UsageError
from lorahub_registry.runtime.fits import NativeConfig, NativeNames, bare, injected, loading
from lorahub_registry.runtime.flow import BASE, mixed
from lorahub_registry.runtime.mixlora_names import from_native, settled_config, to_native
from lorahub_registry.runtime.mixlora_plan import (
    activation_of,
    all_linear,
    expert_sizes,
    plan_of,
)
from lorahub_registry.runtime.moe_flow import MoeFlow
from lorahub_registry.runtime.moe_hooks import tidy as tidy
from lorahub_registry.runtime.moe_hooks import watch
from lorahub_registry.runtime.moe_layer import MERGE, MoeLayer, layers_of
from lorahub_registry.runtime.peft_types import member
from lorahub_registry.runtime.room import check_room

MIXLORA = member("MIXLORA")
_SMALLER = "take a device with more memory, or experts of a lower rank"

_ALL = INCLUDE_LINEAR_LAYERS_SHORTHAND
# Where the weights of a new adapter start, which no file tells.
_STARTS = (True, "gaussian")

_NATIVE = (
    "expert_lora", "routing_strategy", "num_experts", "act_fn", "top_k", "top_p", "temperature",
    "expert_capacity", "ffn_dropout", "sparse_step", "router_loss", "router_aux_loss_coef",
    "router_z_loss_coef", "router_init_range", "jitter_noise",
)  # fmt: skip
_SHARED = (
    "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules", "bias",
    "base_model_name_or_path", "revision",
)  # fmt: skip

_KEPT = frozenset({
    *_SHARED, "task_type", "peft_type", "auto_mapping", "peft_version",
    "inference_mode", "fan_in_fan_out", "runtime_config",
})  # fmt: skip


@dataclass
class MixLoraConfig(NativeConfig, LoraConfig):
    """m-LoRA's ``adapter_config.json``: its keys, its defaults.

    Attributes:
        r, lora_alpha, lora_dropout, use_dora, use_rslora: of the attention's LoRA, and of the
            experts where ``expert_lora`` does not say otherwise.
        target_modules: last parts of names, or name → whether it is on, or ``all-linear``: those
            of the decoder's layers, by name once it is on a base. What is of the feed-forward
            module becomes experts.
        init_lora_weights: also ``gaussian``; of experts, too.
        expert_lora: the same keys for the experts.
        routing_strategy: ``mixlora`` (top-k), ``mixlora-dynamic`` (top-p) or ``mixlora-switch``.
    """

    expert_lora: dict[str, Any] | None = field(default=None, metadata={"help": "Of the experts."})
    routing_strategy: str = field(default="mixlora", metadata={"help": "Who sees which token."})
    num_experts: int = field(default=8, metadata={"help": "In each layer."})
    act_fn: str | None = field(default=None, metadata={"help": "None: the base's."})
    top_k: int | None = field(default=None, metadata={"help": "Experts of a token."})
    top_p: float | None = field(default=None, metadata={"help": "Share that experts make up."})
    temperature: float | None = field(default=None, metadata={"help": "Divides probabilities."})
    expert_capacity: int | None = field(default=None, metadata={"help": "Tokens of a row."})
    ffn_dropout: float | None = field(default=None, metadata={"help": "Of the output (switch)."})
    sparse_step: int | None = field(default=None, metadata={"help": "Layers with experts."})
    router_loss: bool = field(default=True, metadata={"help": "Whether loads are balanced."})
    router_aux_loss_coef: float | None = field(default=None, metadata={"help": "How much."})
    router_z_loss_coef: float | None = field(default=None, metadata={"help": "Of switch."})
    router_init_range: float | None = field(default=None, metadata={"help": "Of the gate."})
    jitter_noise: float | None = field(default=None, metadata={"help": "In training."})

    # m-LoRA's own reader wants a name. Of the base that was saved last, for a config may serve
    # several; it is no setting, which would follow the config to another base.
    base_act_fn: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        said: Any = vars(self)["target_modules"]
        if isinstance(said, Mapping):
            self.target_modules = [name for name, on in said.items() if on]
        super().__post_init__()
        self.peft_type = MIXLORA
        open_yet = self.target_modules is None or self.target_modules == _ALL
        self._read(**({"target_modules": ["on a base"]} if open_yet else {}))

    @property
    def mix(self) -> MixLora:
        """It, read and checked.

        Raises:
            UsageError: ``target_modules`` is missing.
            BrokenAdapter: values that cannot be.
        """
        if self.target_modules is None:
            raise UsageError(
                "target_modules is missing: MixLoRA has to know which modules it adapts",
                hint=f'name them, as ["q_proj", "up_proj"], or take "{_ALL}"',
            )
        return self._read()

    def _read(self, **more: Any) -> MixLora:
        raw = {key: getattr(self, key) for key in (*_NATIVE, *_SHARED)}
        raw["task_type"] = None if self.task_type is None else str(self.task_type.split(".")[-1])
        if isinstance(raw["target_modules"], set):
            raw["target_modules"] = sorted(raw["target_modules"])
        return parse_mixlora({**raw, "peft_type": "MIXLORA", **more}, self.where)

    def to_dict(self) -> dict[str, Any]:
        """m-LoRA's keys, none of them null."""
        mix = self.mix
        return to_config(replace(mix, act_fn=mix.act_fn or self.base_act_fn))

    def withdraw(self, model: Any, adapter: str) -> None:
        """Take an adapter of this config off a model again, with all that it brought."""
        withdraw(model, adapter)

    def own_act_fn(self, model: Any) -> str | None:
        """The name of the base's activation; None where it has none."""
        mlps = (layer.plain for _, layer in layers_of(model))
        return activation_of(mlps, bare(model))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own; which layers have experts is seen from the tensors where that is open."""
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if found.sparse_step is not None:
            settled_config(found, pretrained_model_name_or_path, **kwargs)
        return found


class MixLoraModel(NativeNames, LoraModel):
    """The base with MixLoRA experts in its feed-forward modules, and LoRA on its attention.

    In training, what the router is held to is added to the loss of the model's output, and stands
    apart there as ``aux_loss`` (and ``z_loss``). As other PEFT models, one is used by one thread at
    a time.
    """

    tuner_layer_cls = (LoraLayer, MoeLayer)
    native_prefixes = ("mixlora.",)

    def __init__(self, model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, Mapping):  # PeftModel gives one, inject_adapter_in_model does not
            raise IncompatibleAdapters(
                "transformers' load_adapter and add_adapter do not know how MixLoRA files are "
                "laid out: the experts would never be loaded",
                hint="PeftModel.from_pretrained(base, …), or get_peft_model(base, config)",
            )
        super().__init__(model, config, *args, **kwargs)

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        known = next(layers_of(model), None)
        self._flow = known[1].flow if known else MoeFlow()

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own; where it fails, the model is left as it was."""
        config = self.peft_config[adapter_name]
        known = _has(model, adapter_name)
        try:
            _check_said(config)
            if config.target_modules == _ALL:
                config.target_modules = set(all_linear(model))
            self._mix = config.mix
            _check_alone(model)
            self._plan = plan_of(model, self._mix)
            device = next(model.parameters()).device
            check_room(
                4 * sum(expert_sizes(self._mix, self._plan).values()),
                device,
                "the experts",
                _SMALLER,
            )
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            if not known:
                withdraw(model, adapter_name)
            raise
        watch(model, self._flow)
        injected(model, adapter_name, config)

    def _check_target_module_exists(self, _: Any, key: str) -> bool:
        return key in self._plan.experts or key in self._plan.plain

    def _create_and_replace(
        self, lora_config: Any, adapter_name: str, target: nn.Module, target_name: str,
        parent: nn.Module, current_key: str, **kwargs: Any,
    ) -> None:  # fmt: skip
        if current_key not in self._plan.experts:
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
            )
            return
        index, mlp = self._plan.experts[current_key]
        if not isinstance(target, MoeLayer):
            made = MoeLayer(mlp, self._flow, self._plan.place, index)
            self._replace_module(parent, target_name, made, target)
            target = made
        target.update_layer(
            adapter_name, self._mix, inference_mode=lora_config.inference_mode,
            gaussian=lora_config.init_lora_weights == "gaussian",
        )  # fmt: skip

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        config.base_act_fn = config.own_act_fn(model)
        return to_native(model, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        with loading(model, adapter_name, withdraw):
            found = from_native(model, adapter_name, config.mix, state_dict)
        for _, layer in layers_of(model):
            layer.awaited.discard(adapter_name)
        return found

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        layers = [] if names is None else [m for m in self.modules() if isinstance(m, LoraLayer)]
        before = [set(layer._forward_pre_hooks) for layer in layers]
        if names is not None:
            # PEFT knows no adapter that has experts alone; for its own layers it is the base.
            plain = {adapter for layer in layers for adapter in layer.lora_A}
            kwargs["adapter_names"] = [name if name in plain else BASE for name in names]
        try:
            with mixed(self, names), super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
        finally:
            # PEFT's own stay after an exception.
            for layer, kept in zip(layers, before, strict=True):
                for key in set(layer._forward_pre_hooks) - kept:
                    del layer._forward_pre_hooks[key]
                    layer._forward_pre_hooks_with_kwargs.pop(key, None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's.

        Raises:
            UsageError: beams or an assistant with switch routing, which counts a row's tokens.
        """
        said = args[1] if len(args) > 1 else kwargs.get("generation_config")
        asked = {**vars(said or self.model.generation_config), **kwargs}
        switches = any(isinstance(c.mix.routing, Switch) for c in self.peft_config.values())
        if switches and ((asked.get("num_beams") or 1) > 1 or asked.get("assistant_model")):
            raise UsageError(
                "switch routing counts each row's tokens, and beams and assistants change rows",
                hint="generate with num_beams=1 and no assistant_model",
            )
        return self.model.generate(*args, **kwargs)

    @contextmanager
    def watching(self, seen: Any) -> Iterator[None]:
        """Call ``seen(adapter, layer, logits, chosen, real)`` for experts that compute in the
        block; see :class:`~.moe_layer.MoeFlow`."""
        before, self._flow.seen = self._flow.seen, seen
        try:
            yield
        finally:
            self._flow.seen = before

    def coefficients(self, *_: Any, **__: Any) -> Any:
        """Refuse: of MixLoRA's experts each layer's router decides.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a MixLoRA takes no coefficients: the router of each layer weighs its experts",
            hint="watching(…) tells what they choose; adapters with coefficients of your own are a "
            "LORA_MIXTURE: lorareg compose",
        )

    def router_losses(self, adapter: str) -> dict[str, torch.Tensor]:
        """What the last forward's router is held to, each with its coefficient; in training."""
        return self._flow.losses(adapter, self.peft_config[adapter].mix)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; with the last one, the hooks go."""
        super().delete_adapter(adapter_name)
        tidy(self.model)

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(MERGE)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> Any:
        if merge:
            raise ValueError(MERGE)
        found = super()._unload_and_optionally_merge(merge=False, **kwargs)
        tidy(self.model)
        return found


def _check_alone(model: nn.Module) -> None:
    others = {
        type(m).__name__
        for m in model.modules()
        if isinstance(m, BaseTunerLayer) and not isinstance(m, MoeLayer | LoraLayer)
    }
    held = next(layers_of(model), None)
    plain = any(isinstance(m, LoraLayer) for m in model.modules())
    if others or (plain and held is None):
        raise IncompatibleAdapters(
            "the base carries adapters of another PEFT type, and the two would be added up",
            hint="load MixLoRA on a fresh base, or take the others off (model.unload())",
        )


def _check_said(config: MixLoraConfig) -> None:
    """Refuse what PEFT's LoRA can do and the files cannot say: it would be lost when saved."""
    fresh = LoraConfig()
    for each in fields(LoraConfig):
        value = getattr(config, each.name)
        if each.name == "init_lora_weights" and value in _STARTS:
            continue
        if each.name not in _KEPT and value != getattr(fresh, each.name):
            raise UsageError(
                f"{each.name} is {value!r}, and MixLoRA's files have no place for it",
                hint="leave it out"
                if each.name != "modules_to_save"
                else "leave it out; of task types, CAUSAL_LM has no head of its own to save",
            )


def _has(model: nn.Module, adapter: str) -> bool:
    return any(adapter in layer.mixes for _, layer in layers_of(model))


def withdraw(model: Any, adapter: str) -> None:
    """Take an adapter that could not be loaded off a model again, with all that it brought."""
    for module in list(model.modules()):
        if isinstance(module, MoeLayer) and adapter in module.mixes:
            module.delete_adapter(adapter)
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            module.delete_adapter(adapter)
    for name, module in list(model.named_modules()):
        idle = isinstance(module, MoeLayer) and not module.mixes
        if idle or (isinstance(module, LoraLayer) and not module.lora_A):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.base_layer)
    for holder in (model, getattr(model, "base_model", None)):
        getattr(holder, "peft_config", {}).pop(adapter, None)
    tidy(model)


register_peft_method(
    name="mixlora", config_cls=MixLoraConfig, model_cls=MixLoraModel, prefix="lora_"
)
