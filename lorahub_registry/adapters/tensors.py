"""A safetensors file's header, read without numpy or torch, and the digest of what it holds.

The format: 8 bytes little-endian header length, the header as JSON (name → dtype, shape,
``data_offsets``), then the tensors' bytes. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lorahub_registry.errors import BrokenAdapter
from lorahub_registry.progress import Progress, silent

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_CHUNK = 1 << 20
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16,
    "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it; ``begin`` and ``end`` count from the data's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A safetensors header: its tensors by name, where the data starts, the writer's metadata."""

    tensors: Mapping[str, TensorInfo]
    data_start: int
    metadata: Mapping[str, str]

    @property
    def data_bytes(self) -> int:
        """Size of the data section in bytes."""
        return max((t.end for t in self.tensors.values()), default=0)


def read_header(path: Path) -> Header:
    """The header of the file at ``path``, checked against the file's own size.

    Raises:
        BrokenAdapter: no safetensors file, cut off, or offsets that do not fit.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = _header_length(file.read(8), str(path))
        header = parse_header(file.read(length), length, where=str(path))
    if header.data_start + header.data_bytes != size:
        raise BrokenAdapter(
            f"{path}: {size} bytes long where its header promises "
            f"{header.data_start + header.data_bytes}",
            hint="the file was cut off or is not whole: download it again",
        )
    return header


def parse_header(data: bytes, length: int, *, where: str) -> Header:
    """The header in ``data``, which must be ``length`` bytes long (without the 8 before it)."""
    if len(data) != length:
        raise BrokenAdapter(f"{where}: cut off inside its header")
    try:
        raw = json.loads(data)
        if not isinstance(raw, dict):
            raise ValueError("not an object")
        metadata = dict(raw.pop("__metadata__", None) or {})
        tensors = {name: _tensor(name, entry) for name, entry in raw.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenAdapter(f"{where}: its safetensors header cannot be read ({error})") from None
    reached = 0
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin != reached:
            raise BrokenAdapter(f"{where}: tensor {tensor.name!r} leaves a gap or overlaps another")
        reached = tensor.end
    return Header(tensors, 8 + length, {str(k): str(v) for k, v in metadata.items()})


def content_digest(path: Path, header: Header, *, progress: Progress = silent) -> str:
    """SHA-256 (hex) over the tensors sorted by name: name, dtype, shape and raw bytes.

    The same tensors in another order, or with other metadata, have the same digest.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file, progress.task("Digest", header.data_bytes, "B") as task:
        for name in sorted(header.tensors):
            tensor = header.tensors[name]
            described = json.dumps([name, tensor.dtype, tensor.shape], separators=(",", ":"))
            digest.update(described.encode() + b"\0")
            file.seek(header.data_start + tensor.begin)
            _feed(digest, file, tensor.end - tensor.begin, task.advance)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file, as the Hub gives it for LFS files."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _feed(digest: Any, file: BinaryIO, size: int, advance: Any) -> None:
    while size:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            raise BrokenAdapter(f"{file.name}: became shorter while it was read")
        digest.update(chunk)
        advance(len(chunk))
        size -= len(chunk)


def _header_length(prefix: bytes, where: str) -> int:
    if len(prefix) < 8:
        raise BrokenAdapter(f"{where}: too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise BrokenAdapter(
            f"{where}: not a safetensors file",
            hint="a git-lfs pointer or an error page is often saved under that name",
        )
    return int(length)


def _tensor(name: str, entry: Mapping[str, Any]) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or end < begin:
        raise ValueError(f"tensor {name!r} has a negative or odd size")
    bits = _BITS.get(entry["dtype"])
    if bits is None:
        raise ValueError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
    if math.prod(shape) * bits != (end - begin) * 8:
        raise ValueError(f"tensor {name!r} has a shape that does not fit its bytes")
    return TensorInfo(name, entry["dtype"], shape, begin, end)
