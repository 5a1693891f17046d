"""A LoRA from the difference of two models: module by module, its best approximation by rank.

Eckart–Young: of all matrices of rank r, the leading r singular directions of ΔW are the nearest.
Both factors take the square root of each singular value, and α is the rank, so that PEFT adds just
B·A. (Multi-LoRAs, https://github.com/uukuguy/multi_loras, writes α = 16 whatever the rank: at its
default rank of 64 a quarter of the delta is applied.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from lorahub_registry.errors import UsageError
from lorahub_registry.weights import truncate
from lorahub_registry.weights.factorise import Cut, nothing, singular_values
from lorahub_registry.weights.lowrank import LowRank
from lorahub_registry.weights.ranks import Ranks
from lorahub_registry.weights.stream.pairs import Models, Pair

Change = Callable[[Pair, torch.Tensor], torch.Tensor]
"""A parameter's difference, float32 as stored, into another of its shape; may be done in place."""

_NOISE = 1e-14  # of the base's energy: what its rounding in float32 is


@dataclass(frozen=True)
class How:
    """What decides an extraction's numbers, besides the models.

    Attributes:
        component: ``orthogonal`` leaves out what lies along the base's own matrix.
        clamp_quantile: factors' entries are cut to this quantile of their sizes; None: not.
        exact: all singular directions are computed, however large the matrix.
        dtype: of the written factors.
    """

    ranks: Ranks
    component: Literal["whole", "orthogonal"] = "whole"
    clamp_quantile: float | None = None
    exact: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0


def chosen(models: Models, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Pair]:
    """The matrices to extract from: all linear modules but the head, or those included.

    Args:
        include, exclude: a module's name, its end (``q_proj``), or a pattern (``*.layers.0.*``).

    Raises:
        UsageError: a pattern that matches nothing; a module that holds no matrix, or whose shape
            differs between the models; nothing is left.
    """
    matrices = {p.module: p for p in models.pairs if p.leaf == "weight" and p.kind != "other"}
    head = models.skeleton.head
    if include:
        names = _matching(matrices, include)
    else:
        names = {n for n, p in matrices.items() if p.kind != "embedding" and n != head}
    names -= _matching(matrices, exclude)
    if not names:
        raise UsageError("no module is left to extract from", hint="see --include and --exclude")
    if resized := sorted(n for n in names if matrices[n].resized):
        pair = matrices[resized[0]]
        raise UsageError(
            f"{resized[0]} is {list(pair.base.shape)} in the base and {list(pair.tuned.shape)} in "
            "the tuned model: added tokens have no difference",
            hint=f"leave it out: --exclude {resized[0]}",
        )
    ties = {first: other for other, first in models.skeleton.tied.items()}
    if tied := sorted(n for n in names if matrices[n].name in ties):
        raise UsageError(
            f"{tied[0]} is tied to {ties[matrices[tied[0]].name].rpartition('.')[0]}: an adapter "
            "would change one end of them",
            hint="--rest save keeps tied parameters whole, for both ends",
        )
    return [matrices[n] for n in sorted(names)]


