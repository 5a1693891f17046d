"""Low-rank deltas applied to a loaded base, exchanged in place, and taken off again.

Two ways, one interface. On float32 weights the product B·A is added into the weight itself, from a
kept copy, so that every forward costs what the base's costs. On half-precision or quantised
weights a small delta would be lost in rounding (a delta of 1% loses 17% of itself in bfloat16):
there ``y = Wx + B(Ax)`` runs beside the weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from lorahub_registry.runtime.operator import Beside, adaptable
from lorahub_registry.weights.lowrank import Deltas


class Applied:
    """Deltas on some modules of one model; use it as a context manager.

    Args:
        model: the base; its modules stay where they are.
        modules: dotted names of every module that a delta may ever be set on.

    Raises:
        IncompatibleAdapters: the base has no such module, or it takes no LoRA.
    """

    def __init__(self, model: nn.Module, modules: Collection[str]) -> None:
        owners = _owners(model)
        self._weights: dict[str, tuple[nn.Parameter, torch.Tensor, bool]] = {}
        beside = {}
        for name, module in adaptable(model, modules).items():
            weight = getattr(module, "weight", None)
            # Conv1D holds its matrix as [fan_in, fan_out], an embedding as [rows, width].
            turned = type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)
            if (
                (turned or type(module) is nn.Linear)
                and isinstance(weight, nn.Parameter)
                and weight.dtype == torch.float32
                and owners[id(weight)] == 1
            ):
                self._weights[name] = (weight, weight.detach().clone(), turned)
            else:
                beside[name] = module
        self._beside = Beside(beside)
        self._places = {name: next(module.parameters()).device for name, module in beside.items()}

    @property
    def in_place(self) -> bool:
        """Whether every delta goes into its weight."""
        return not self._places

    def __enter__(self) -> Applied:
        self._beside.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        self._beside.__exit__()

    @torch.no_grad()
    def set(self, deltas: Deltas) -> None:
        """Put ``deltas`` on, in place of what was on before; modules not named get none."""
        for name, (weight, original, turned) in self._weights.items():
            delta = deltas.get(name)
            if delta is None:
                weight.copy_(original)
                continue
            a, b = delta.a.to(weight), delta.b.to(weight)
            if turned:
                torch.addmm(original, a.T, b.T, out=weight.data)
            else:
                torch.addmm(original, b, a, out=weight.data)
        # In float32, as PEFT keeps them: the base's precision would cost the delta's.
        self._beside.put(
            {
                name: deltas[name].to(place, torch.float32)
                for name, place in self._places.items()
                if name in deltas
            }
        )

    def clear(self) -> None:
        """Take every delta off; float32 weights are bit for bit what they were."""
        self.set({})


@contextmanager
def applied(model: nn.Module, deltas: Deltas) -> Iterator[None]:
    """``deltas`` on ``model`` for the length of a block."""
    with Applied(model, deltas.keys()) as on:
        on.set(deltas)
        yield


def _owners(model: nn.Module) -> Mapping[int, int]:
    """How many modules hold each parameter: a tied weight must not be changed in place."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts
