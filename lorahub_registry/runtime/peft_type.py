"""``LORA_MIXTURE``: a PEFT type of our own, for mixtures that decide as they run.

Once this is imported, ``PeftModel.from_pretrained`` and transformers' ``load_adapter`` take such a
folder as they take any. Without it PEFT does not know the type and says so: a dynamic mixture is
never taken for the sum of its experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn

from lorahub_registry.adapters.dynamic import (
    PEFT_TYPE,
    Dynamic,
    PromptRouter,
    parse_dynamic,
)
from lorahub_registry.errors import IncompatibleAdapters, UsageError
from lorahub_registry.runtime.fits import (
    OfFile,
    bare,
    check_fits,
    injected,
    loading,
    ran,
    take_off,
    withdraw,
)
from lorahub_registry.runtime.flow import Flow, Generation, mixed
from lorahub_registry.runtime.gate_layer import GateLayer
from lorahub_registry.runtime.layers import MERGE, MixtureLayer
from lorahub_registry.runtime.mixture import Coefficients
from lorahub_registry.runtime.operator import is_adaptable
from lorahub_registry.runtime.peft_types import member
from lorahub_registry.runtime.places import in_experts, layer_of, place_of, reader_of, width_of
from lorahub_registry.weights.dynamic import check_dynamic, check_router, router_sum

LORA_MIXTURE = member(PEFT_TYPE)


@dataclass
class MixtureConfig(OfFile, PeftConfig):
    """A dynamic mixture's ``adapter_config.json``.

    Attributes:
        target_modules: every module that any expert sits on, by its full name.
        mixture: experts and router, see :mod:`lorahub_registry.adapters.dynamic`.
    """

    target_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Every module that any expert sits on."}
    )
    mixture: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "The experts, and what chooses among them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORA_MIXTURE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)

    @property
    def dynamic(self) -> Dynamic:
        """``mixture``, read and checked."""
        return parse_dynamic(self.mixture, where="adapter_config.json")


class MixtureModel(BaseTuner):
    """The base with the experts of one or more mixtures beside its modules.

    As other PEFT models, one is used by one thread at a time: what routers and gates decide is
    kept with the model while it runs.
    """

    prefix = "lora_"
    tuner_layer_cls = (MixtureLayer, GateLayer)
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        kinds = {type(m).__name__ for m in model.modules() if isinstance(m, BaseTunerLayer)}
        if kinds - {"MixtureLayer", "GateLayer"}:
            raise IncompatibleAdapters(
                "the base carries adapters of another PEFT type, and the two would be added up",
                hint="load the mixture on a fresh base, or take the others off (model.unload())",
            )
        # transformers' load_adapter gives no mapping, and fills the tensors in by itself.
        self._apart = not isinstance(config, Mapping)
        super().__init__(model, config, *args, **kwargs)

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self._flow = flow_of(model) or Flow()

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own; where it fails, the model is left as it was."""
        config = self.peft_config[adapter_name]
        self._dynamic = config.dynamic
        known = any(isinstance(m, MixtureLayer) and adapter_name in m.mixtures
                    for m in model.modules())  # fmt: skip
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            if not known:
                withdraw(model, adapter_name)
            raise
        if not self._apart:
            injected(model, adapter_name, config)
        if self._dynamic.sha256 is not None:
            _check_later(model, adapter_name, self._dynamic)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        frozen = bool(peft_config.inference_mode)
        if not isinstance(target, MixtureLayer):
            if not _takes_experts(target):
                raise IncompatibleAdapters(
                    f"{current_key} is a {type(target).__name__}: experts of a dynamic mixture sit "
                    "on linear modules",
                    hint="leave it out of the adapters' target_modules",
                )
            made = MixtureLayer(target, self._flow, current_key)
            made.place = layer_of(current_key, self.model) or ""
            made.in_experts = in_experts(current_key, self.model)
            self._replace_module(parent, target_name, made, target)
            target = made
        target.update_layer(adapter_name, self._dynamic, inference_mode=frozen)
        router = self._dynamic.router
        if router.site in {"layer", "prompt"}:
            place = place_of(current_key, router, self.model)
            self._hang(place, adapter_name, frozen=frozen)

    def _hang(self, place: str, adapter: str, *, frozen: bool) -> None:
        """See that the layer called ``place`` has a gate."""
        layer: Any = self.model.get_submodule(place)
        if not hasattr(layer, "mixture"):
            layer.mixture = GateLayer(layer, self._flow, place, width_of(self.model))
        if adapter not in layer.mixture.mixtures:
            layer.mixture.update_layer(adapter, self._dynamic, inference_mode=frozen)
        if isinstance(self._dynamic.router, PromptRouter):
            layer.mixture.read_prompts(reader_of(self.model))

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """PEFT's own; what is saved is signed, as gates may have been trained since."""
        found: dict[str, torch.Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, *args, **kwargs
        )
        plain = {cls._remove_adapter_name_from_key(k, adapter_name): v for k, v in found.items()}
        config.mixture = {**config.mixture, "sha256": router_sum(config.dynamic, plain)}
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        where = f"mixture {adapter_name!r}"
        with loading(model, adapter_name, _give_up):
            check_dynamic(config.dynamic, state_dict, where=where)
            found: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
                model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
            )
            check_fits(model, adapter_name, found, where)
            check_router(config.dynamic, state_dict, where=where)
        _checked(model, adapter_name)
        return found

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        names: Sequence[str] | None = kwargs.get("adapter_names")
        with mixed(self, names):
            ran(self.model)
            yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's; prompt routers read the prompt that this is given, and nothing after it.

        A model that has the mixture by transformers' ``load_adapter`` does not come by here: with
        a cache it keeps what the cache's prompt was routed to, and without one it routes each
        step by the prompt and what it has written so far.
        """
        prompt = next(
            (kwargs[n] for n in ("input_ids", "inputs") if kwargs.get(n) is not None), None
        )
        prompt = args[0] if args else prompt
        before = self._flow.generation
        self._flow.generation = Generation(None if prompt is None else prompt.shape[1])
        try:
            return self.model.generate(*args, **kwargs)
        finally:
            self._flow.generation = before

    @contextmanager
    def coefficients(
        self, c: Coefficients | torch.Tensor | Sequence[Any], adapter: str | None = None
    ) -> Iterator[None]:
        """Use these coefficients in the block, in place of what the router would choose.

        Args:
            c: [E] for all rows, or [rows, 1, E], one line for each row of the batches; whatever
                ``torch.as_tensor`` makes floating point of.
            adapter: the mixture's name in this model; None: the active one.

        Raises:
            UsageError: they are not for this mixture's experts, or, in the block, not for the
                rows of a batch.
        """
        name = adapter or self.active_adapters[0]
        if name not in self.peft_config:
            raise UsageError(f"no mixture is called {name} here", hint=", ".join(self.peft_config))
        found = c if isinstance(c, Coefficients) else Coefficients(_tensor(c))
        found.check(len(self.peft_config[name].dynamic.experts))
        before = self._flow.given.get(name)
        self._flow.given[name] = found

        def check(_: Any, args: Any, kwargs: Any) -> None:
            if found.values.dim() == 1:
                return
            given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
            read = next((each for each in given if each is not None), ())
            rows, lines = len(read), len(found.values)
            # Beams of one prompt stand next to each other.
            if rows != lines and not (self._flow.generation and rows % lines == 0):
                raise UsageError(f"coefficients for {lines} rows, and a batch of {rows}")

        handle = reader_of(self.model).register_forward_pre_hook(check, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            if before is None:
                del self._flow.given[name]
            else:
                self._flow.given[name] = before

    @contextmanager
    def reading(self, prompts: torch.Tensor) -> Iterator[None]:
        """Let prompt routers in the block read these tokens only, where answers follow them.

        Args:
            prompts: [rows, positions], 1 at the tokens of prompts.

        Raises:
            UsageError: in the block, they are not of a batch's shape.
        """
        before, self._flow.prompts = self._flow.prompts, prompts
        try:
            yield
        finally:
            self._flow.prompts = before

    @contextmanager
    def watching(self, seen: Any) -> Iterator[None]:
        """Call ``seen(adapter, module, coefficients)`` for modules that compute in the block."""
        before, self._flow.watched = self._flow.watched, seen
        try:
            yield
        finally:
            self._flow.watched = before

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget one mixture; with the last one, its gates and hooks go."""
        super().delete_adapter(adapter_name)
        take_off(self.model, idle=True)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> Any:
        if merge:
            raise ValueError(MERGE)
        take_off(self.model)
        return super()._unload_and_optionally_merge(merge=False, **kwargs)


