"""Two models of one architecture, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lorahub_registry.errors import BaseModelError
from lorahub_registry.weights.stream.checkpoint import Checkpoint, Stored
from lorahub_registry.weights.stream.skeleton import Kind, Skeleton, read_skeleton


@dataclass(frozen=True)
class Pair:
    """One parameter of both models.

    Attributes:
        name: as the loaded model calls it.
        module: the module that holds it; ``leaf`` is its name there (``weight``).
        base, tuned: where it lies in each checkpoint.
    """

    name: str
    module: str
    leaf: str
    kind: Kind
    base: Stored
    tuned: Stored

    @property
    def rows(self) -> int:
        """How many rows both have; a scalar has one."""
        return min(s.shape[0] if s.shape else 1 for s in (self.base, self.tuned))

    @property
    def resized(self) -> bool:
        """Whether one of them has more rows: tokens were added, or taken away."""
        return self.base.shape != self.tuned.shape


@dataclass(frozen=True)
class Models:
    """Both models, their files mapped.

    Attributes:
        pairs: every floating-point parameter that both have. Where an end of a tied parameter is
            one by itself in the other model, it has a pair of its own.
        rest: names of the tuned model's tensors that are in no pair: not numbers that can be
            subtracted, or unknown to its architecture.
    """

    base: Checkpoint
    tuned: Checkpoint
    skeleton: Skeleton
    pairs: tuple[Pair, ...]
    rest: tuple[str, ...]

    @property
    def leftovers(self) -> tuple[Pair, ...]:
        """Of :attr:`unknown`, what both store under one name, shape and type.

        As experts that transformers joins when it loads them: no module has their names, and yet
        they have a difference.
        """
        found = []
        for name in self.unknown:
            first, second = self.base.tensors.get(name), self.tuned.tensors[name]
            if first and (first.shape, first.dtype) == (second.shape, second.dtype):
                module, _, leaf = name.rpartition(".")
                found.append(Pair(name, module, leaf, "other", first, second))
        return tuple(found)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of ``rest`` that hold numbers and are no tied parameter under its other name."""
        ends = {".".join(n.split(".")[i:]) for n in self.skeleton.tied for i in range(3)}
        return tuple(n for n in self.rest if self.tuned.tensors[n].floating and n not in ends)

    def difference(
        self, pair: Pair, begin: int = 0, end: int | None = None, device: str = "cpu"
    ) -> torch.Tensor:
        """tuned − base, float32, rows ``begin`` to ``end`` of those that both have.

        Raises:
            BaseModelError: a number that is none, or infinite, in either model.
        """
        end = pair.rows if end is None else end
        found = None
        for part, (first, last) in self._parts(pair, begin, end):
            base = self.base.rows(pair.base.info.name, first, last).to(device, torch.float32)
            made = self.tuned.rows(pair.tuned.info.name, first, last).to(device, torch.float32)
            made = made - base
            if not torch.isfinite(made.sum()):
                self.check(pair, first, last)
            if (first, last) == (begin, end):
                found = made
            else:
                if found is None:
                    shape = (end - begin, *made.shape[1:])
                    found = torch.empty(shape, device=device)
                found[part] = made
            self.base.forget(pair.base.info.name, first, last)
            self.tuned.forget(pair.tuned.info.name, first, last)
        assert found is not None
        return found

    def _parts(self, pair: Pair, begin: int, end: int) -> Iterator[tuple[slice, tuple[int, int]]]:
        step = max(1, next(iter(pair.base.blocks()), (0, 1))[1])
        if not pair.base.shape:
            yield slice(0, 1), (0, 1)
            return
        for first in range(begin, end, step):
            last = min(first + step, end)
            yield slice(first - begin, last - begin), (first, last)

    def check(self, pair: Pair, begin: int, end: int) -> None:
        """Whether rows ``begin`` to ``end`` are numbers in both models.

        Raises:
            BaseModelError: names the file and the tensor that holds NaN or infinity.
        """
        for model, stored in ((self.base, pair.base), (self.tuned, pair.tuned)):
            rows = model.rows(stored.info.name, begin, end).float()
            if not torch.isfinite(rows).all():
                raise BaseModelError(
                    f"{stored.file}: {stored.info.name} holds NaN or infinity",
                    hint="its training diverged, or the file is damaged",
                )


