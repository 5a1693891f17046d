"""The operator beside the modules of a plain model, by hooks, for as long as a search asks it.

Static mixtures and a search's candidates go through here; who gives coefficients while the model
runs has layers of its own (:mod:`lorahub_registry.runtime.layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.mixture import Coefficients, Experts, RowsMerged
from lorahub_registry.weights.lowrank import Deltas, LowRank

Numbers = Callable[[str, int], int]
"""(module, adapter) → the number of its coefficient."""

ScaledFactors = tuple[torch.Tensor, torch.Tensor, float]
"""(A [rank, fan_in], B [fan_out, rank], scaling) of one adapter on one module."""


@dataclass(frozen=True)
class Stack:
    """The deltas of several adapters on one module.

    Attributes:
        experts: the adapters that sit there.
        numbers: [experts], int64: which of a search's coefficients each has; modules may share.
    """

    experts: Experts
    numbers: torch.Tensor

    @property
    def owner(self) -> torch.Tensor:
        """[ranks], int64: which of the search's coefficients multiplies each rank."""
        return self.numbers[self.experts.owner]


def stacked(
    adapters: Sequence[Mapping[str, LowRank | ScaledFactors]],
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
        ranks = [a.shape[0] for _, a, _, _ in here]
        numbers = torch.tensor([number(name, i) for i, *_ in here], device=device)
        b = torch.cat([b for _, _, b, _ in here], 1)
        if any(scaling != 1 for *_, scaling in here):
            scalings = torch.tensor([scaling for *_, scaling in here])
            b *= scalings.repeat_interleave(torch.tensor(ranks))
        a = torch.cat([a for _, a, _, _ in here]).to(device)
        found[name] = Stack(Experts(a, b.to(device), ranks, name), numbers)
    return found


def _factors(part: LowRank | ScaledFactors) -> ScaledFactors:
    return (part.a, part.b, 1.0) if isinstance(part, LowRank) else part


class Beside:
    """The operator beside modules of one model, by forward hooks; a context manager.

    Attributes:
        parts: module → its experts and their coefficients; modules without an entry give what they
            give alone.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.parts: dict[str, tuple[Experts, Coefficients | None]] = {}
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

    def put(self, deltas: Deltas) -> None:
        """Have ``deltas`` beside their modules from now on, and none beside the others."""
        self.parts = {n: (Experts(d.a, d.b, [len(d.a)], n), None) for n, d in deltas.items()}

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
            if name not in self.parts:
                return output
            experts, c = self.parts[name]
            if c is not None:
                _check_rows(name, c.values, output)
            if isinstance(module, nn.Embedding):
                # Gemma's embeddings multiply what they look up.
                scale = getattr(module, "embed_scale", 1.0)
                return experts.add_embedded(output, inputs[0], c, scale)
            return experts.add(output, inputs[0], c)

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
            self.parts[name] = stack.experts, Coefficients(c[..., stack.numbers])


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


def _check_rows(name: str, values: torch.Tensor, output: torch.Tensor) -> None:
    """Nothing but rows that stand apart: of others it is not known here whose they are."""
    if values.dim() == 3 and (output.dim() != 3 or len(output) != len(values)):
        raise RowsMerged(
            f"{name} gets its rows as {tuple(output.shape[:-1])}, so {len(values)} rows cannot "
            "have coefficients of their own there",
            hint="give all rows the same coefficients, or leave out the adapters of that module",
        )
