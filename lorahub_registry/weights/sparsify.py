"""Merging entry by entry: pruning by magnitude or at random, election of signs (TIES, DARE).

The arithmetic is that of PEFT's ``merge_utils``, on ΔW itself. ΔW of one adapter at a time is
formed, and formed again for every pass: how much memory it takes does not depend on how many
adapters there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lorahub_registry.weights.lowrank import LowRank

Prune = Callable[[torch.Tensor, float, int], torch.Tensor]
Elect = Literal["total", "frequency"]


@dataclass(frozen=True)
class Part:
    """One adapter's share in a module.

    Attributes:
        delta: on the device where the work is done.
        coefficient: multiplies its entries when signs are elected already.
        seed: of its random mask.
    """

    delta: LowRank
    coefficient: float
    seed: int


def merge(
    parts: Sequence[Part], prune: Prune, density: float, elect: Elect | None = None
) -> torch.Tensor:
    """The adapters' ΔW on one module, pruned and merged.

    Args:
        parts: of one shape, at least one.
        density: the share of entries that stay, in (0, 1].
        elect: how each entry's sign is elected: by the sum of the pruned entries (``total``) or of
            their signs (``frequency``); a draw is positive. Those that disagree are left out, and
            the others' mean is taken. None: all of them are summed.

    Returns:
        [fan_out, fan_in], float32. Coefficients are applied after pruning and election, as PEFT
        does: an adapter of coefficient 0 still votes.
    """
    votes = agreeing = None
    if elect is not None:
        for part in parts:
            pruned = _pruned(part, prune, density)
            votes = _plus(votes, pruned.sign() if elect == "frequency" else pruned)
    merged = None
    for part in parts:
        pruned = _pruned(part, prune, density)
        if votes is not None:
            agrees = torch.where(votes >= 0, pruned > 0, pruned < 0)
            agreeing = _plus(agreeing, agrees.to(torch.float32))
            pruned *= agrees
        merged = _plus(merged, pruned.mul_(part.coefficient))
    assert merged is not None
    return merged if agreeing is None else merged / agreeing.clamp_(min=1)


def by_magnitude(matrix: torch.Tensor, density: float, seed: int = 0) -> torch.Tensor:
    """``matrix`` with its ``int(density · entries)`` largest entries, the others 0.

    Entries of the very size of the smallest that stays stay, too: which of them do is not left to
    the order of a sort.
    """
    keep = int(density * matrix.numel())
    if density >= 1:
        return matrix
    if keep == 0:
        return torch.zeros_like(matrix)
    sizes = matrix.abs()
    least = sizes.flatten().kthvalue(matrix.numel() - keep + 1).values
    return matrix * (sizes >= least)


def at_random(matrix: torch.Tensor, density: float, seed: int) -> torch.Tensor:
    """``matrix`` with every entry kept with probability ``density`` and divided by it, else 0.

    The mask is drawn on the CPU: the same on every device.
    """
    if density >= 1:
        return matrix
    made = torch.Generator().manual_seed(seed)
    kept = torch.rand(matrix.shape, generator=made) < density
    return matrix * kept.to(matrix.device) / density


def mask_seed(seed: int, adapter: str, module: str) -> int:
    """The seed of one adapter's mask on one module: whatever else is mixed, in whatever order."""
    text = "\0".join([str(seed), adapter, module])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _pruned(part: Part, prune: Prune, density: float) -> torch.Tensor:
    return prune(part.delta.to(part.delta.a.device, torch.float32).dense(), density, part.seed)


def _plus(total: torch.Tensor | None, term: torch.Tensor) -> torch.Tensor:
    return term if total is None else total.add_(term)
