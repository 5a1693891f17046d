"""Several rows in one line of a batch, none of which sees another.

A pack is a tuple of rows that lie one after the other. Positions start anew in each, and the
attention mask is block-diagonal and causal, so that every row has the loss it has alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lorahub_registry.errors import BaseModelError, DataError
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.nll import keeps_logits, token_losses
from lorahub_registry.evaluate.tokens import IGNORED, Batch, Encoded, one_batch


def pack(rows: Sequence[Encoded], length: int) -> list[tuple[Encoded, ...]]:
    """Lay ``rows`` into packs of at most ``length`` tokens, each row into the first that has room.

    First-fit decreasing: the longest rows first, among equals the earlier, so that the same rows
    give the same packs. It needs at most 11/9 of the fewest possible packs and one more (Johnson,
    "Near-optimal bin packing algorithms", 1973).

    Raises:
        DataError: a row is longer than ``length``.
    """
    order = sorted(range(len(rows)), key=lambda i: (-_length(rows[i]), i))
    if order and _length(rows[order[0]]) > length:
        longest = rows[order[0]]
        raise DataError(
            f"{longest.place or f'row {order[0] + 1}'}: has {_length(longest)} tokens, and a pack "
            f"{length}"
        )
    # room[size + n]: what is free in pack n; above it, the most that is free in any pack below.
    size = 1 << max(0, len(rows) - 1).bit_length()
    room = [length] * (2 * size)
    packs: list[list[Encoded]] = []
    for i in order:
        needed, node = _length(rows[i]), 1
        while node < size:
            node = 2 * node if room[2 * node] >= needed else 2 * node + 1
        if node - size == len(packs):
            packs.append([])
        packs[node - size].append(rows[i])
        room[node] -= needed
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [tuple(one) for one in packs]


def packed_batch(
    packs: Sequence[tuple[Encoded, ...]],
    which: Sequence[int],
    pad: int,
    device: torch.device | str,
    *,
    additive: torch.dtype | None = None,
) -> Batch:
    """Packs padded together.

    Args:
        which: which packs of the data these are; becomes ``Batch.rows``.
        additive: of a model whose attention adds its mask (:func:`mask_dtype`), its dtype: the mask
            then holds 0 and the least finite number.

    Returns:
        A batch whose inputs are ``input_ids`` and ``position_ids`` [packs, width] and
        ``attention_mask`` [packs, 1, width, width], bool, true where a position may look. Padding
        looks at itself only, so that no row of the mask is empty. A row's first label is the
        logit's of its prompt's last token; no logit predicts the first token of the next row.
    """
    width = max(sum(_length(row) for row in one) for one in packs)
    first = min(len(one[0].prompt) for one in packs) - 1
    ids = torch.full((len(packs), width), pad)
    positions = torch.zeros((len(packs), width), dtype=torch.long)
    labels = torch.full((len(packs), width), IGNORED)
    # The number of the row that each position is in; 0: padding.
    segment = torch.zeros((len(packs), width), dtype=torch.long)
    for line, one in enumerate(packs):
        at = 0
        for number, row in enumerate(one, 1):
            tokens = torch.tensor([*row.prompt, *row.output])
            end = at + len(tokens)
            ids[line, at:end] = tokens
            positions[line, at:end] = torch.arange(len(tokens))
            segment[line, at:end] = number
            # The logit at position p predicts the token at p + 1.
            labels[line, at + len(row.prompt) - 1 : end - 1] = tokens[len(row.prompt) :]
            at = end
    segment = segment.to(device)
    together = (segment[:, :, None] == segment[:, None, :]) & (segment[:, :, None] > 0)
    mask = together.tril() | torch.eye(width, dtype=torch.bool, device=device)
    inputs = {
        "input_ids": ids.to(device),
        "position_ids": positions.to(device),
        "attention_mask": mask[:, None],
    }
    if additive is not None:
        added = torch.zeros(mask.shape, dtype=additive, device=device)
        added.masked_fill_(~mask, torch.finfo(additive).min)
        inputs["attention_mask"] = added[:, None]
    return Batch(inputs, labels[:, first : width - 1].to(device), first, list(which))


def mask_dtype(model: Any) -> torch.dtype | None:
    """``additive`` for this model: None where its attention takes masks of true and false."""
    eager = getattr(model.config, "_attn_implementation", None) == "eager"
    return next(p.dtype for p in model.parameters() if p.is_floating_point()) if eager else None


def _length(row: Encoded) -> int:
    return len(row.prompt) + len(row.output)


def check_packing(base: LoadedBase) -> None:
    """Whether a base keeps packed rows apart, tried on two short ones.

    Raises:
        BaseModelError: it does not (it remembers what went before, or makes its own mask).
    """
    rows = [Encoded([1, 2], [3, 4, 1]), Encoded([2], [1, 3])]
    alone = one_batch(rows, [0, 1], 0, base.device, seq2seq=False)
    together = packed_batch([tuple(rows)], [0], 0, base.device, additive=mask_dtype(base.model))
    sliced = keeps_logits(base.model)
    try:
        with torch.inference_mode():
            one, other = (
                token_losses(base.model, batch, sliced=sliced).sum() for batch in (alone, together)
            )
        gap = float((one - other).abs() / one)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise BaseModelError(
            f"{base.name} does not take packed rows: {error}",
            hint="leave out packing; group_by_length saves padding, too",
        ) from error
    if not gap < (1e-3 if base.exact_dtype else 5e-2):
        raise BaseModelError(
            f"{base.name} does not keep packed rows apart",
            hint="leave out packing; group_by_length saves padding, too",
        )