def _tensor(values: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"coefficients that are no numbers: {error}", hint="torch.tensor([1.0, 0.0])"
        ) from error


def _check_later(model: nn.Module, adapter: str, dynamic: Dynamic) -> None:
    """Hold what was loaded against its config when the model first runs.

    transformers' ``load_adapter`` fills the tensors in by itself and asks nobody: there is no
    earlier moment. Where PEFT loads, they are checked before (see :func:`_checked`).
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check(module: nn.Module, _: Any) -> None:
        _checked(module, adapter)  # of a copy, where the model was copied
        ends = {f".{adapter}": "", f".{adapter}.weight": ".weight"}
        found = {
            name.removesuffix(end) + put: value.detach()
            for name, value in module.named_parameters()
            for end, put in ends.items()
            if ".lora_" in name and name.endswith(end)
        }
        where = f"mixture {adapter!r}"
        try:
            check_dynamic(dynamic, found, where=where)
            check_router(dynamic, found, where=where)
        except Exception:
            withdraw(module, adapter)
            raise

    waiting = model.__dict__.setdefault(_WAITING, {})
    waiting[adapter] = model.register_forward_pre_hook(check).id


def _checked(model: Any, adapter: str) -> None:
    """The mixture is known to be whole."""
    base = bare(model)
    base._forward_pre_hooks.pop(base.__dict__.get(_WAITING, {}).pop(adapter, None), None)


def _give_up(model: Any, adapter: str) -> None:
    _checked(model, adapter)  # there is nothing left to check
    withdraw(model, adapter)


_WAITING = "_lorareg_unchecked"


def _takes_experts(module: nn.Module) -> bool:
    """Whether it maps features to features: linear, in whatever form PEFT knows."""
    if isinstance(module, nn.Embedding):
        return False
    return is_adaptable(module) or all(
        isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")
    )


def flow_of(model: nn.Module) -> Flow | None:
    """What the mixture layers of ``model`` share; None where there are none."""
    for module in model.modules():
        if isinstance(module, MixtureLayer):
            return module.flow
    return None


register_peft_method(
    name=PEFT_TYPE.lower(), config_cls=MixtureConfig, model_cls=MixtureModel, prefix="lora_"
)
