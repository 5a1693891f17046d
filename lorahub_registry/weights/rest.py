"""What of a difference is no low-rank factor: norms, biases, embeddings, the head, added tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorahub_registry.adapters.facts import PREFIX
from lorahub_registry.progress import Progress, silent
from lorahub_registry.weights.factorise import Saved
from lorahub_registry.weights.stream.pairs import Models, Pair
from lorahub_registry.weights.stream.part import Part
from lorahub_registry.weights.stream.shards import Planned


@dataclass(frozen=True)
class Left:
    """One parameter that differs and that no factor holds.

    Attributes:
        what: ``norm``, ``bias``, ``embedding``, ``head``, ``linear`` or ``other``.
        energy: squared Frobenius norm of the difference, over the rows that both models have.
        added: rows that only the tuned model has; negative: rows that it lacks.
    """

    name: str
    what: str
    energy: float
    added: int = 0


def look(
    models: Models, taken: Sequence[Pair], part: Part | None = None, *, progress: Progress = silent
) -> list[Left]:
    """Every parameter outside of ``taken`` that differs between the models.

    Args:
        part: remembers what was looked at, for a run that goes on.
    """
    names = {pair.name for pair in taken}
    others = [pair for pair in models.pairs if pair.name not in names]
    found = []
    with progress.task("Looking at the rest", len(others), "tensor") as task:
        for pair in others:
            mark = f"rest {pair.name}"
            energy = part.done.get(mark) if part else None
            if energy is None:
                energy = _energy(models, pair)
                if part:
                    part.mark(mark, energy)
            added = (pair.tuned.shape[:1] or (1,))[0] - (pair.base.shape[:1] or (1,))[0]
            if energy or added:
                found.append(Left(pair.name, _what(models, pair), energy, added))
            task.advance()
    return found


def saved(
    models: Models, left: Sequence[Left], taken: Sequence[Pair]
) -> tuple[list[Saved], str, list[str]]:
    """What PEFT keeps beside the factors so that nothing of ``left`` is lost.

    Returns:
        Tensors for the adapter's file, each with what reads it; PEFT's ``bias``; its
        ``modules_to_save``. A tied parameter is saved for each module that has it, since PEFT
        saves modules and ties none.
    """
    adapted = {pair.module for pair in taken}
    changed = {entry.name for entry in left}
    tensors: list[Saved] = []
    bias, whole = "none", set()
    for pair in models.pairs:
        if pair.name in changed and pair.module in adapted:
            bias = "all"
            tensors.append(_tensor(models, pair, f"{PREFIX}{pair.module}.base_layer.{pair.leaf}"))
        elif pair.name in changed:
            whole |= {pair.module, *_tied(models, pair)}
    for pair in models.pairs:
        for module in sorted({pair.module, *_tied(models, pair)} & whole):
            tensors.append(_tensor(models, pair, f"{PREFIX}{module}.{pair.leaf}"))
    return tensors, bias, sorted(whole)


def _tied(models: Models, pair: Pair) -> list[str]:
    """Other modules that hold the same parameter."""
    return [
        other.rpartition(".")[0]
        for other, first in models.skeleton.tied.items()
        if first == pair.name
    ]


def _tensor(models: Models, pair: Pair, key: str) -> Saved:
    stored = pair.tuned
    planned = Planned(key, stored.dtype, stored.shape)
    return planned, lambda: models.tuned.rows(stored.info.name)


def _energy(models: Models, pair: Pair) -> float:
    total = 0.0
    for begin, end in pair.base.blocks():
        if begin < pair.rows:
            delta = models.difference(pair, begin, min(end, pair.rows))
            total += float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
    return total


def _what(models: Models, pair: Pair) -> str:
    if pair.module == models.skeleton.head:
        return "head"
    if pair.leaf == "bias":
        return "bias"
    if pair.kind == "other":
        return "norm" if pair.leaf == "weight" and len(pair.tuned.shape) == 1 else "other"
    return "embedding" if pair.kind == "embedding" else "linear"


def in_words(left: Sequence[Left]) -> str:
    """``1 embedding with 9 added tokens, 11 norms``."""
    return ", ".join(
        f"{kind['tensors']} {what}{'s' if kind['tensors'] > 1 else ''}"
        + (f" with {kind['added_rows']} added tokens" if kind["added_rows"] else "")
        for what, kind in summary(left).items()
    )


def summary(left: Sequence[Left]) -> dict[str, dict[str, Any]]:
    """Kind → how many tensors, their energy, and rows added."""
    found: dict[str, dict[str, Any]] = {}
    for entry in left:
        kind = found.setdefault(entry.what, {"tensors": 0, "energy": 0.0, "added_rows": 0})
        kind["tensors"] += 1
        kind["energy"] += entry.energy
        kind["added_rows"] += max(0, entry.added)
    return found
