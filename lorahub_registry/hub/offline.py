"""What can be had without a connection: what the cache holds."""

from __future__ import annotations

from lorahub_registry.adapters.facts import find_adapters
from lorahub_registry.adapters.tensors import PICKLE_NAME, WEIGHTS_NAME
from lorahub_registry.errors import BrokenAdapter
from lorahub_registry.hub import cache
from lorahub_registry.hub.client import Hub
from lorahub_registry.hub.discover import Refused
from lorahub_registry.hub.failures import offline
from lorahub_registry.refs import AdapterRef
from lorahub_registry.registry.index import files_of
from lorahub_registry.registry.records import FileRecord, RepoRecord

Folders = dict[str, tuple[FileRecord, ...]]


def find_cached(
    hub: Hub, ref: AdapterRef, known: RepoRecord | None
) -> tuple[str, Folders, list[Refused]]:
    """The commit, and the adapters of it that are in the cache, by subfolder.

    Raises:
        HubError: none of them is.
    """
    where = hub.where(ref.repo, ref.subfolder, ref.revision)
    commit = ref.revision if ref.pinned else cache.known_commit(ref.repo, ref.revision)
    if commit is None and ref.revision is None and known is not None:
        commit = known.commit
    root = cache.snapshot(ref.repo, commit) if commit else None
    start = root / ref.subfolder if root and ref.subfolder else root
    if commit is None or root is None or start is None or not start.is_dir():
        raise offline(where)
    whole: Folders = {}
    refused = []
    for folder in find_adapters(start):
        subfolder = folder.relative_to(root).as_posix().removeprefix(".")
        weights = folder / WEIGHTS_NAME
        weights = weights if weights.is_file() else folder / PICKLE_NAME
        if not weights.is_file():
            error = BrokenAdapter(f"{folder}: only a part of it is in the cache", hint=_AGAIN)
            refused.append(Refused(_ref(ref, subfolder), error))
        elif not cache.blob_is_whole(weights):
            error = BrokenAdapter(f"{weights}: damaged, its checksum is another", hint=_AGAIN)
            refused.append(Refused(_ref(ref, subfolder), error))
        else:
            whole[subfolder] = files_of(folder)
    if not whole and not refused:
        raise offline(where)
    hub.progress.warn(
        f"offline: {ref.repo} as the cache has it, {len(whole)} adapter(s) at {commit[:12]}; "
        "the repo may hold others"
    )
    return commit, whole, refused


_AGAIN = "pull it again where there is a connection"


def _ref(ref: AdapterRef, subfolder: str) -> str:
    return f"{ref.repo}/{subfolder}" if subfolder else ref.repo