@contextmanager
def open_models(base: Path, tuned: Path) -> Iterator[Models]:
    """Both models, checked to be of one architecture.

    Raises:
        BaseModelError: one is no model, or quantised; they differ in architecture (which tensors,
            which shapes); a shard is missing or cut off.
    """
    one, other = read_skeleton(base), read_skeleton(tuned)
    if one.model_type != other.model_type:
        raise BaseModelError(
            f"{tuned} is a {other.model_type}, {base} a {one.model_type}: they have no difference",
            hint="name the model that the tuned one was trained from",
        )
    for folder, skeleton in ((base, one), (tuned, other)):
        if skeleton.quantization:
            method = skeleton.quantization.get("quant_method", "an unnamed method")
            raise BaseModelError(
                f"{folder} is quantised ({method}): packed numbers have no difference",
                hint="name the model as it was before it was quantised",
            )
    with Checkpoint(base) as first, Checkpoint(tuned) as second:
        yield Models(first, second, other, *_paired(first, second, one, other))


def _paired(
    base: Checkpoint, tuned: Checkpoint, one: Skeleton, other: Skeleton
) -> tuple[tuple[Pair, ...], tuple[str, ...]]:
    here, there = one.stored(base.tensors), other.stored(tuned.tensors)
    first_names = dict.fromkeys([*here, *there])
    _lend(here, there, one)
    _lend(there, here, other)
    _same_names(base, tuned, here, there, other)
    pairs, used = [], set()
    for name in first_names:
        first, second = base.tensors[here[name]], tuned.tensors[there[name]]
        if not (first.floating and second.floating):
            continue
        module, _, leaf = name.rpartition(".")
        kind = other.kinds.get(module, "other")
        _same_shape(base, tuned, name, first, second, one)
        pairs.append(Pair(name, module, leaf, kind, first, second))
        used.add(there[name])
    return tuple(pairs), tuple(name for name in tuned.tensors if name not in used)


def _lend(lacking: dict[str, str], known: dict[str, str], tied: Skeleton) -> None:
    """Add ends of tied parameters that are parameters of their own in the other model."""
    for name in known:
        shared = tied.tied.get(name)
        if name not in lacking and shared in lacking:
            lacking[name] = lacking[shared]


def _same_names(
    base: Checkpoint, tuned: Checkpoint, here: dict[str, str], there: dict[str, str], of: Skeleton
) -> None:
    for known, other, owner, lacks in (
        (there, here, tuned.folder, base.folder),
        (here, there, base.folder, tuned.folder),
    ):
        lacking = [n for n in known if n not in other]
        if lacking:
            more = f" and {len(lacking) - 1} more tensors" if len(lacking) > 1 else ""
            raise BaseModelError(
                f"{owner} has {lacking[0]}{more}, which {lacks} lacks",
                hint="they are of different architectures, or a shard is not whole",
            )
    if not here:
        raise BaseModelError(
            f"{base.folder}: none of its tensors is one of a {of.model_type} as transformers "
            "builds it"
        )


def _same_shape(
    base: Checkpoint, tuned: Checkpoint, name: str, first: Stored, second: Stored, of: Skeleton
) -> None:
    if first.shape == second.shape:
        return
    module = name.rpartition(".")[0]
    # Tokens are rows, of embeddings and of the head.
    vocabulary = of.kinds.get(module) == "embedding" or module == of.head
    if vocabulary and first.shape[1:] == second.shape[1:]:
        return
    raise BaseModelError(
        f"{name} is {list(first.shape)} in {base.folder} and {list(second.shape)} in "
        f"{tuned.folder}",
        hint="they are of different architectures: name the model that the tuned one was "
        "trained from",
    )
