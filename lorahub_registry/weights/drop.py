"""DARE on a whole model: base + rescale·mask·(tuned − base), some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lorahub_registry.errors import BaseModelError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.weights.dare import CHUNK, Drop, Limit
from lorahub_registry.weights.stream.checkpoint import BLOCK
from lorahub_registry.weights.stream.pairs import Models, Pair
from lorahub_registry.weights.stream.part import Part
from lorahub_registry.weights.stream.rewrite import Rewrite, copied, rewrite
from lorahub_registry.weights.stream.shards import same_layout
from lorahub_registry.weights.stream.work import spread

# What rescaling may carry a number out of.
_NARROW = (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def drop_model(
    models: Models,
    drop: Drop,
    part: Part,
    *,
    block: int = BLOCK,
    workers: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the dropped model into the part's folder: the tuned one's files, types and index.

    Rows that only the tuned model has, and tensors in no pair, are copied as they are.

    Args:
        block: entries that are read at a time; the result is the same for any.
        workers: threads; as many as there are cores by default.

    Returns:
        Stored name → its facts, in the order of the files: ``kept`` entries of ``entries``,
        ``energy_kept``, the share of the delta's squared norm in them before rescaling (None where
        the delta is zero), ``norm``, the delta's. Only of what was changed.

    Raises:
        BaseModelError: nothing differs; a number that is none; one that grows out of its type.
        OutputError: the disk has no room.
    """
    own = [pair for pair in models.pairs if pair.name not in models.skeleton.tied]
    pairs = {p.tuned.info.name: p for p in (*own, *models.leftovers, *_doubles(models))}
    _tell(models, pairs, progress)
    if not any(_differs(models, pair) for pair in pairs.values()):
        raise BaseModelError(
            f"{models.tuned.folder} is {models.base.folder}, number by number: there is nothing "
            "to drop",
            hint="name the model that was tuned, and the one that it was tuned from",
        )
    limits = _limits(models, drop, pairs, part, workers, progress)

    def forget(name: str, begin: int, end: int) -> None:
        models.tuned.forget(name, begin, end)
        pair = pairs.get(name)
        if pair is not None and begin < pair.rows:
            models.base.forget(pair.base.info.name, begin, min(end, pair.rows))

    tensors = [
        _Dropped(models, pairs[name], drop, limits.get(name)).rewrite(block)
        if name in pairs
        else copied(models.tuned, name)
        for name in models.tuned.tensors
    ]
    rewrite(
        part,
        same_layout(models.tuned),
        models.tuned,
        tensors,
        forget,
        title="Dropping",
        workers=workers,
        progress=progress,
    )
    return {name: part.done[name] for name in models.tuned.tensors if name in pairs}


def _doubles(models: Models) -> Iterator[Pair]:
    """Tensors that are a tied parameter once more, under its other name.

    They are treated as the parameter is: two that differ would be tied no longer.
    """
    first = {pair.name: pair for pair in models.pairs}
    for other, name in models.skeleton.tied.items():
        stored = models.tuned.tensors.get(other)
        pair = first.get(name)
        if pair is not None and stored is not None and stored.info.name != pair.tuned.info.name:
            same = stored.shape == pair.tuned.shape and stored.dtype == pair.tuned.dtype
            if other in models.rest and same:
                yield replace(pair, tuned=stored)


def _tell(models: Models, pairs: dict[str, Pair], progress: Progress) -> None:
    """What is copied as it is, and what the tuned model has no place for."""
    for pair in models.pairs:
        if pair.name in models.skeleton.tied:
            progress.warn(
                f"{pair.name} is tied in the tuned model, and stays so: it is dropped from "
                f"{models.skeleton.tied[pair.name]} alone"
            )
    for pair in pairs.values():
        if pair.tuned.shape and pair.tuned.shape[0] > pair.rows:
            progress.warn(
                f"{pair.name}: {pair.tuned.shape[0] - pair.rows} rows that only the tuned model "
                "has are copied as they are"
            )
    if rest := [name for name in models.rest if name not in pairs]:
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        progress.warn(
            f"{rest[0]}{more}: copied as they are; there is nothing to subtract them from"
        )


def _differs(models: Models, pair: Pair) -> bool:
    for begin, end in pair.tuned.blocks():
        end = min(end, pair.rows)
        if begin >= end:
            break
        base = models.base.rows(pair.base.info.name, begin, end)
        tuned = models.tuned.rows(pair.tuned.info.name, begin, end)
        # NaN is equal to nothing, and told of where it is subtracted.
        if not torch.equal(base.float(), tuned.float()):
            return True
        models.base.forget(pair.base.info.name, begin, end)
        models.tuned.forget(pair.tuned.info.name, begin, end)
    return False


