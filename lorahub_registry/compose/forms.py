"""The two functions of coefficients: the exact sum of deltas, and LoraHub's product of sums.

    delta form    ΔW(c) = Σ cᵢ sᵢ Bᵢ Aᵢ                 exact; ranks and targets may differ
    factor form   ΔW(c) = s (Σ cᵢ Bᵢ)(Σ cᵢ Aᵢ)          as published (arXiv:2307.13269)

The factor form has cross terms and does not change when all signs do. A candidate only changes
coefficients: everything else is laid out once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from lorahub_registry.adapters.facts import AdapterFacts
from lorahub_registry.runtime.operator import ScaledFactors, Stack, stacked
from lorahub_registry.weights.files import load_factors, load_flat
from lorahub_registry.weights.inspect import Place
from lorahub_registry.weights.lowrank import Deltas, LowRank

Coefficients = Sequence[float] | torch.Tensor


class Form(Protocol):
    """Coefficients in, deltas out.

    Attributes:
        sets: what each set of coefficients is for.
        pairs: (set, adapter) of each coefficient, set after set; only where there is something
            that it multiplies.
        size: how many coefficients there are.
        stacks: what the runtime's operator takes for the same function; None where it has none.
    """

    modules: tuple[str, ...]
    sets: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    size: int
    stacks: dict[str, Stack] | None

    def at(self, coefficients: Coefficients) -> Deltas:
        """The mixture's delta in each module, on the form's device; differentiable."""


class Layout:
    """Which coefficients a module takes: those of the whole model, of its layers, or its own.

    Attributes:
        names: what each set of coefficients is for: ``""`` for all, ``layers 0-3``, a module.
    """

    def __init__(self, modules: Collection[str], per: str = "model", layer_groups: int = 4) -> None:
        ordered = sorted(modules)
        if per == "module":
            self.names, self._group = tuple(ordered), {m: i for i, m in enumerate(ordered)}
        elif per == "layer_group":
            self.names, self._group = _by_layers(ordered, layer_groups)
        else:
            self.names, self._group = ("",), dict.fromkeys(ordered, 0)

    def __call__(self, module: str) -> int:
        return self._group[module]


class DeltaForm:
    """The exact weighted sum of adapters' deltas.

    Args:
        adapters: module → delta of each, or its factors with the scaling apart.
        device: where the stacks lie.
        layout: which modules share coefficients; None: all of them.
        embeddings: modules that are embeddings, where only factors are given.
    """

    def __init__(
        self,
        adapters: Sequence[Mapping[str, LowRank | ScaledFactors]],
        device: torch.device | str = "cpu",
        layout: Layout | None = None,
        embeddings: Collection[str] = (),
    ) -> None:
        layout = layout or Layout({name for parts in adapters for name in parts})
        # A set has no coefficient of an adapter that has none of its modules.
        here = {(layout(name), i) for i, parts in enumerate(adapters) for name in parts}
        self.pairs: tuple[tuple[int, int], ...] = tuple(sorted(here))
        numbers = {pair: n for n, pair in enumerate(self.pairs)}
        self.stacks: dict[str, Stack] | None = stacked(
            adapters, device=device, number=lambda name, i: numbers[layout(name), i]
        )
        parts = [part for deltas in adapters for part in deltas.items()]
        self._embeddings = {n for n, part in parts if getattr(part, "kind", "") == "embedding"}
        self._embeddings |= set(embeddings)
        self.modules = tuple(self.stacks)
        self.sets: tuple[str, ...] = layout.names
        self.size = len(self.pairs)
        self._device = device

    def at(self, coefficients: Coefficients) -> Deltas:
        """``[c₁B₁ … cₖBₖ]·[A₁; …; Aₖ]`` in each module."""
        assert self.stacks is not None
        c = _vector(coefficients, self.size).to(self._device)
        return {
            name: LowRank(
                stack.experts.a,
                stack.experts.b * c[stack.owner],
                "embedding" if name in self._embeddings else "linear",
            )
            for name, stack in self.stacks.items()
        }


class FactorForm:
    """LoraHub's product of two weighted sums; equal ranks, targets and scalings.

    All factors lie in one matrix [adapters, parameters], read straight from the files, so that a
    candidate is one product of a row with it.
    """

    stacks: dict[str, Stack] | None = None

    def __init__(
        self, adapters: Sequence[tuple[Path, AdapterFacts]], device: torch.device | str = "cpu"
    ) -> None:
        flat, self._places = load_flat(adapters)
        self._flat = flat.to(device)
        self._begins = sorted(begin for both in self._places.values() for begin in both)
        self._sizes = [
            end - begin
            for begin, end in zip(self._begins, [*self._begins[1:], flat.shape[1]], strict=True)
        ]
        self._modules = adapters[0][1].modules
        self.modules = tuple(m.name for m in self._modules)
        self.sets: tuple[str, ...] = ("",)
        self.size = len(adapters)
        self.pairs: tuple[tuple[int, int], ...] = tuple((0, i) for i in range(self.size))

    def at(self, coefficients: Coefficients) -> Deltas:
        """``s (Σ cᵢBᵢ)(Σ cᵢAᵢ)`` in each module, the scaling in B."""
        c = _vector(coefficients, self.size).to(self._flat.device)
        # One split: in a backward pass each slice would fill a whole row with zeros.
        parts = dict(zip(self._begins, (c @ self._flat).split(self._sizes), strict=True))
        deltas = {}
        for m in self._modules:
            at_a, at_b = self._places[m.name]
            a = parts[at_a].view(m.rank, m.fan_in)
            b = parts[at_b].view(m.fan_out, m.rank)
            deltas[m.name] = LowRank(
                a, b * m.scaling, "embedding" if m.kind == "embedding" else "linear"
            )
        return deltas


def _vector(coefficients: Coefficients, size: int) -> torch.Tensor:
    """[size], float32.

    Raises:
        ValueError: there are more or fewer; indexing would take the first of them in silence.
    """
    c = torch.as_tensor(coefficients, dtype=torch.float32)
    if c.shape != (size,):
        raise ValueError(f"{c.numel()} coefficients for {size}")
    return c


def make_form(
    adapters: Sequence[tuple[Path, AdapterFacts]],
    *,
    form: str = "delta",
    per: str = "model",
    layer_groups: int = 4,
    device: torch.device | str = "cpu",
) -> Form:
    """The form that a recipe's ``method`` asks for, over adapters in these folders."""
    if form == "factor":
        return FactorForm(adapters, device)
    modules = {m.name: m.kind for _, facts in adapters for m in facts.modules}
    return DeltaForm(
        [load_factors(*adapter) for adapter in adapters],
        device,
        Layout(modules, per, layer_groups),
        [name for name, kind in modules.items() if kind == "embedding"],
    )


def _by_layers(modules: list[str], wanted: int) -> tuple[tuple[str, ...], dict[str, int]]:
    """Neighbouring layers together, in as many groups as asked for, or one a layer if fewer.

    A module outside the numbered layers goes with the first of them, or with the last if its name
    tells that it comes after (``lm_head``).
    """
    layers = {m: (p.stack, p.layer) for m in modules if (p := Place.of(m)).layer is not None}
    # What an encoder says, the decoder reads.
    order = sorted(set(layers.values()), key=lambda at: ("decoder" in at[0], *at))
    count = max(1, min(wanted, len(order)))
    at = {layer: i * count // len(order) for i, layer in enumerate(order)}
    group = {
        m: at[layers[m]] if m in layers else (count - 1 if "head" in m else 0) for m in modules
    }
    names = []
    for g in range(count):
        inside = [f"{stack}.{n}" for stack, n in order if at[stack, n] == g]
        names.append(f"{inside[0]} to {inside[-1]}" if len(inside) > 1 else "".join(inside))
    return tuple(names), group
