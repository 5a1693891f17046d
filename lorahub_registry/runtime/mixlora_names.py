"""m-LoRA's names of tensors ↔ those of parameters in a loaded model.

m-LoRA keeps one tensor for each expert, ``mixlora.layers.{i}.mlp.{proj}.experts.{e}.lora_B.weight``
[fan_out, rank]; the model keeps one for all, with B turned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import load_peft_weights
from torch import nn

from lorahub_registry.adapters.mixlora import (
    MixLora,
    check_shapes,
    modern_names,
    settled,
)
from lorahub_registry.adapters.mixlora_keys import gate_name
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters
from lorahub_registry.runtime.mixlora_plan import stem_of
from lorahub_registry.runtime.moe_layer import ExpertsOf, MoeLayer, layers_of

_PARTS = (("_A", "lora_A.weight", False), ("_B", "lora_B.weight", True),
          ("_magnitude", "lora_magnitude_vector", False))  # fmt: skip


def _experts(
    model: nn.Module, adapter: str
) -> Iterator[tuple[str, ExpertsOf, int, dict[str, str]]]:
    """(name in the model, experts, layer, projection → what its names in the file begin with)."""
    for name, layer in layers_of(model):
        if adapter in layer.lora_experts:
            held = layer.lora_experts[adapter]
            assert isinstance(held, ExpertsOf)
            inner = _inner(name, layer)
            stems = {p: stem_of(f"{name}.{p}", layer.place, inner) for p in held.names}
            yield f"{name}.lora_experts.{adapter}", held, layer.index, stems


def _inner(name: str, layer: MoeLayer) -> str:
    """The feed-forward module's name in its layer."""
    return name.rpartition(f"{layer.place}.")[2].partition(".")[2]


def _plain(model: nn.Module, adapter: str) -> Iterator[tuple[str, str]]:
    """(name in the model, name in the file) of the plain LoRA's tensors."""
    known = next(layers_of(model), None)
    if known is None:
        return
    place, inner = known[1].place, _inner(*known)
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        native = stem_of(name, place, inner)
        yield f"{name}.lora_A.{adapter}.weight", f"{native}.lora_A.weight"
        yield f"{name}.lora_B.{adapter}.weight", f"{native}.lora_B.weight"
        if adapter in module.lora_magnitude_vector:
            yield (
                f"{name}.lora_magnitude_vector.{adapter}.weight",
                f"{native}.lora_magnitude_vector",
            )


def to_native(
    model: nn.Module, adapter: str, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """One adapter's tensors by m-LoRA's names.

    Args:
        tensors: the model's, by its own names.
    """
    found = {native: tensors[name] for name, native in _plain(model, adapter)}
    for name, _, index, stems in _experts(model, adapter):
        found[gate_name(index)] = tensors[f"{name}.gate"]
        for proj, stem in stems.items():
            for part, native, turned in _PARTS:
                stack = tensors.get(f"{name}.{proj}{part}")
                for e, one in enumerate(() if stack is None else stack):
                    # Of its own storage, for files hold no views.
                    found[f"{stem}.experts.{e}.{native}"] = (one.T if turned else one).clone(
                        memory_format=torch.contiguous_format
                    )
    return found


def from_native(
    model: nn.Module, adapter: str, mix: MixLora, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """One adapter's tensors by the model's names.

    Args:
        tensors: as a file has them, by m-LoRA's names, first or today's.

    Raises:
        BrokenAdapter: they are not what the config says, or not finite.
        IncompatibleAdapters: they are not of this base.
    """
    where = f"adapter {adapter!r}"
    given = native_tensors(mix, tensors, where)
    found = {name: take(given, native, where) for name, native in _plain(model, adapter)}
    for name, held, index, stems in _experts(model, adapter):
        found[f"{name}.gate"] = take(given, gate_name(index), where)
        for proj, stem in stems.items():
            for part, native, turned in _PARTS:
                if not hasattr(held, f"{proj}{part}"):
                    continue
                each = [
                    take(given, f"{stem}.experts.{e}.{native}", where)
                    for e in range(mix.num_experts)
                ]
                found[f"{name}.{proj}{part}"] = torch.stack([t.T if turned else t for t in each])
    nothing_left(model, given, found, where)
    return found


def native_tensors(
    mix: MixLora, tensors: Mapping[str, torch.Tensor], where: str
) -> dict[str, torch.Tensor]:
    """A file's tensors by native name, checked.

    Raises:
        BrokenAdapter: they are not what the config says, or not finite.
    """
    names = modern_names(tensors, mix)
    given = {names[name]: value for name, value in tensors.items()}
    check_shapes(mix, {name: tuple(value.shape) for name, value in given.items()}, where)
    for name, value in given.items():
        if not torch.isfinite(value).all():
            raise BrokenAdapter(
                f"{where}: {name} holds numbers that are not finite", hint="train it again"
            )
    return given


def take(given: dict[str, torch.Tensor], name: str, where: str) -> torch.Tensor:
    """One of ``given``, which is there no more then.

    Raises:
        BrokenAdapter: it was not.
    """
    if name not in given:
        raise BrokenAdapter(
            f"{where}: has no {name}",
            hint="its file is not whole, or it was made for another base",
        )
    return given.pop(name)


def nothing_left(
    model: nn.Module,
    given: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    where: str,
) -> None:
    """See that a file's tensors are those that ``model`` has places for.

    Args:
        given: those that had no place.
        found: the others, by the model's names.

    Raises:
        IncompatibleAdapters: they are not of this base.
    """
    if given:
        raise IncompatibleAdapters(
            f"{where}: holds {sorted(given)[0]}, for which this base has no place",
            hint="it was made for another base",
        )
    wanted = {name: value.shape for name, value in model.state_dict().items() if name in found}
    for name, value in found.items():
        if name not in wanted or value.shape != wanted[name]:
            raise IncompatibleAdapters(
                f"{where}: {name} is {_shape(value.shape)}, and on this base it would be "
                f"{_shape(wanted.get(name, ()))}",
                hint="it was made for another base",
            )


def settled_config(config: Any, where: str, **kwargs: Any) -> None:
    """Let ``config`` say what its tensors say of the layers that have experts."""
    weights = load_peft_weights(where, device="cpu", **kwargs)
    config.sparse_step = getattr(settled(config.mix, weights).routing, "sparse_step", None)


def _shape(sizes: Any) -> str:
    return "x".join(map(str, sizes)) or "nothing"
