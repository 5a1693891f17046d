"""A model written from others, block by block, on all cores, going on where a run was stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorahub_registry.progress import Progress, silent
from lorahub_registry.weights.stream.checkpoint import Checkpoint
from lorahub_registry.weights.stream.part import Part
from lorahub_registry.weights.stream.shards import Layout, Shards
from lorahub_registry.weights.stream.work import spread


@dataclass(frozen=True)
class Rewrite:
    """One tensor of the output.

    Attributes:
        blocks: (begin, end) of its rows, together all of them.
        make: the rows from begin to end, of the dtype to write, on the CPU; called in threads.
        facts: what the report keeps of it, asked when all blocks are written.
    """

    name: str
    blocks: Sequence[tuple[int, int]]
    make: Callable[[int, int], torch.Tensor]
    facts: Callable[[], Any] = lambda: None


def copied(source: Checkpoint, name: str) -> Rewrite:
    """A tensor as it is in ``source``."""

    def make(begin: int, end: int) -> torch.Tensor:
        return source.rows(name, begin, end)

    return Rewrite(name, list(source.tensors[name].blocks()), make)


def rewrite(
    part: Part,
    layout: Layout,
    like: Checkpoint,
    tensors: Sequence[Rewrite],
    forget: Callable[[str, int, int], None],
    *,
    title: str,
    workers: int | None = None,
    progress: Progress = silent,
) -> None:
    """Write ``tensors`` into the part's folder, those that it has already left out.

    Args:
        layout: of the files, see :class:`Shards`.
        like: whose metadata they get, and an index where it has one.
        tensors: one for each that the layout names.
        forget: gives back what reading rows of a tensor took, once they are written.

    Raises:
        OutputError: the disk has no room, or the folder cannot be written.
    """
    sizes = {p.name: p.bytes for files in layout.values() for p in files}
    metadata = {file.name: found for file, found in like.files.items()}
    with Shards(part.folder, layout, metadata, like.index) as shards:
        for name in shards.begun & part.done.keys():
            del part.done[name]
        part.before_marking(shards.sync)
        todo = [t for t in tensors if t.name not in part.done]
        left = {t.name: len(t.blocks) for t in todo}
        lock = threading.Lock()
        try:
            with progress.task(title, sum(sizes[t.name] for t in todo), "B") as task:

                def one(block: tuple[Rewrite, int, int]) -> None:
                    tensor, begin, end = block
                    rows = tensor.make(begin, end)
                    shards.put(tensor.name, rows, begin)
                    size = rows.numel() * rows.itemsize
                    del rows
                    forget(tensor.name, begin, end)
                    with lock:
                        left[tensor.name] -= 1
                        last = not left[tensor.name]
                        task.advance(size)
                    if last:
                        part.mark(tensor.name, tensor.facts(), sizes[tensor.name])

                spread(_blocks(todo), one, workers=workers)
            for tensor in todo:
                if not tensor.blocks:
                    part.mark(tensor.name, tensor.facts())
        finally:
            part.flush()  # while the files are open: data first, then the journal
        shards.finish()


def _blocks(tensors: Sequence[Rewrite]) -> Iterator[tuple[Rewrite, int, int]]:
    for tensor in tensors:
        for begin, end in tensor.blocks:
            yield tensor, begin, end
