"""What is in the registry: add adapters from folders, and read them again."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorahub_registry.adapters.facts import find_adapters
from lorahub_registry.errors import BrokenAdapter, LoraregError, OutputError, UnknownRef
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import expand, looks_like_path
from lorahub_registry.registry.index import record_of_folder
from lorahub_registry.registry.records import AdapterRecord, StoredAdapter
from lorahub_registry.registry.store import Registry


@dataclass
class Added:
    """What :func:`add` found.

    Attributes:
        unchanged: indexed before, and the same now.
        refused: (folder, why) of what looked like an adapter and is none that can be used.
    """

    added: list[StoredAdapter] = field(default_factory=list)
    unchanged: list[StoredAdapter] = field(default_factory=list)
    refused: list[tuple[str, LoraregError]] = field(default_factory=list)


def add(
    places: Iterable[str | Path],
    *,
    registry: Registry,
    base: str | None = None,
    progress: Progress = silent,
) -> Added:
    """Index adapters: every one at or below a folder, or one that is indexed already, again.

    Args:
        base: the base they sit on, where their configs do not tell or tell it wrongly.

    Raises:
        UnknownRef: a place that is neither a folder with adapters nor a known adapter.
    """
    result = Added()
    for place in places:
        folders = _folders(str(place), registry)
        with progress.task(f"Indexing {place}", len(folders), "adapter") as task:
            for folder in folders:
                _add_one(folder, base, registry, result)
                task.advance()
    return result


def _folders(place: str, registry: Registry) -> list[Path]:
    folder = expand(place)
    if folder.is_dir():
        found = find_adapters(folder)
        if not found:
            raise UnknownRef(
                f"{place}: no adapter_config.json in it or below it",
                hint="give a folder that PEFT's save_pretrained wrote, or one above such folders",
            )
        return found
    if looks_like_path(place):
        raise UnknownRef(f"{place}: no such folder", hint="give a folder that holds adapters")
    try:
        stored = registry.get(place)
    except UnknownRef as error:
        what = f"{place}: neither a folder nor an adapter that the registry knows"
        raise UnknownRef(what, hint=error.hint) from None
    if stored.record.local_path is None:
        raise UnknownRef(
            f"{place} is known from the Hub and not on this machine",
            hint=f"lorareg pull {stored.ref}",
        )
    return [Path(stored.record.local_path)]


def _add_one(folder: Path, base: str | None, registry: Registry, result: Added) -> None:
    written = str(folder).encode("utf-8", "backslashreplace").decode()
    if written != str(folder):
        why = BrokenAdapter(f"{written}: its path is not UTF-8 text", hint="rename the folder")
        result.refused.append((written, why))
        return
    before = _known(folder, registry)
    try:
        if before is not None and before.record.repo.kind == "hub":
            # Pulled from the Hub: its place and revision stay what they are.
            stored = registry.set_base(before.ref, base) if base else before
        else:
            stored = registry.put(record_of_folder(folder, base=base))
    except LoraregError as error:
        result.refused.append((str(folder), error))
        return
    same = before is not None and before.updated_at == stored.updated_at
    (result.unchanged if same else result.added).append(stored)


def _known(folder: Path, registry: Registry) -> StoredAdapter | None:
    try:
        return registry.get(str(folder))
    except UnknownRef:
        return None


def refreshed(stored: StoredAdapter, *, progress: Progress = silent) -> AdapterRecord:
    """The record of a local adapter as its files are now, with what only the registry knows."""
    if stored.record.local_path is None:
        raise UnknownRef(f"{stored.ref} is not on this machine", hint=f"lorareg pull {stored.ref}")
    folder = Path(stored.record.local_path)
    if not folder.is_dir():
        raise UnknownRef(
            f"{stored.record.name}: its folder is gone ({folder})",
            hint=f"lorareg remove {stored.ref}, or put the folder back",
        )
    now = record_of_folder(folder, name=stored.record.name, progress=progress)
    if stored.record.base.how == "given":
        now = replace(now, base=stored.record.base)
    return now


def remove(ref: str, *, registry: Registry, files: bool = False) -> StoredAdapter:
    """Forget an adapter; with ``files`` its files go too, through the Hub's client for pulled ones.

    Raises:
        UnknownRef, AmbiguousRef: see :meth:`Registry.get`.
        OutputError: its files cannot be deleted; then it is not forgotten either.
    """
    stored = registry.get(ref)
    if files and stored.record.local_path is not None:
        _delete_files(stored)
    return registry.remove(stored.ref)


def _delete_files(stored: StoredAdapter) -> None:
    record = stored.record
    folder, names = Path(record.local_path or ""), [file.name for file in record.files]
    if record.repo.kind == "hub":
        from lorahub_registry.hub.cache import forget

        for name in names:
            forget(folder / name)
        return
    others = sorted(p.name for p in folder.iterdir() if p.name not in names)
    if others:
        raise OutputError(
            f"{folder} also holds {', '.join(others[:3])}, which is not the adapter's",
            hint=f"delete the folder yourself, then: lorareg remove {stored.ref}",
        )
    shutil.rmtree(folder)
