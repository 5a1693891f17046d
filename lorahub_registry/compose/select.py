"""Which rows to learn from: those that lie furthest apart as the base sees them.

k-center by farthest-first traversal (Gonzalez 1985; for choosing training rows: Sener and Savarese,
arXiv:1708.00489): the first row is drawn, then always the row that is furthest from all chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import torch

from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.hidden import read
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.progress import Progress, silent


def diverse(
    base: LoadedBase,
    rows: Sequence[Encoded],
    count: int,
    *,
    seed: int,
    progress: Progress = silent,
) -> list[int]:
    """The numbers of ``count`` rows, ascending; all of them where there are no more.

    A row is where the mean of the base's last hidden states over its tokens lies (of a seq2seq
    model: the encoder's, over the prompt).
    """
    if count >= len(rows):
        return list(range(len(rows)))
    points = _hidden(base, rows, progress)
    chosen = [Random(seed).randrange(len(rows))]
    nearest = (points - points[chosen[0]]).norm(dim=1)
    while len(chosen) < count:
        nearest[chosen] = -1.0  # also where rows are the same
        chosen.append(int(nearest.argmax()))
        nearest = nearest.minimum((points - points[chosen[-1]]).norm(dim=1))
    return sorted(chosen)


def _hidden(base: LoadedBase, rows: Sequence[Encoded], progress: Progress) -> torch.Tensor:
    """[rows, width], float64 on the CPU."""
    ids = [row.prompt if base.seq2seq else [*row.prompt, *row.output] for row in rows]
    more = {} if base.seq2seq else {"use_cache": False}

    def means(reader: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # Of the last states alone: a model that gives all of them keeps all of them.
        states = reader(input_ids=ids, attention_mask=mask, **more).last_hidden_state
        share = mask / mask.sum(1, keepdim=True)
        return (states.float() * share[..., None]).sum(1)

    return read(base, ids, means, progress=progress).double()
