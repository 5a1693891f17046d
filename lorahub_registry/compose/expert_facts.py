"""What routers do over rows: how many tokens each expert gets, how loud, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from lorahub_registry.compose.expert_parts import Parts
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.nll import label_logits
from lorahub_registry.evaluate.stock import stock_peft
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.recipes.mixlora import MixLora
from lorahub_registry.runtime.moe import Chosen

DEAD = 0.001
"""An expert that a smaller share of a layer's tokens chooses does next to nothing there."""


@dataclass(frozen=True)
class Seen:
    """One layer's router over rows, padding left out.

    Attributes:
        load: float64 [experts], the share of tokens that each expert is chosen by; they add up to
            top_k.
        weight: float64 [experts], its mean weight, 0 where it is not chosen; they add up to 1.
        entropy: mean over the tokens, of the softmax over all experts, in nats.
    """

    load: torch.Tensor
    weight: torch.Tensor
    entropy: float


@dataclass(frozen=True)
class ExpertRouter:
    """How a MixLoRA decides, and what that comes to over the training rows.

    Attributes:
        top_k: experts of a token.
        attention: adapter → coefficient of its part of the attention.
        trained: what was: ``routers``, or ``routers and experts``.
        load: layer → expert → share of the layer's tokens that chose it.
        entropy: layer → the router's mean entropy, in nats.
        entropy_share: layer → that as a share of the most there can be, log E.
        dead: ``layer 3: shakespeare`` of each expert that fewer than :data:`DEAD` of a layer's
            tokens choose.
    """

    type: ClassVar[str] = "mixlora"
    peft_type: ClassVar[str] = "MIXLORA"
    top_k: int
    attention: dict[str, float]
    trained: str
    load: dict[str, dict[str, float]]
    entropy: dict[str, float]
    entropy_share: dict[str, float]
    dead: tuple[str, ...]

    @classmethod
    def of(
        cls,
        method: MixLora,
        names: Sequence[str],
        attention: Sequence[float],
        parts: Parts,
        seen: dict[int, Seen],
    ) -> ExpertRouter:
        """From what was :func:`observed`."""
        layers = {parts.layer_name(i): one for i, one in sorted(seen.items())}
        most = math.log(len(names))
        return cls(
            top_k=method.top_k,
            attention=dict(zip(names, attention, strict=True)),
            trained="routers and experts" if method.train_experts else "routers",
            load={
                layer: dict(zip(names, one.load.tolist(), strict=True))
                for layer, one in layers.items()
            },
            entropy={layer: one.entropy for layer, one in layers.items()},
            entropy_share={layer: one.entropy / most for layer, one in layers.items()},
            dead=tuple(
                f"layer {i}: {name}"
                for i, one in sorted(seen.items())
                for name, load in zip(names, one.load.tolist(), strict=True)
                if load < DEAD
            ),
        )


@torch.inference_mode()
def observed(
    base: LoadedBase, folder: Path, rows: Sequence[Encoded], experts: int
) -> dict[int, Seen]:
    """Layer's number → what its router does over the rows, prompts and answers alike.

    Args:
        folder: of the MixLoRA, as it was written.
        experts: how many there are.
    """
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, float] = {}

    def seen(
        _: str, layer: int, logits: torch.Tensor, chosen: Chosen, real: torch.Tensor | None
    ) -> None:
        there = torch.ones(len(logits), dtype=torch.float64, device=logits.device)
        if real is not None:
            there = real.double()
        probabilities = logits.double().softmax(-1)
        entropy = torch.special.entr(probabilities).sum(-1)
        # Line by line: how often each is chosen, how loud, and the entropy.
        found = torch.zeros(3, experts, dtype=torch.float64, device=logits.device)
        counted = there[chosen.token]
        found[0].index_add_(0, chosen.expert, counted)
        found[1].index_add_(0, chosen.expert, counted * chosen.weight.double())
        found[2] = (entropy * there).sum()
        sums[layer] = sums.get(layer, 0) + found.cpu()
        counts[layer] = counts.get(layer, 0.0) + float(there.sum())

    with stock_peft(base, folder) as model, model.watching(seen):
        for batch in base.batches(rows):
            label_logits(model, batch, sliced=True)
    means = {layer: total / counts[layer] for layer, total in sums.items()}
    return {layer: Seen(m[0], m[1], float(m[2, 0])) for layer, m in means.items()}
