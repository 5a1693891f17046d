"""Whether a file's tensors fit a model that awaits them, and how to leave no trace if not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.facts import PREFIX
from lorahub_registry.adapters.mixlora import MixLora, differing
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters
from lorahub_registry.runtime.gate_layer import GateLayer
from lorahub_registry.runtime.layers import MixtureLayer

_UNLOADED = "_lorareg_unloaded"


class OfFile:
    """A PEFT config that knows whether it was read: the tensors beside it are yet to be loaded.

    Attributes:
        source: what it was read from; None where it was not.
    """

    source: ClassVar[tuple[Any, ...] | None] = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own."""
        found: Any = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, **kwargs
        )
        found.source = _source(pretrained_model_name_or_path, **kwargs)
        return found


class NativeConfig(OfFile):
    """m-LoRA's config, which says how to compute with its tensors what they do not say.

    Attributes:
        where: what messages about its values call it.
    """

    mix: Any
    peft_type: Any
    where: str = CONFIG_NAME

    def __post_init__(self) -> None:
        # A file states its type, and PEFT hands it on; what is made in memory need not.
        if self.peft_type is None:
            self.where = type(self).__name__
        super().__post_init__()  # type: ignore[misc]

    def own_act_fn(self, model: Any) -> str | None:
        """The name of the base's activation, which a config without one means."""
        return None

    def withdraw(self, model: Any, adapter: str) -> None:
        """Take an adapter of this config off a model again, with all that it brought."""
        withdraw(model, adapter)

    def check_again(self, model: Any, adapter: str, where: str, **hub: Any) -> None:
        """Whether the adapter in ``where`` is such that its tensors can be loaded over this one's:
        PEFT loads them, and keeps this config.

        Args:
            model: what this one is loaded on.
            hub: how to find ``where`` on the Hub.

        Raises:
            IncompatibleAdapters: with this config they would be another adapter.
        """
        if adapter in _waiting(model) and self.source == _source(where, **hub):
            return  # it is on its way
        found: Any = PeftConfig.from_pretrained(where, **hub)
        kinds = [str(one.peft_type).rpartition(".")[2] for one in (self, found)]
        if kinds[0] != kinds[1]:
            clauses = [f"peft_type is {kinds[1]} and not {kinds[0]}"]
        else:
            own = self.own_act_fn(model)
            mine, other = self.mix, type(self).from_pretrained(where, **hub).mix
            clauses = differing(_named(mine, own), _named(other, own))
        if clauses:
            if adapter in _waiting(model):  # nothing of it was ever loaded
                self.withdraw(model, adapter)
            raise IncompatibleAdapters(
                f"{where} cannot be loaded over adapter {adapter!r}, which computes otherwise: "
                f"{'; '.join(clauses)}",
                hint=f"model.delete_adapter({adapter!r}) first, or load it by another name",
            )


def _named(mix: MixLora, own: str | None) -> MixLora:
    return replace(mix, act_fn=mix.act_fn or own)


def _source(where: Any, **hub: Any) -> tuple[Any, ...]:
    return str(where), hub.get("subfolder"), hub.get("revision")


_load_adapter = PeftModel.load_adapter


