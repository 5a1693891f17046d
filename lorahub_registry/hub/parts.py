"""Get some files and some adapters of one repo, at one commit, and nothing else of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.tensors import PICKLE_NAME, WEIGHTS_NAME
from lorahub_registry.errors import BrokenAdapter
from lorahub_registry.hub import cache
from lorahub_registry.hub.client import Hub, heard
from lorahub_registry.hub.discover import (
    RemoteFile,
    find_adapters,
    list_files,
    nothing_there,
)
from lorahub_registry.hub.failures import Missing, offline
from lorahub_registry.hub.listing import read_entry
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import AdapterRef
from lorahub_registry.settings import Settings


@dataclass(frozen=True)
class Parts:
    """What is here now.

    Attributes:
        repo: its name now; it may have been renamed.
        folder: what the paths count from.
    """

    repo: str
    commit: str
    folder: Path


def pull_parts(
    ref: AdapterRef,
    files: Sequence[str],
    adapters: Sequence[str],
    *,
    settings: Settings,
    jobs: int = 8,
    progress: Progress = silent,
) -> Parts:
    """Get ``files`` and what the adapters in the folders ``adapters`` need into the cache.

    Offline, what the cache has is taken if it is whole. Nothing is read.

    Args:
        ref: the repo; its subfolder is what the paths count from.

    Raises:
        HubError: the repo, or something named, is not there or cannot be had; the message says
            what is there instead.
        BrokenAdapter: a file arrived damaged, or an adapter has no weights.
        OutputError: the disk is full, or the cache may not be written.
    """
    hub = Hub(settings, progress)
    start = f"{ref.subfolder}/" if ref.subfolder else ""
    paths, folders = [start + f for f in files], [start + a for a in adapters]
    if settings.offline:
        return _offline(hub, ref, paths, folders)
    with heard(progress):
        listed = read_entry(hub.info(ref.repo, ref.revision)).repo
        repo, commit = listed.name, listed.commit
        if repo.lower() != ref.repo.lower():
            progress.warn(f"{ref.repo} is called {repo} now")
        wanted = _choose(repo, list_files(hub, repo, commit), paths, folders)
        total = cache.total_bytes(list(wanted.values()))
        with progress.task(f"Pulling {repo}", total, "B") as task:
            fetcher = cache.Fetcher(hub, repo, commit, task, jobs=jobs)
            order = sorted(wanted.values(), key=lambda file: (-file.size, file.path))
            with fetcher.start(order) as futures:
                for file in order:
                    futures[file.path].result()
    cache.remember_commit(repo, ref.revision, commit)
    return Parts(repo, commit, cache.snapshot(repo, commit) / ref.subfolder)


def _choose(
    repo: str, files: Sequence[RemoteFile], paths: Sequence[str], folders: Sequence[str]
) -> dict[str, RemoteFile]:
    there = {file.path: file for file in files}
    wanted = {}
    for path in paths:
        if path not in there:
            ending = PurePosixPath(path).suffix
            like = [name for name in sorted(there) if name.endswith(ending)][:8]
            hint = f"it has {', '.join(like)}" if like else "is that the right repo and revision?"
            raise Missing(f"{repo} has no file {path}", hint=hint)
        wanted[path] = there[path]
    for folder in folders:
        # Below the folder there may be others, which are not asked for.
        if f"{folder}/{CONFIG_NAME}".removeprefix("/") not in there:
            raise nothing_there(repo, files, folder)
        found, refused = find_adapters(repo, files, folder)
        if own := [r.error for r in refused if r.ref == f"{repo}/{folder}".removesuffix("/")]:
            raise own[0]
        [adapter] = [a for a in found if a.subfolder == folder]
        wanted |= {file.path: file for file in adapter.files}
    return wanted


def _offline(hub: Hub, ref: AdapterRef, paths: Sequence[str], folders: Sequence[str]) -> Parts:
    commit = ref.revision if ref.pinned else cache.known_commit(ref.repo, ref.revision)
    root = cache.snapshot(ref.repo, commit) if commit else None
    where = hub.where(ref.repo, revision=ref.revision)
    if commit is None or root is None:
        raise offline(where)
    found = [root / path for path in paths]
    for folder in folders:
        names = [n for n in (WEIGHTS_NAME, PICKLE_NAME) if (root / folder / n).is_file()]
        found += [root / folder / CONFIG_NAME, root / folder / (names or [WEIGHTS_NAME])[0]]
    for file in found:
        if not file.is_file():
            raise offline(where)
        if not cache.blob_is_whole(file):
            raise BrokenAdapter(
                f"{file}: damaged, its checksum is another",
                hint="run this again where there is a connection",
            )
    if not ref.pinned:
        hub.progress.warn(f"offline: {ref.repo} as the cache has it, at {commit[:12]}")
    return Parts(ref.repo, commit, root / ref.subfolder)
