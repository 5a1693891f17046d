"""A base model as files: the shapes of its weights and what identifies it, without loading it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.bases import infer_base
from lorahub_registry.adapters.tensors import content_digest, read_header
from lorahub_registry.errors import BaseModelError
from lorahub_registry.progress import Progress, silent

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class BaseFacts:
    """What is known of a base before it is loaded.

    Attributes:
        name: a Hub id, or what a folder's name says.
        shapes: tensor name → shape, as stored.
        digest: over all its tensors; None until :func:`base_digest` was asked.
        bytes: of all its tensors, as stored.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    revision: str | None = None
    digest: str | None = None
    bytes: int = 0

    @property
    def named(self) -> dict[str, str | None]:
        """What identifies it in reports and keys."""
        return {"name": self.name, "revision": self.revision, "digest": self.digest}

    def shape_of(self, module: str) -> tuple[int, ...] | None:
        """Shape of ``module``'s weight; None where the checkpoint calls it something else.

        A checkpoint may leave out the head's prefix (gpt2 stores ``h.0…`` for
        ``transformer.h.0…``), so leading parts are dropped until a name fits.
        """
        parts = module.split(".")
        for start in range(min(3, len(parts))):
            shape = self.shapes.get(".".join([*parts[start:], "weight"]))
            if shape is not None:
                return shape
        return None


def read_base(folder: Path, *, name: str | None = None, revision: str | None = None) -> BaseFacts:
    """Facts of the model in ``folder``.

    Raises:
        BaseModelError: no model there.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise BaseModelError(
                f"{folder} is an adapter, and a whole model is wanted here",
                hint="merge it into its base first: lorareg merge",
            )
        raise BaseModelError(
            f"{folder}: no config.json there, so no base model",
            hint="give the folder that save_pretrained wrote, or a Hub id",
        )
    headers = [read_header(file) for file in weight_files(folder)]
    shapes = {tensor.name: tensor.shape for h in headers for tensor in h.tensors.values()}
    size = sum(header.data_bytes for header in headers)
    return BaseFacts(name or _name(folder), shapes, revision, bytes=size)


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors, sorted; empty where it has none (a ``.bin`` is never read)."""
    index = _read_index(folder)
    if index is not None:
        try:
            names = set(index["weight_map"].values())
        except (KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(f"{folder / INDEX}: cannot be read ({error})") from None
        files = [folder / Path(str(name)).name for name in sorted(names)]
    else:
        files = [folder / _SINGLE] if (folder / _SINGLE).is_file() else []
    if missing := [f for f in files if not f.is_file()]:
        raise BaseModelError(f"{missing[0]}: a shard that the index names is not there")
    return files


def index_metadata(folder: Path) -> dict[str, Any] | None:
    """What the model's index says beside the map of its tensors; None where it has no index."""
    index = _read_index(folder)
    return None if index is None else dict(index.get("metadata") or {})


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise BaseModelError(f"{path}: cannot be read (not an object)")
    return found


def base_digest(folder: Path, *, progress: Progress = silent) -> str:
    """SHA-256 (hex) over the content digests of the model's files: its identity as tensors."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        digest.update(content_digest(file, read_header(file), progress=progress).encode())
    return digest.hexdigest()


def base_stamp(folder: Path) -> str:
    """What changes when a base's files do, without reading them: names, sizes, times."""
    found = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weight_files(folder)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _name(folder: Path) -> str:
    """What the folder's name says; what its config remembers may be another model."""
    return infer_base(str(folder.resolve()))[0] or folder.resolve().name
