"""What of its input each adapter answers to: the prototypes of Arrow (arXiv:2405.11157).

An expert's prototype on a module is the top right singular vector of its delta ΔW = B·A, the input
direction that the delta changes most. It comes from r x r matrices; ΔW is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorahub_registry.weights.lowrank import Deltas, LowRank, same_shape, weighted_sum


def prototypes(adapters: Sequence[Deltas]) -> dict[str, torch.Tensor]:
    """Module → [experts, fan_in], float32, on the deltas' device: every expert's prototype there.

    A row has norm 1, or is zero where that adapter does not sit on the module or changes nothing.
    Ranks and targets may differ. Modules are sorted by name.

    A singular vector has no sign of its own: here its largest entry (of several, the first) is
    positive. Where the two largest singular values are equal up to rounding there is no one
    vector, and the row is one of the subspace that they share: ``|ΔW·v| ≥ (1 - 1e-6)·‖ΔW‖₂``
    holds always.

    Raises:
        IncompatibleAdapters: a module whose shapes differ.
    """
    found = {}
    for name in sorted({name for deltas in adapters for name in deltas}):
        there = [deltas[name] for deltas in adapters if name in deltas]
        same_shape(name, *there)
        rows = there[0].a.new_zeros(len(adapters), there[0].shape[1], dtype=torch.float32)
        for row, deltas in zip(rows, adapters, strict=True):
            if name in deltas:
                row.copy_(top_right_singular_vector(deltas[name]))
        found[name] = rows
    return found


def top_right_singular_vector(delta: LowRank) -> torch.Tensor:
    """[fan_in], float32: of ΔW; zero where ΔW = 0. For sign and ties see :func:`prototypes`.

    ``ΔW = Q_b·C·Q_aᵀ`` with orthonormal Qs, so it is Q_a times that of the r x r core C, all in
    float64. Rank-sized work, as PEFT's Arrow does it, but no iteration that ends too early where
    singular values lie close together.
    """
    _, core, q_a = delta.core()
    _, values, right = torch.linalg.svd(core)
    # What float32 factors leave of terms that cancel is rounding, and has no direction.
    size = delta.a.double().norm() * delta.b.double().norm()
    if not values[0] > torch.finfo(torch.float32).eps * size:
        return delta.a.new_zeros(delta.shape[1], dtype=torch.float32)
    vector = q_a @ right[0]
    return (vector * vector[vector.abs().argmax()].sign()).float()


def without_general(adapters: Sequence[Deltas], general: Sequence[Deltas]) -> list[Deltas]:
    """GenKnowSub (arXiv:2505.10939): each adapter less the mean of the general adapters.

    ``ΔW_i - (1/G)·Σ ΔW_g`` on every module that any of them sits on, also where the adapter itself
    does not; a general adapter that does not sit on a module counts as zero there. Exact: factors
    are stacked, so ranks add up. (PEFT takes the means of A and of B off each factor, which is
    another product: it leaves cross terms, and wants equal ranks and targets.)

    Raises:
        ValueError: there is no general adapter.
        IncompatibleAdapters: a module whose shapes differ.
    """
    if not general:
        raise ValueError("without_general needs a general adapter")
    share = -1 / len(general)
    return [
        weighted_sum([one, *general], [1.0, *[share] * len(general)]) for one in adapters
    ]  # fmt: skip
