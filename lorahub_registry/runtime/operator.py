"""Several adapters beside the weights, each with its coefficient: one operator for every mixture.

    y = W x + B_cat [(A_cat x) ⊙ expand(c)]

A_cat and B_cat are the adapters' factors one after the other, their scalings folded in; every rank
belongs to one coefficient, and ``expand`` hands it out. It is exact for any weighted sum of deltas,
whatever the ranks and targets, and takes two small products for any number of adapters. Who gives
``c``, and how often, is all that static ratios, a search's candidates and gates differ in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.weights.lowrank import LowRank

Numbers = Callable[[str, int], int]
"""(module, adapter) → the number of its coefficient."""

Factors = tuple[torch.Tensor, torch.Tensor, float]
"""(A [rank, fan_in], B [fan_out, rank], scaling) of one adapter on one module."""


class RowsMerged(IncompatibleAdapters):
    """A module does not see the rows of a batch apart (OPT's ``fc1``, the experts of mixtures)."""


@dataclass(frozen=True)
class Stack:
    """The deltas of several adapters on one module.

    Attributes:
        a: [ranks, fan_in], floating point; ``ranks`` is the sum of the adapters' ranks.
        b: [fan_out, ranks], the scalings folded in.
        owner: [ranks], int64: which coefficient multiplies each rank.
    """

    a: torch.Tensor
    b: torch.Tensor
    owner: torch.Tensor


def stacked(
    adapters: Sequence[Mapping[str, LowRank | Factors]],
    *,
    device: torch.device | str = "cpu",
    number: Numbers = lambda module, adapter: adapter,
) -> dict[str, Stack]:
    """Module → the adapters' stack there, sorted by name.

    Args:
        adapters: module → delta of each, or its factors with the scaling apart.
        number: which coefficient an adapter has on a module.
    """
    found = {}
    for name in sorted({name for parts in adapters for name in parts}):
        here = [(i, *_factors(parts[name])) for i, parts in enumerate(adapters) if name in parts]
        ranks = torch.tensor([a.shape[0] for _, a, _, _ in here])
        owner = torch.tensor([number(name, i) for i, *_ in here])
        b = torch.cat([b for _, _, b, _ in here], 1)
        if any(scaling != 1 for *_, scaling in here):
            b *= torch.tensor([scaling for *_, scaling in here]).repeat_interleave(ranks)
        found[name] = Stack(
            torch.cat([a for _, a, _, _ in here]).to(device),
            b.to(device),
            owner.repeat_interleave(ranks).to(device),
        )
    return found


def _factors(part: LowRank | Factors) -> Factors:
    return (part.a, part.b, 1.0) if isinstance(part, LowRank) else part


class Beside:
    """Low-rank products beside modules of one model, by forward hooks; a context manager.

    Attributes:
        parts: module → (A, B, scale), scale broadcasting with A·x or None; modules without an
            entry give what they give alone. Computed in the factors' dtype.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.parts: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}
        self._modules = dict(modules)
        self._hooks: list[Any] = []

    def __enter__(self) -> Any:
        for name, module in self._modules.items():
            self._hooks.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.parts.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
            if name not in self.parts:
                return output
            a, b, scale = self.parts[name]
            if isinstance(module, nn.Embedding):
                low = functional.embedding(inputs[0], a.T)
                # Gemma's embeddings multiply what they look up.
                b = b * getattr(module, "embed_scale", 1.0)
            else:
                low = functional.linear(inputs[0].to(a.dtype), a)
            if scale is not None:
                _check_rows(name, scale, low)
                low = low * scale
            return (output + functional.linear(low, b)).to(output.dtype)

        return add


class Operator(Beside):
    """The operator on a loaded model: stacks stay, coefficients change.

    Args:
        model: the base; its weights stay as they are.
        stacks: where the adapters lie, on the model's device.

    Raises:
        IncompatibleAdapters: the base has no such module, or it takes no LoRA.
    """

    def __init__(self, model: nn.Module, stacks: Mapping[str, Stack]) -> None:
        super().__init__(adaptable(model, stacks))
        self._stacks = stacks

    def set(self, c: torch.Tensor) -> None:
        """Use ``c`` from now on: [E] for all rows, or [B, 1, E], one line for each row of a batch.

        ``c`` may require a gradient; set it again for every backward pass. Where rows have
        coefficients of their own, the model's forward raises ``RowsMerged`` if a module does not
        see them apart.
        """
        for name, stack in self._stacks.items():
            self.parts[name] = stack.a, stack.b, c.to(stack.b.dtype)[..., stack.owner]


def adaptable(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The modules of ``model`` with these dotted names, sorted by name.

    Raises:
        IncompatibleAdapters: the base has no such module, or it takes no LoRA.
    """
    named = dict(model.named_modules())
    if absent := sorted(set(names) - named.keys()):
        raise IncompatibleAdapters(
            f"the base has no module {absent[0]}"
            + (f" (nor {len(absent) - 1} others)" if len(absent) > 1 else ""),
            hint="the adapter was made for another base",
        )
    for name in sorted(names):
        if not is_adaptable(named[name]):
            raise IncompatibleAdapters(
                f"{name} is a {type(named[name]).__name__} in the base, neither a linear module "
                "nor an embedding",
                hint="the adapter was made for another base",
            )
    return {name: named[name] for name in sorted(names)}


def is_adaptable(module: nn.Module) -> bool:
    """Whether ``module`` takes a low-rank delta: linear (quantised, too), or an embedding."""
    return isinstance(module, nn.Linear | nn.Embedding) or (
        hasattr(module, "weight")
        and type(module).__name__ in {"Conv1D", "Linear4bit", "Linear8bitLt"}
    )


def _check_rows(name: str, scale: torch.Tensor, low: torch.Tensor) -> None:
    if scale.dim() == 3 and (low.dim() != 3 or low.shape[0] != scale.shape[0]):
        raise RowsMerged(
            f"{name} gets its rows as {tuple(low.shape[:-1])}, so {scale.shape[0]} rows cannot "
            "have coefficients of their own there",
            hint="give all rows the same coefficients, or leave out the adapters of that module",
        )