def _limits(
    models: Models,
    drop: Drop,
    pairs: dict[str, Pair],
    part: Part,
    workers: int | None,
    progress: Progress,
) -> dict[str, Limit]:
    """Stored name → its limit, of those that are still to be written; none where chance decides."""
    found: dict[str, Limit] = {}
    todo = [name for name in pairs if name not in part.done]
    if drop.strategy == "random" or not todo:
        return found
    total = sum(pairs[name].tuned.bytes for name in todo)
    with progress.task("Ranking", total, "B") as task:

        def one(name: str) -> None:
            pair = pairs[name]

            def deltas() -> Iterator[torch.Tensor]:
                for begin, end in _blocks(pair, CHUNK):
                    yield models.difference(pair, begin, end).view(-1)

            limit = drop.limit(_entries(pair), deltas)
            assert limit is not None
            found[name] = limit
            task.advance(pair.tuned.bytes)

        spread(todo, one, workers=workers)
    return found


def _entries(pair: Pair) -> int:
    """That both have."""
    rows = pair.tuned.shape[0] if pair.tuned.shape else 1
    return pair.rows * (pair.tuned.info.elements // max(1, rows))


def _blocks(pair: Pair, elements: int) -> Iterator[tuple[int, int]]:
    """Of the rows that both have."""
    for begin, end in pair.tuned.blocks(elements):
        if begin < pair.rows:
            yield begin, min(end, pair.rows)


@dataclass
class _Dropped:
    """One tensor of the output, and what is counted while its blocks are made."""

    models: Models
    pair: Pair
    drop: Drop
    limit: Limit | None

    def __post_init__(self) -> None:
        self._counts: list[tuple[int, float, float]] = []  # kept, energy, energy kept

    def rewrite(self, block: int) -> Rewrite:
        stored = self.pair.tuned
        return Rewrite(stored.info.name, list(stored.blocks(block)), self.make, self.facts)

    def make(self, begin: int, end: int) -> torch.Tensor:
        pair, drop = self.pair, self.drop
        tuned = self.models.tuned.rows(pair.tuned.info.name, begin, end)
        both = min(end, pair.rows)
        if begin >= both or not tuned.numel():
            return tuned
        base = self.models.base.rows(pair.base.info.name, begin, both).reshape(-1)
        flat, each = tuned.reshape(-1), tuned.numel() // (end - begin)
        made = torch.empty_like(flat)
        start, scale = begin * each, drop.scale
        kept, energy, energy_kept = 0, [], []
        for first, last, mask in drop.masks(pair.name, start, both * each, self.limit):
            here = slice(first - start, last - start)
            old, new = base[here].float(), flat[here].float()
            delta = new - old
            energy.append(self._energy(delta, begin, both))
            stays = mask(delta)
            kept += int(np.count_nonzero(stays.numpy()))
            # In place; torch takes three times as long for a factor that is bool.
            np.multiply(delta.numpy(), stays.numpy(), out=delta.numpy())
            energy_kept.append(self._energy(delta, begin, both))
            if scale == 1:  # what stays is the tuned number itself, not what is rounded to it
                made[here] = torch.where(stays, new, old)
            else:
                made[here] = delta.mul_(scale).add_(old)
            if made.dtype in _NARROW and not torch.isfinite(made[here].float().sum()):
                raise BaseModelError(
                    f"{pair.name}: an entry rescaled by {scale:.4g} is more than "
                    f"{str(made.dtype).removeprefix('torch.')} holds",
                    hint="take a lower --rate, or --no-rescale",
                )
        made[len(base) :] = flat[len(base) :]
        self._counts.append((kept, math.fsum(energy), math.fsum(energy_kept)))
        return made.view(tuned.shape)

    def _energy(self, delta: torch.Tensor, begin: int, end: int) -> float:
        found = float(torch.dot(delta, delta))
        if not math.isfinite(found):
            self.models.check(self.pair, begin, end)
            found = float(delta.double().square().sum())
        if not math.isfinite(found):
            raise BaseModelError(f"{self.pair.name}: its difference is more than float32 holds")
        return found

    def facts(self) -> dict[str, Any]:
        # Exact sums: the blocks come in any order.
        energy = math.fsum(count[1] for count in self._counts)
        kept = math.fsum(count[2] for count in self._counts)
        return {
            "kept": sum(count[0] for count in self._counts),
            "entries": _entries(self.pair),
            "energy_kept": kept / energy if energy else None,
            "norm": math.sqrt(energy),
        }
