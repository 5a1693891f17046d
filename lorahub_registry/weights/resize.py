"""An adapter of another rank: each module's delta, cut to the nearest of that rank."""

from __future__ import annotations

import torch

from lorahub_registry.weights.factorise import Cut, nothing
from lorahub_registry.weights.lowrank import weighted_sum
from lorahub_registry.weights.stream.adapter import AdapterFile
from lorahub_registry.weights.truncate import truncate


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
        """See :class:`~lorahub_registry.weights.factorise.Source`; in float64, by QR."""
        delta = self._file.delta(self.module)
        norm = delta.norm()
        if norm == 0 or rank == 0:
            return Cut(nothing(self.shape), norm, norm**2, torch.zeros(0))
        found = truncate(delta, rank=rank, energy=energy)
        written = found.delta.to("cpu", self._dtype)
        off = weighted_sum([{"": delta}, {"": written.to("cpu", torch.float32)}], [1, -1])[""]
        values = delta.singular_values()[: written.rank]
        return Cut(written, norm, off.norm() ** 2, values)

    def spectrum(self, count: int) -> torch.Tensor:
        """The leading singular values, at most ``count``: float64, descending."""
        return self._file.delta(self.module).singular_values()[:count]
