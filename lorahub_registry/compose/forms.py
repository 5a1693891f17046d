"""The two functions of coefficients: the exact sum of deltas, and LoraHub's product of sums.

    delta form    ΔW(c) = Σ cᵢ sᵢ Bᵢ Aᵢ                 exact; ranks and targets may differ
    factor form   ΔW(c) = s (Σ cᵢ Bᵢ)(Σ cᵢ Aᵢ)          as published (arXiv:2307.13269)

The factor form has cross terms and does not change when all signs do. A candidate only changes
coefficients: everything else is laid out once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from lorahub_registry.adapters.facts import AdapterFacts
from lorahub_registry.weights.files import load_factors
from lorahub_registry.weights.lowrank import Deltas, LowRank


class Form(Protocol):
    """Coefficients in, deltas out."""

    modules: tuple[str, ...]

    def at(self, coefficients: Sequence[float]) -> Deltas:
        """The mixture's delta in each module, on the form's device."""


class DeltaForm:
    """The exact weighted sum of adapters' deltas.

    Args:
        adapters: their deltas, one mapping each.
        device: where the stacks lie.
    """

    def __init__(self, adapters: Sequence[Deltas], device: torch.device | str = "cpu") -> None:
        self.modules = tuple(sorted({name for deltas in adapters for name in deltas}))
        self._stacks: dict[str, tuple[LowRank, torch.Tensor]] = {}
        for name in self.modules:
            parts = [(i, deltas[name]) for i, deltas in enumerate(adapters) if name in deltas]
            owner = torch.cat([torch.full((part.rank,), i) for i, part in parts])
            stack = LowRank(
                torch.cat([part.a for _, part in parts]).to(device),
                torch.cat([part.b for _, part in parts], 1).to(device),
            )
            self._stacks[name] = stack, owner.to(device)

    def at(self, coefficients: Sequence[float]) -> Deltas:
        """``[c₁B₁ … cₖBₖ]·[A₁; …; Aₖ]`` in each module."""
        deltas = {}
        for name, (stack, owner) in self._stacks.items():
            c = torch.tensor(coefficients, dtype=stack.b.dtype, device=stack.b.device)
            deltas[name] = LowRank(stack.a, stack.b * c[owner])
        return deltas


class FactorForm:
    """LoraHub's product of two weighted sums; equal ranks, targets and scalings.

    All factors lie in one matrix [adapters, parameters], read straight from the files, so that a
    candidate is one product of a row with it.
    """

    def __init__(
        self, adapters: Sequence[tuple[Path, AdapterFacts]], device: torch.device | str = "cpu"
    ) -> None:
        rows = []
        for folder, facts in adapters:
            factors = load_factors(folder, facts)
            rows.append(torch.cat([t.flatten() for a, b, _ in factors.values() for t in (a, b)]))
        self._flat = torch.stack(rows).to(device)
        self._shapes = [(m.name, m.rank, m.fan_in, m.fan_out, m.scaling) for m in facts.modules]
        self.modules = tuple(name for name, *_ in self._shapes)

    def at(self, coefficients: Sequence[float]) -> Deltas:
        """``s (Σ cᵢBᵢ)(Σ cᵢAᵢ)`` in each module, the scaling in B."""
        c = torch.tensor(coefficients, dtype=self._flat.dtype, device=self._flat.device)
        mixed = c @ self._flat
        deltas, begin = {}, 0
        for name, rank, fan_in, fan_out, scaling in self._shapes:
            middle, end = begin + rank * fan_in, begin + rank * (fan_in + fan_out)
            a = mixed[begin:middle].view(rank, fan_in)
            b = mixed[middle:end].view(fan_out, rank)
            deltas[name] = LowRank(a, b * scaling)
            begin = end
        return deltas
