"""Low-rank deltas and what can be done with them without forming the dense matrix.

A module's delta is ``ΔW = B·A`` with the adapter's scaling folded into B. A weighted sum of deltas
is exact when the factors are stacked: ``Σ cᵢBᵢAᵢ = [c₁B₁ … cₖBₖ]·[A₁; …; Aₖ]``. Norms and spectra
come from a QR of both stacks and the small core between them, inner products from products of the
factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lorahub_registry.errors import IncompatibleAdapters


@dataclass(frozen=True)
class LowRank:
    """One module's delta ``B·A``.

    Attributes:
        a: [rank, fan_in], floating point.
        b: [fan_out, rank], same dtype and device; the adapter's scaling is folded in.
        kind: where it goes. An ``embedding`` has a row for each token, so that its weight
            [tokens, dim] is changed by ``(B·A)ᵀ``: fan_in is the number of tokens.
    """

    a: torch.Tensor
    b: torch.Tensor
    kind: Literal["linear", "embedding"] = "linear"

    @property
    def rank(self) -> int:
        """Columns of B, whatever their numerical rank."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(fan_out, fan_in)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of both factors."""
        return self.a.dtype

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LowRank:
        """The same delta on another device, or in another dtype."""
        return LowRank(self.a.to(device, dtype), self.b.to(device, dtype), self.kind)

    def scaled(self, factor: float) -> LowRank:
        """``factor`` times the delta."""
        return LowRank(self.a, self.b * factor, self.kind)

    def dense(self) -> torch.Tensor:
        """ΔW, [fan_out, fan_in]."""
        return self.b @ self.a

    def core(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(Q_b, C, Q_a)`` with ``ΔW = Q_b·C·Q_aᵀ``, all float64; the Qs' columns are orthonormal.

        Float64, because a mixture's terms may cancel: what is left can be small beside them.
        """
        q_b, r_b = torch.linalg.qr(self.b.double())
        q_a, r_a = torch.linalg.qr(self.a.double().T)
        return q_b, r_b @ r_a.T, q_a

    def norm(self) -> float:
        """Frobenius norm of ΔW."""
        return float(self.core()[1].norm())

    def inner(self, other: LowRank) -> float:
        """``⟨ΔW₁, ΔW₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ))``, in float64.

        Raises:
            IncompatibleAdapters: the shapes differ.
        """
        same_shape("", self, other)
        b = self.b.double().T @ other.b.double()
        return float((b * (self.a.double() @ other.a.double().T)).sum())

    def singular_values(self) -> torch.Tensor:
        """Of ΔW, descending: float64, [min(rank, fan_out, fan_in)]; the others are 0."""
        return torch.linalg.svdvals(self.core()[1])

    def effective_rank(self) -> float:
        """How many directions share the energy, see :func:`effective_rank`."""
        return effective_rank(self.singular_values())


def effective_rank(singular_values: torch.Tensor) -> float:
    """How many directions share the energy: exp of the entropy of its shares; 0 for ΔW = 0.

    The definition of Roy & Vetterli (2007), with squared singular values as the shares: r equal
    ones give r, a single one gives 1.
    """
    squares = singular_values.double().square()
    if not (total := float(squares.sum())) > 0:
        return 0.0
    return math.exp(float(torch.special.entr(squares / total).sum()))


Deltas = Mapping[str, LowRank]
"""Module name in the base → its delta: an adapter as the algebra sees it."""


def weighted_sum(adapters: Sequence[Deltas], coefficients: Sequence[float]) -> dict[str, LowRank]:
    """``Σ cᵢΔWᵢ`` module by module, exact; ranks, targets and patterns may differ.

    Adapters with coefficient 0 leave no trace. Modules are sorted by name.

    Raises:
        ValueError: another number of coefficients than adapters.
        IncompatibleAdapters: a module whose shapes differ.
    """
    parts: dict[str, list[LowRank]] = {}
    for deltas, coefficient in zip(adapters, coefficients, strict=True):
        if coefficient != 0:
            for name, delta in deltas.items():
                parts.setdefault(name, []).append(delta.scaled(coefficient))
    for name, there in parts.items():
        same_shape(name, *there)
    return {
        name: LowRank(
            torch.cat([p.a for p in parts[name]]),
            torch.cat([p.b for p in parts[name]], 1),
            parts[name][0].kind,
        )
        for name in sorted(parts)
    }


def factor_sum(adapters: Sequence[Deltas], coefficients: Sequence[float]) -> dict[str, LowRank]:
    """LoraHub's product of sums, ``(Σ cᵢBᵢ)(Σ cᵢAᵢ)``, module by module (arXiv:2307.13269).

    Another function than the sum of deltas: it has cross terms. All adapters need the same
    modules, ranks and scalings (:func:`~lorahub_registry.adapters.compat.check_factors`).

    Raises:
        ValueError: another number of coefficients than adapters.
    """
    found = {}
    for name, first in sorted(adapters[0].items()):
        pairs = [(c, d[name]) for d, c in zip(adapters, coefficients, strict=True)]
        a = torch.stack([c * d.a for c, d in pairs]).sum(0)
        b = torch.stack([c * d.b for c, d in pairs]).sum(0)
        found[name] = LowRank(a, b, first.kind)
    return found


def same_shape(module: str, *deltas: LowRank) -> None:
    """Whether all ``deltas`` fit one module.

    Raises:
        IncompatibleAdapters: names the module and both shapes.
    """
    for other in deltas[1:]:
        if (one := deltas[0]).shape != other.shape or one.kind != other.kind:
            shapes = [f"{d.kind} {d.shape[0]}x{d.shape[1]}" for d in (one, other)]
            raise IncompatibleAdapters(
                f"{module or 'a module'} is {shapes[0]} in one adapter and {shapes[1]} in another",
                hint="they were made for different bases; leave one out",
            )