def _matching(modules: Mapping[str, Pair], patterns: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        here = {n for n in modules if fnmatchcase(n, pattern) or f".{n}".endswith(f".{pattern}")}
        if not here:
            raise UsageError(
                f"{pattern!r} matches no linear module or embedding of the model",
                hint=f"one of them is {next(iter(modules), 'none')}",
            )
        found |= here
    return found


class Difference:
    """A parameter's difference between two models, as a module's ΔW.

    Args:
        change: what becomes of the difference before it is cut.
    """

    def __init__(self, models: Models, pair: Pair, how: How, change: Change | None = None) -> None:
        self.module = pair.module
        self.kind: Literal["linear", "embedding"] = (
            "embedding" if pair.kind == "embedding" else "linear"
        )
        # Conv1D has [fan_in, fan_out]; PEFT's embeddings take [tokens, dim] as fan_in, fan_out.
        self._turned = pair.kind != "linear"
        rows, columns = pair.tuned.shape
        self.shape = (columns, rows) if self._turned else (rows, columns)
        self._models, self._pair, self._how, self._change = models, pair, how, change

    def cut(self, rank: int | None, energy: float | None) -> Cut:
        """See :class:`~lorahub_registry.weights.factorise.Source`; at most 1.001 times the least
        error before the factors are rounded, and cut at a quantile.

        Raises:
            BaseModelError: a number that is none, or infinite.
        """
        how = self._how
        matrix, more = self._matrix()
        if rank == 0 or (rank is None and energy is None):
            norm = truncate.frobenius(matrix)
            if norm == 0 or rank == 0:
                return Cut(nothing(self.shape), norm, norm**2, torch.zeros(0), more)
            written = _whole(matrix, how.dtype)
            large = written.b if written.b.shape == matrix.shape else written.a
            lost = truncate.rounding(matrix, large) ** 2
            return Cut(written.to("cpu"), norm, lost, truncate.singular_values(matrix), more)
        found = truncate.truncate_dense(
            matrix, rank=rank, energy=energy, seed=how.seed, exact=how.exact
        )
        norm = math.sqrt(found.energy)
        if norm == 0:
            return Cut(nothing(self.shape), 0.0, 0.0, torch.zeros(0), more)
        delta, lost, values = found.delta, found.lost, singular_values(found.delta)
        if how.clamp_quantile is not None:
            delta = _clamped(delta, how.clamp_quantile)
        written = delta.to(matrix.device, how.dtype)
        if how.clamp_quantile is not None or how.dtype != matrix.dtype:
            lost = truncate.distance(matrix, written.b, written.a) ** 2
        return Cut(written.to("cpu"), norm, lost, values, more)

    def spectrum(self, count: int) -> torch.Tensor:
        """The leading singular values, at most ``count``: float64, descending."""
        matrix, _ = self._matrix()
        if count >= min(self.shape):
            return truncate.singular_values(matrix)
        found = truncate.truncate_dense(
            matrix, rank=count, seed=self._how.seed, exact=self._how.exact
        )
        return singular_values(found.delta)

    def _matrix(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """ΔW, float32 on the device, and what the report tells of how it came about."""
        delta = self._models.difference(self._pair, device=self._how.device)
        more = {}
        if self._change is not None:
            delta = self._change(self._pair, delta)
        if self._how.component == "orthogonal":
            more["along_base"] = self._orthogonal(delta)
        return (delta.T if self._turned else delta), more

    def _orthogonal(self, delta: torch.Tensor) -> float:
        """Take ⟨ΔW, W⟩/⟨W, W⟩ · W from ``delta``, in place; the share of its energy that it was."""
        base, name = self._models.base, self._pair.base.info.name
        before = truncate.frobenius(delta) ** 2
        inner = square = 0.0
        for begin, end in self._pair.base.blocks():
            rows = base.rows(name, begin, end).to(delta.device, torch.float64)
            inner += float((rows * delta[begin:end]).sum())
            square += float(rows.square().sum())
            base.forget(name, begin, end)
        if not before or not square:
            return 0.0
        for begin, end in self._pair.base.blocks():
            rows = base.rows(name, begin, end).to(delta.device, torch.float32)
            delta[begin:end].sub_(rows, alpha=inner / square)
            base.forget(name, begin, end)
        if truncate.frobenius(delta) ** 2 < _NOISE * square:
            delta.zero_()
        return inner * inner / square / before


def base_norm(models: Models, pair: Pair) -> float:
    """Frobenius norm of the base's own weight."""
    parts = []
    for begin, end in pair.base.blocks():
        rows = models.base.rows(pair.base.info.name, begin, end).float()
        parts.append(float(torch.linalg.vector_norm(rows, dtype=torch.float64)))
        models.base.forget(pair.base.info.name, begin, end)
    return math.hypot(*parts)


def _whole(matrix: torch.Tensor, dtype: torch.dtype) -> LowRank:
    """``matrix`` itself beside an identity: full rank, its entries rounded to ``dtype``."""
    rows, columns = matrix.shape
    unit = torch.eye(min(rows, columns), device=matrix.device, dtype=dtype)
    large = matrix.to(dtype)
    return LowRank(unit, large) if columns <= rows else LowRank(large, unit)


def _clamped(delta: LowRank, quantile: float) -> LowRank:
    """Both factors' entries cut to the quantile of their sizes together."""
    sizes = torch.cat([delta.a.flatten(), delta.b.flatten()]).abs()
    most = float(sizes.kthvalue(max(1, math.ceil(quantile * sizes.numel()))).values)
    return LowRank(delta.a.clamp(-most, most), delta.b.clamp(-most, most))
