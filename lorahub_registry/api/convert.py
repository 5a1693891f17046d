"""Weights: make safetensors of a pickled adapter."""

from __future__ import annotations

from pathlib import Path

from lorahub_registry.api.publish import folder_of
from lorahub_registry.errors import UnknownRef
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry.index import record_of_folder
from lorahub_registry.registry.records import StoredAdapter
from lorahub_registry.registry.store import Registry


def convert(
    place: str | Path,
    *,
    registry: Registry,
    timeout_s: float = 600.0,
    progress: Progress = silent,
) -> StoredAdapter:
    """Write safetensors beside an adapter's ``.bin``, and index what they hold.

    The pickle is read in a child process with ``weights_only=True``, bounded in time and memory;
    nothing else in the project reads one.

    Args:
        place: a folder, or a registered adapter's ref or name.

    Raises:
        BrokenAdapter: the pickle is damaged, holds more than tensors, or is not the config's.
        OutputError: there are safetensors already.
    """
    from lorahub_registry.weights.convert import convert as run

    folder = folder_of(place, registry)
    with progress.task(f"Converting {folder.name}"):
        run(folder, timeout_s=timeout_s)
    try:
        before = registry.get(str(folder)).record
    except UnknownRef:
        return registry.put(record_of_folder(folder, progress=progress))
    from dataclasses import replace

    now = record_of_folder(folder, name=before.name, progress=progress)
    return registry.put(
        replace(
            now,
            repo=before.repo,
            subfolder=before.subfolder,
            revision=before.revision,
            base=before.base,
        )
    )
