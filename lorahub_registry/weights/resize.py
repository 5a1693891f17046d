"""An adapter of another rank: each module's delta, cut to the nearest of that rank."""

from __future__ import annotations

from typing import Literal

import torch

from lorahub_registry.adapters.facts import ModuleFacts
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters
from lorahub_registry.weights.factorise import Cut, nothing
from lorahub_registry.weights.lowrank import LowRank, weighted_sum
from lorahub_registry.weights.stream.checkpoint import Checkpoint
from lorahub_registry.weights.truncate import truncate


class Stored:
    """One module of an adapter's file, as a source of factors.

    Args:
        file: open.
        dtype: of the factors to write.

    Raises:
        IncompatibleAdapters: it is a convolution.
    """

    def __init__(self, file: Checkpoint, module: ModuleFacts, dtype: torch.dtype) -> None:
        if module.kind == "conv":
            raise IncompatibleAdapters(f"{module.name} is conv LoRA, which is no matrix")
        self.module = module.name
        self.kind: Literal["linear", "embedding"] = (
            "embedding" if module.kind == "embedding" else "linear"
        )
        self.shape = (module.fan_out, module.fan_in)
        self._file, self._facts, self._dtype = file, module, dtype

    def cut(self, rank: int | None, energy: float | None) -> Cut:
        """See :class:`~lorahub_registry.weights.factorise.Source`; in float64, by QR.

        Raises:
            BrokenAdapter: a tensor holds NaN or infinity.
        """
        delta = self._delta()
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
        return self._delta().singular_values()[:count]

    def _delta(self) -> LowRank:
        parts = []
        for key in (self._facts.key_a, self._facts.key_b):
            part = self._file.rows(key).float()
            if not torch.isfinite(part).all():
                raise BrokenAdapter(
                    f"{self._file.folder}: {key} holds NaN or infinity",
                    hint="its training diverged, or the file is damaged",
                )
            self._file.forget(key)
            parts.append(part)
        a, b = parts
        return LowRank(a, b * self._facts.scaling, self.kind)
