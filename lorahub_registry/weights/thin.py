"""DARE on an adapter: each module's delta, dropped as a whole matrix and cut to a rank again."""

from __future__ import annotations

import torch

from lorahub_registry.weights.dare import Drop
from lorahub_registry.weights.factorise import Cut, nothing, singular_values
from lorahub_registry.weights.resize import narrowed
from lorahub_registry.weights.stream.adapter import AdapterFile
from lorahub_registry.weights.truncate import distance, frobenius, truncate_dense
from lorahub_registry.weights.truncate import singular_values as dense_values


class Thinned:
    """One module of an adapter's file with entries of its ΔW dropped, as a source of factors.

    Args:
        dtype: of the factors to write.
        device: where ΔW is formed, dropped and cut; one that has float64.
    """

    def __init__(
        self, file: AdapterFile, module: str, drop: Drop, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        delta = file.modules[module]
        self.module, self.kind = module, file.kind(module)
        self.shape = (delta.fan_out, delta.fan_in)
        self._file, self._drop, self._dtype, self._device = file, drop, dtype, device

    def cut(self, rank: int | None, energy: float | None) -> Cut:
        """See :class:`~lorahub_registry.weights.factorise.Source`; with neither, to its own rank.

        ``more`` tells of the drop: ``drop`` holds the ``kept`` entries of ``entries``,
        ``energy_kept``, the share of ΔW's squared norm in them before rescaling (None where ΔW is
        zero), and ``norm``, ΔW's own.

        Raises:
            NotApplied: the factors are more than their dtype holds.
        """
        if rank is None and energy is None:
            rank = min(self._file.modules[self.module].rank, *self.shape)
        dense, before, kept = self._dropped()
        norm = frobenius(dense)
        share = (norm / self._drop.scale / before) ** 2 if before else None
        told = {"kept": kept, "entries": dense.numel(), "energy_kept": share, "norm": before}
        if norm == 0 or rank == 0:
            return Cut(nothing(self.shape), norm, norm**2, torch.zeros(0), {"drop": told})
        found = truncate_dense(dense, rank=rank, energy=energy, seed=self._drop.seed)
        hint = "take a lower --rate, or --no-rescale"
        written = narrowed(self.module, found.delta, self._dtype, hint)
        # Of what is written: rounding the factors costs, too.
        lost = distance(dense, written.b.to(self._device), written.a.to(self._device))
        return Cut(written, norm, lost**2, singular_values(found.delta), {"drop": told})

    def spectrum(self, count: int) -> torch.Tensor:
        """The leading singular values, at most ``count``: float64, descending."""
        return dense_values(self._dropped()[0])[:count]

    def _dropped(self) -> tuple[torch.Tensor, float, int]:
        """ΔW without its dropped entries, its norm before, and how many entries stay."""
        dense = self._file.delta(self.module).to(self._device).dense().contiguous()
        before = frobenius(dense)
        return dense, before, self._drop.thin(self.module, dense)
