"""Experts of several adapters in one feed-forward module, to train: each row has its own adapter.

A share's rows go through its adapter's experts (:mod:`~lorahub_registry.runtime.moe`), the others
through the module as it is, whose linear modules have the others' plain LoRA beside them. Padding
goes through neither: what an adapter learns does not hang on who shares its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from lorahub_registry.adapters.mixlora import MixLora, Switch
from lorahub_registry.runtime.flow import NO_BACKWARD
from lorahub_registry.runtime.mixture import RowsMerged
from lorahub_registry.runtime.mlp import Mlp
from lorahub_registry.runtime.moe import MoeExperts, combined, logits_of, route, router_losses
from lorahub_registry.runtime.seeds import seed_of


@dataclass(frozen=True)
class LayerExperts:
    """One adapter's experts in one layer, to train.

    Attributes:
        index: of the layer, from 0.
        experts: leaf tensors, whose gradients are added to where they are.
    """

    index: int
    mlp: Mlp
    experts: MoeExperts
    mix: MixLora


class Sharing(Protocol):
    """What :class:`~.grouped.Grouped` is to its layers."""

    shares: Sequence[Any]
    real: torch.Tensor | None
    noted: dict[tuple[int, int], tuple[torch.Tensor, MixLora]]


class ExpertLayer:
    """One feed-forward module of the base with the experts of those adapters that have some."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        held: Sequence[LayerExperts | None],
        owner: Sharing,
    ) -> None:
        self.name, self.held = name, held
        self.module: Any = module
        self._owner, self._plainly = owner, module.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the module gives, or each row's experts: [rows, positions, width]."""
        shares = list(self._owner.shares)
        if not any(self.held[share.adapter] for share in shares):
            return self._plainly(x)
        last = max(share.stop for share in shares)
        if x.dim() != 3 or x.shape[0] < last:
            raise RowsMerged(
                f"{self.name} gets its rows as {tuple(x.shape[:-1])}, so they cannot have experts "
                "of their own there",
                hint="train the adapter as plain LoRA",
            )
        parts, plain = [], []
        for number, share in enumerate(shares):
            if self.held[share.adapter] is None:
                plain.append(share)
                continue
            parts += self._others(x, plain)
            plain = []
            parts.append(self._experts(number, share, x[share.start : share.stop]))
        parts += self._others(x, plain)
        if last < x.shape[0]:
            with self._only([]):
                parts.append(self._plainly(x[last:]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _others(self, x: torch.Tensor, shares: Sequence[Any]) -> list[torch.Tensor]:
        """Consecutive shares without experts, through the module."""
        if not shares:
            return []
        start, stop = shares[0].start, shares[-1].stop
        moved = [type(s)(s.adapter, s.start - start, s.stop - start, s.seed) for s in shares]
        with self._only(moved):
            return [self._plainly(x[start:stop])]

    def _experts(self, number: int, share: Any, x: torch.Tensor) -> torch.Tensor:
        held = self.held[share.adapter]
        assert held is not None
        mix, experts = held.mix, held.experts
        real = self._owner.real
        where = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if real is not None:
            where = real[share.start : share.stop]
        flat = x[where]
        with self._only([]), seeded(share.seed, self.name, x.device):
            trains = share.seed is not None
            seen = flat
            if trains and mix.jitter_noise:
                seen = flat * torch.empty_like(flat).uniform_(
                    1 - mix.jitter_noise, 1 + mix.jitter_noise
                )
                flat = flat if isinstance(mix.routing, Switch) else seen
            logits = logits_of(seen, experts.gate)
            if isinstance(mix.routing, Switch):
                # Room is counted row by row, and rows are of several lengths.
                padded = logits.new_zeros(*x.shape[:2], logits.shape[-1])
                padded[where] = logits
                chosen = route(
                    padded.flatten(0, 1), mix.routing, rows=x.shape[0], real=where.flatten()
                )
                chosen = chosen.among(where.flatten())
            else:
                chosen = route(logits, mix.routing)
            found = combined(held.mlp, experts, flat, chosen, dropout=trains)
            if trains and isinstance(mix.routing, Switch) and mix.routing.dropout:
                found = functional.dropout(found, mix.routing.dropout)
        if trains and torch._C._current_graph_task_id() == NO_BACKWARD:
            self._owner.noted[number, held.index] = logits, mix
        return found.new_zeros(x.shape).masked_scatter(where[..., None], found)

    @contextmanager
    def _only(self, shares: Sequence[Any]) -> Iterator[None]:
        """The linear modules below are of these rows meanwhile."""
        before, self._owner.shares = self._owner.shares, shares
        try:
            yield
        finally:
            self._owner.shares = before


@contextmanager
def seeded(seed: int | None, name: str, device: torch.device) -> Iterator[None]:
    """What is drawn in the block follows from ``seed`` and ``name`` alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, name))
        yield


def losses_of(
    noted: Mapping[tuple[int, int], tuple[torch.Tensor, MixLora]],
) -> dict[int, torch.Tensor]:
    """Number of a share → what its router is held to in this forward."""
    found: dict[int, torch.Tensor] = {}
    for number in sorted({number for number, _ in noted}):
        layers = [noted[key] for key in sorted(noted) if key[0] == number]
        mix = layers[0][1]
        if mix.router_loss:
            losses = router_losses([logits for logits, _ in layers], mix)
            found[number] = torch.stack(list(losses.values())).sum()
    return found
