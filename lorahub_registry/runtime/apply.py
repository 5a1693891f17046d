"""Low-rank deltas applied to a loaded base, exchanged in place, and taken off again.

Two ways, one interface. On float32 weights the product B·A is added into the weight itself, from a
kept copy, so that every forward costs what the base's costs. On half-precision or quantised
weights a small delta would be lost in rounding (a delta of 1% loses 17% of itself in bfloat16):
there ``y = Wx + B(Ax)`` runs beside the weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.weights.lowrank import Deltas, LowRank


class Applied:
    """Deltas on some modules of one model; use it as a context manager.

    Args:
        model: the base; its modules stay where they are.
        modules: dotted names of every module that a delta may ever be set on.

    Raises:
        IncompatibleAdapters: the base has no such module, or it is no linear one.
    """

    def __init__(self, model: nn.Module, modules: Collection[str]) -> None:
        named = dict(model.named_modules())
        absent = sorted(set(modules) - named.keys())
        if absent:
            raise IncompatibleAdapters(
                f"the base has no module {absent[0]}"
                + (f" (nor {len(absent) - 1} others)" if len(absent) > 1 else ""),
                hint="the adapter was made for another base",
            )
        for name in sorted(modules):
            if not is_linear(named[name]):
                raise IncompatibleAdapters(
                    f"{name} is a {type(named[name]).__name__} in the base, not a linear module",
                    hint="the adapter was made for another base",
                )
        owners = _owners(model)
        self._weights: dict[str, tuple[nn.Parameter, torch.Tensor, bool]] = {}
        self._beside: dict[str, nn.Module] = {}
        self._factors: dict[str, LowRank] = {}
        self._hooks: list[Any] = []
        for name in sorted(modules):
            module, weight = named[name], getattr(named[name], "weight", None)
            transposed = type(module).__name__ == "Conv1D"
            plain = type(module) is nn.Linear or transposed
            if (
                plain
                and isinstance(weight, nn.Parameter)
                and weight.dtype == torch.float32
                and owners[id(weight)] == 1
            ):
                self._weights[name] = (weight, weight.detach().clone(), transposed)
            else:
                self._beside[name] = module

    def __enter__(self) -> Applied:
        for name, module in self._beside.items():
            self._hooks.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def set(self, deltas: Deltas) -> None:
        """Put ``deltas`` on, in place of what was on before; modules not named get none."""
        for name, (weight, original, transposed) in self._weights.items():
            delta = deltas.get(name)
            if delta is None:
                weight.copy_(original)
                continue
            a, b = delta.a.to(weight), delta.b.to(weight)
            if transposed:
                torch.addmm(original, a.T, b.T, out=weight.data)
            else:
                torch.addmm(original, b, a, out=weight.data)
        for name, module in self._beside.items():
            if name in deltas:
                # In float32, as PEFT keeps them: the base's precision would cost the delta's.
                place = next(module.parameters()).device
                self._factors[name] = LowRank(
                    deltas[name].a.to(place, torch.float32),
                    deltas[name].b.to(place, torch.float32),
                )
            else:
                self._factors.pop(name, None)

    def clear(self) -> None:
        """Take every delta off; float32 weights are bit for bit what they were."""
        self.set({})

    def _hook(self, name: str) -> Any:
        def add(
            _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor:
            factors = self._factors.get(name)
            if factors is None:
                return output
            low = functional.linear(inputs[0].float(), factors.a)
            return (output + functional.linear(low, factors.b)).to(output.dtype)

        return add


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` multiplies its input by one matrix (quantised ones too)."""
    return isinstance(module, nn.Linear) or (
        hasattr(module, "weight")
        and type(module).__name__ in {"Conv1D", "Linear4bit", "Linear8bitLt"}
    )


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
