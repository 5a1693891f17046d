"""An adapter of another rank: each module's delta, cut to the nearest of that rank."""

from __future__ import annotations

import torch

from lorahub_registry.errors import NotApplied
from lorahub_registry.weights.factorise import Cut, nothing, singular_values
from lorahub_registry.weights.lowrank import LowRank, weighted_sum
from lorahub_registry.weights.stream.adapter import AdapterFile
from lorahub_registry.weights.truncate import distance, frobenius, truncate, truncate_dense
from lorahub_registry.weights.truncate import singular_values as dense_values


class Stored:
    """One module of an adapter's file, as a source of factors.

    Args:
        dtype: of the factors to write.
    """

    def __init__(self, file: AdapterFile, module: str, dtype: torch.dtype) -> None:
        delta = file.modules[module]
        self.module, self.kind = module, file.kind(module)
        self.shape = (delta.fan_out, delta.fan_in)
        self._file, self._dtype = file, dtype

    def cut(self, rank: int | None, energy: float | None) -> Cut:
        """See :class:`~lorahub_registry.weights.factorise.Source`; in float64.

        By QR of the factors, or, where these are as large as the matrix, of the matrix itself.

        Raises:
            NotApplied: the factors are more than their dtype holds.
        """
        delta = self._file.delta(self.module)
        if _large(delta):
            return self._cut_dense(delta, rank, energy)
        norm = delta.norm()
        if norm == 0 or rank == 0:
            return Cut(nothing(self.shape), norm, norm**2, torch.zeros(0))
        found = truncate(delta, rank=rank, energy=energy)
        written = narrowed(self.module, found.delta, self._dtype, _WIDER)
        off = weighted_sum([{"": delta}, {"": written.to("cpu", torch.float32)}], [1, -1])[""]
        values = delta.singular_values()[: written.rank]
        return Cut(written, norm, off.norm() ** 2, values)

    def _cut_dense(self, delta: LowRank, rank: int | None, energy: float | None) -> Cut:
        dense, most = _dense(delta), min(delta.rank, *self.shape)
        norm = frobenius(dense)
        if norm == 0 or rank == 0:
            return Cut(nothing(self.shape), norm, norm**2, torch.zeros(0))
        found = truncate_dense(dense, rank=most if rank is None else min(rank, most), energy=energy)
        written = narrowed(self.module, found.delta, self._dtype, _WIDER)
        lost = distance(dense, written.b, written.a)
        return Cut(written, norm, lost**2, singular_values(found.delta))

    def spectrum(self, count: int) -> torch.Tensor:
        """The leading singular values, at most ``count``: float64, descending."""
        delta = self._file.delta(self.module)
        if _large(delta):
            return dense_values(_dense(delta))[: min(count, delta.rank)]
        return delta.singular_values()[:count]


_WIDER = "--dtype bfloat16 or float32 holds them"


def narrowed(module: str, delta: LowRank, dtype: torch.dtype, hint: str) -> LowRank:
    """``delta`` in the dtype to write, on the CPU.

    Raises:
        NotApplied: an entry is more than that holds.
    """
    written = delta.to("cpu", dtype)
    if not (torch.isfinite(written.a).all() and torch.isfinite(written.b).all()):
        raise NotApplied(
            f"{module}: its factors are more than {str(dtype).removeprefix('torch.')} holds",
            hint=hint,
        )
    return written


def _large(delta: LowRank) -> bool:
    """Whether QR of the factors costs more than the matrix that they make."""
    m, n = delta.shape
    return 2 * delta.rank * (m + n) > m * n


def _dense(delta: LowRank) -> torch.Tensor:
    return delta.b.double() @ delta.a.double()
