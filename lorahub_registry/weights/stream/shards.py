"""Safetensors written as they come: headers first, then every tensor's rows at their place."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorahub_registry.adapters.base_files import INDEX
from lorahub_registry.errors import OutputError
from lorahub_registry.weights.stream.checkpoint import NAMES, Checkpoint

_SEEKING = threading.Lock()  # where the system cannot write at a place without seeking it


@dataclass(frozen=True)
class Planned:
    """One tensor of a file to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """As written."""
        return math.prod(self.shape) * self.dtype.itemsize


Layout = Mapping[str, Sequence[Planned]]
"""File name → its tensors, in order."""


def same_layout(source: Checkpoint) -> dict[str, list[Planned]]:
    """The files and tensors of ``source``, as they are there."""
    layout: dict[str, list[Planned]] = {file.name: [] for file in source.files}
    for name, stored in source.tensors.items():
        layout[stored.file.name].append(Planned(name, stored.dtype, stored.shape))
    return layout


class Shards:
    """Safetensors in ``folder``, all of their size from the start; a context manager.

    Several threads may write at once. A file that is there already, of the same layout, is gone on
    with.

    Args:
        metadata: of each file's header, by file name.
        index: the metadata of an index over all files; None: there is none.

    Attributes:
        begun: names of the tensors in files that were not there, or not of their size: nothing of
            these is written yet, whatever a journal says.

    Raises:
        OutputError: the disk has no room for them, or they cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        metadata: Mapping[str, Mapping[str, str]],
        index: Mapping[str, Any] | None = None,
    ) -> None:
        self.layout = layout
        self.begun: set[str] = set()
        self._index = index
        self._folder = folder
        self._heads = {file: _head(layout[file], metadata.get(file, {})) for file in layout}
        self._places: dict[str, tuple[str, int, Planned]] = {}
        for file, tensors in layout.items():
            at = len(self._heads[file])
            for tensor in tensors:
                self._places[tensor.name] = file, at, tensor
                at += tensor.bytes
        self._open: dict[str, int] = {}

    def __enter__(self) -> Shards:
        try:
            for file, tensors in self.layout.items():
                path = self._folder / file
                handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
                self._open[file] = handle
                size = len(self._heads[file]) + sum(t.bytes for t in tensors)
                if os.fstat(handle).st_size != size:
                    _reserve(handle, size)
                    self.begun |= {t.name for t in tensors}
                _write(handle, self._heads[file], 0)
        except OSError as error:
            self._close()
            raise OutputError(
                f"{self._folder.parent} has no room or may not be written: "
                f"{error.strerror or error}",
                hint="free some space, or write elsewhere",
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def put(self, name: str, rows: torch.Tensor, begin: int = 0) -> None:
        """Write ``rows`` of a tensor, from row ``begin`` on; of its dtype, on the CPU."""
        file, at, tensor = self._places[name]
        assert rows.dtype == tensor.dtype, (name, rows.dtype, tensor.dtype)
        if not rows.numel():
            return
        each = tensor.bytes // (tensor.shape[0] if tensor.shape else 1)
        raw: Any = rows.contiguous().reshape(-1).view(torch.uint8).numpy()
        _write(self._open[file], memoryview(raw), at + each * begin)

    def sync(self) -> None:
        """Return when all that was put is on the disk."""
        for handle in self._open.values():
            os.fsync(handle)

    def finish(self) -> None:
        """All is on the disk, the index, too."""
        self.sync()
        if self._index is None:
            return
        size = sum(t.bytes for tensors in self.layout.values() for t in tensors)
        names = {t.name: file for file, tensors in self.layout.items() for t in tensors}
        metadata = {**self._index, "total_size": size}
        index = {"metadata": metadata, "weight_map": dict(sorted(names.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _close(self) -> None:
        handles, self._open = self._open, {}
        for handle in handles.values():
            os.close(handle)


def _head(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header, its length a multiple of eight as the format's own writer has it."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (at, at + tensor.bytes),
        }
        at += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _reserve(handle: int, size: int) -> None:
    """Take the room now: a disk that fills up later would cost hours."""
    os.ftruncate(handle, 0)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def _write(handle: int, data: bytes | memoryview, at: int) -> None:
    rest = memoryview(data)
    while rest:
        if hasattr(os, "pwrite"):
            count = os.pwrite(handle, rest, at)
        else:
            with _SEEKING:
                os.lseek(handle, at, os.SEEK_SET)
                count = os.write(handle, rest)
        rest, at = rest[count:], at + count