@wraps(_load_adapter)
def _loaded(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    held = self.peft_config.get(adapter_name)
    if isinstance(held, NativeConfig):
        hub, _ = self._split_kwargs(kwargs)
        held.check_again(self, adapter_name, str(model_id), **hub)
    return _load_adapter(self, model_id, adapter_name, *args, **kwargs)


# Of a name that is taken PEFT reads no config, so none of its hooks sees the file's.
PeftModel.load_adapter = _loaded


class NativeNames:
    """A PEFT model whose files hold m-LoRA's names, in which no adapter's name stands."""

    native_prefixes: ClassVar[tuple[str, ...]]

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if key.startswith(cls.native_prefixes):
            return key
        found: str = super()._remove_adapter_name_from_key(key, adapter_name)  # type: ignore[misc]
        return found


def bare(model: Any) -> Any:
    """The base in a ``PeftModel``, which its own method finds only while an adapter is active."""
    return model.base_model.model if hasattr(model, "get_base_model") else model


def injected(model: nn.Module, adapter: str, config: Any) -> None:
    """An adapter has got its place in this base, and whether its tensors are to follow."""
    waiting = model.__dict__.setdefault(_UNLOADED, set())
    (waiting.add if config.inference_mode or config.source else waiting.discard)(adapter)


def _waiting(model: Any) -> set[str]:
    found: set[str] = bare(model).__dict__.get(_UNLOADED, set())
    return found


def ran(model: nn.Module) -> None:
    """What this base runs with is there to stay, loaded or not."""
    model.__dict__.pop(_UNLOADED, None)


@contextmanager
def loading(model: Any, adapter: str, withdraw: Callable[[Any, str], None]) -> Iterator[None]:
    """Where the block fails, take off an adapter that was injected to be loaded here.

    One that was there before, trained or loaded, stays as it is.
    """
    waiting = _waiting(model)
    try:
        yield
    except Exception:
        if adapter in waiting:
            withdraw(model, adapter)
        raise
    finally:
        waiting.discard(adapter)


def take_off(model: nn.Module, *, idle: bool = False) -> None:
    """Rid a model's layers of their gates and hooks.

    Args:
        idle: only of those that no mixture needs any more.
    """
    for layer in list(model.modules()):
        held = getattr(layer, "mixture", None)
        if isinstance(held, GateLayer) and not (idle and held.mixtures):
            held.remove()
            del layer.mixture


def withdraw(model: Any, adapter: str) -> None:
    """Take a mixture that could not be loaded off a model again, with all that it brought."""
    for module in list(model.modules()):
        if isinstance(module, MixtureLayer | GateLayer) and adapter in module.mixtures:
            module.delete_adapter(adapter)
    take_off(model, idle=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, MixtureLayer) and not module.mixtures:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.base_layer)
    for holder in (model, getattr(model, "base_model", None)):
        getattr(holder, "peft_config", {}).pop(adapter, None)


def check_fits(
    model: nn.Module, adapter: str, found: Mapping[str, torch.Tensor], where: str
) -> None:
    """Whether a file's tensors are those that the mixture wants on this base.

    Args:
        found: by their names in ``model``.
        where: what to call the mixture.

    Raises:
        BrokenAdapter: one is missing.
        IncompatibleAdapters: one has another shape, or no place here.
    """
    wanted: dict[str, torch.Size] = {}
    for name, module in model.named_modules():
        if isinstance(module, MixtureLayer | GateLayer):
            for part in module.adapter_layer_names:
                held = getattr(module, part)
                if adapter in held:
                    one = held[adapter]
                    end = "" if isinstance(one, nn.Parameter) else ".weight"
                    value = one if isinstance(one, nn.Parameter) else one.weight
                    wanted[f"{name}.{part}.{adapter}{end}"] = value.shape
    for key in sorted(found.keys() | wanted.keys()):
        plain = key.removeprefix(PREFIX).removesuffix(f".{adapter}")
        plain = plain.replace(f".{adapter}.weight", ".weight")
        if key not in found:
            raise BrokenAdapter(
                f"{where}: has no {plain}",
                hint="its file is not whole, or it was made for another base",
            )
        if key not in wanted:
            raise IncompatibleAdapters(
                f"{where}: holds {plain}, for which this base has no place",
                hint="it was made for another base",
            )
        if found[key].shape != wanted[key]:
            raise IncompatibleAdapters(
                f"{where}: {plain} is {_shape(found[key].shape)}, and on this base it would be "
                f"{_shape(wanted[key])}",
                hint="it was made for another base",
            )


def _shape(sizes: torch.Size) -> str:
    return "x".join(map(str, sizes))
