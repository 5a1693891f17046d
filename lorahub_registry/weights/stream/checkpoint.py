"""A model's safetensors, one file or many, read a few rows at a time through memory maps."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lorahub_registry.adapters.base_files import index_metadata, weight_files
from lorahub_registry.adapters.tensors import TensorInfo, read_header
from lorahub_registry.errors import BaseModelError, BrokenAdapter

BLOCK = 1 << 22
"""Elements that are worked on at a time: 16 MiB in float32."""

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TORCH.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: what its header says, and which file it is in."""

    info: TensorInfo
    file: Path
    begin: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        """As stored.

        Raises:
            BaseModelError: torch has no such type.
        """
        try:
            return TORCH[self.info.dtype]
        except KeyError:
            raise BaseModelError(
                f"{self.file}: {self.info.name} is {self.info.dtype}, which torch does not read"
            ) from None

    @property
    def bytes(self) -> int:
        """As stored."""
        return self.info.end - self.info.begin

    @property
    def floating(self) -> bool:
        """Whether it holds numbers that can be subtracted."""
        return self.dtype.is_floating_point

    def blocks(self, elements: int = BLOCK) -> Iterator[tuple[int, int]]:
        """(begin, end) of rows that hold about so many elements together; a scalar has one row."""
        rows = self.shape[0] if self.shape else 1
        step = max(1, elements * rows // max(1, self.info.elements))
        for begin in range(0, rows, step):
            yield begin, min(begin + step, rows)


class Checkpoint:
    """The tensors of the model in ``folder``; a context manager that holds its files' maps.

    Attributes:
        files: its safetensors, in order; each with its header's metadata.
        index: the metadata of its index; None where it has no index.
        tensors: by name, in the order of the files.

    Raises:
        BaseModelError: no safetensors there, a shard is missing or cut off, or two shards hold a
            tensor of one name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[Path, dict[str, str]] = {}
        self.index = index_metadata(folder)
        self.tensors: dict[str, Stored] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file in weight_files(folder):
            try:
                header = read_header(file)
            except BrokenAdapter as error:
                raise BaseModelError(str(error), hint=error.hint) from None
            self.files[file] = dict(header.metadata)
            for name, info in sorted(header.tensors.items(), key=lambda item: item[1].begin):
                if name in self.tensors:
                    raise BaseModelError(
                        f"{file}: {name} is in {self.tensors[name].file.name}, too",
                        hint="the shards are of two models: get the model again",
                    )
                self.tensors[name] = Stored(info, file, header.data_start + info.begin)
        if not self.tensors:
            raise BaseModelError(
                f"{folder}: no model.safetensors there", hint="pickles (.bin) are not read"
            )

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(stored.bytes for stored in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(stored.bytes for stored in self.tensors.values())

    def __enter__(self) -> Checkpoint:
        for file in self.files:
            with file.open("rb") as opened:
                # A private map: torch takes no memory that may not be written, and none is.
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        return self

    def __exit__(self, *_: object) -> None:
        # Not closed: a tensor that still looks at a map holds it, and reading it would crash.
        self._maps = {}

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows ``begin`` to ``end`` as stored, a view on the file: it must not be written to."""
        stored = self.tensors[name]
        rows = stored.shape[0] if stored.shape else 1
        end = rows if end is None else end
        each = stored.info.elements // max(1, rows)
        shape = (end - begin, *stored.shape[1:]) if stored.shape else ()
        if each * (end - begin) == 0:
            return torch.empty(shape, dtype=stored.dtype)
        size = stored.bytes // rows
        flat = torch.frombuffer(
            self._maps[stored.file],
            dtype=torch.uint8,
            count=size * (end - begin),
            offset=stored.begin + size * begin,
        )
        if flat.data_ptr() % stored.dtype.itemsize:
            flat = flat.clone()  # some writers leave tensors where their type may not begin
        return flat.view(stored.dtype).view(shape)

    def forget(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """Give back the memory that reading these rows took; the pages stay in the file's cache."""
        stored = self.tensors[name]
        if not hasattr(mmap, "MADV_DONTNEED") or not stored.bytes:
            return
        rows = stored.shape[0] if stored.shape else 1
        size = stored.bytes // rows
        first = stored.begin + size * begin
        last = stored.begin + size * (rows if end is None else end)
        # Whole pages: what a neighbour still reads comes back from the cache.
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        self._maps[stored.file].madvise(mmap.MADV_DONTNEED, start, last - start)
