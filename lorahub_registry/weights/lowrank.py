"""Low-rank deltas and what can be done with them without forming the dense matrix.

A module's delta is ``ΔW = B·A`` with the adapter's scaling folded into B. A weighted sum of deltas
is exact when the factors are stacked: ``Σ cᵢBᵢAᵢ = [c₁B₁ … cₖBₖ]·[A₁; …; Aₖ]``. Truncation to the
best rank r (Eckart–Young) takes a QR of both stacks and an SVD of the small core between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRank:
    """One module's delta ``B·A``.

    Attributes:
        a: [rank, fan_in], floating point.
        b: [fan_out, rank], same dtype and device; the adapter's scaling is folded in.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """Columns of B, whatever their numerical rank."""
        return self.a.shape[0]

    def scaled(self, factor: float) -> LowRank:
        """``factor`` times the delta."""
        return LowRank(self.a, self.b * factor)

    def dense(self) -> torch.Tensor:
        """ΔW, [fan_out, fan_in]."""
        return self.b @ self.a

    def norm(self) -> float:
        """Frobenius norm of ΔW, from the factors' small Gram matrices in float64."""
        a, b = self.a.double(), self.b.double()
        return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())


Deltas = Mapping[str, LowRank]
"""Module name in the base → its delta: an adapter as the algebra sees it."""


def weighted_sum(adapters: Sequence[Deltas], coefficients: Sequence[float]) -> dict[str, LowRank]:
    """``Σ cᵢΔWᵢ`` module by module, exact; ranks, targets and patterns may differ.

    Adapters with coefficient 0 leave no trace. Modules are sorted by name.

    Raises:
        ValueError: another number of coefficients than adapters.
    """
    parts: dict[str, list[LowRank]] = {}
    for deltas, coefficient in zip(adapters, coefficients, strict=True):
        if coefficient != 0:
            for name, delta in deltas.items():
                parts.setdefault(name, []).append(delta.scaled(coefficient))
    return {
        name: LowRank(
            torch.cat([p.a for p in parts[name]]), torch.cat([p.b for p in parts[name]], 1)
        )
        for name in sorted(parts)
    }


@dataclass(frozen=True)
class Truncated:
    """A truncation and what it cost.

    Attributes:
        delta: the best approximation of its rank.
        kept: share of the squared Frobenius norm that it holds, 0 to 1.
        energy: the squared Frobenius norm of what was truncated.
    """

    delta: LowRank
    kept: float
    energy: float


def truncate(delta: LowRank, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """The best approximation of ``delta`` by rank, or by the share of energy it must keep.

    Args:
        rank: at most this rank.
        energy: the smallest rank that keeps this share of the squared Frobenius norm.

    The work is done in float64; the result has the input's dtype, B and A sharing the singular
    values evenly. The rank is never more than the matrix has, and never less than 1.
    """
    qb, rb = torch.linalg.qr(delta.b.double())
    qa, ra = torch.linalg.qr(delta.a.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    squares = s.square()
    total = float(squares.sum())
    keep = s.numel() if rank is None else max(1, min(rank, s.numel()))
    if energy is not None:
        # A share within rounding of the asked one counts as kept; of nothing, one rank is all.
        shares = squares.cumsum(0) / total if total > 0 else torch.ones_like(s)
        keep = min(keep, int((shares < energy - 1e-12).sum()) + 1)
    root = s[:keep].sqrt()
    kept = float(squares[:keep].sum()) / total if total > 0 else 1.0
    dtype = delta.a.dtype
    a, b = root[:, None] * (vh[:keep] @ qa.T), (qb @ u[:, :keep]) * root
    return Truncated(LowRank(a.to(dtype).contiguous(), b.to(dtype).contiguous()), kept, total)
