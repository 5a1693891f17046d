"""Downloads into huggingface_hub's own cache, each file checked against its checksum.

The client writes a file beside its place and moves it there when it is whole, so a process that
is killed leaves no half file under its name. It does not look at checksums; that is done here.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.file_download import repo_folder_name

from lorahub_registry.adapters.tensors import file_sha256
from lorahub_registry.errors import BrokenAdapter
from lorahub_registry.hub.client import LIBRARY, Hub, Stopped
from lorahub_registry.hub.discover import RemoteFile
from lorahub_registry.hub.failures import Where, explained
from lorahub_registry.progress import Task

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")


@dataclass(frozen=True)
class Fetched:
    """A file in the cache, and what was checked: ``fresh`` where it was downloaded just now."""

    path: Path
    sha256: str
    fresh: bool


def storage(repo: str) -> Path:
    """The folder of a repo in the cache."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def snapshot(repo: str, commit: str) -> Path:
    """The folder that a repo's files at a commit are in, under their own names."""
    return storage(repo) / "snapshots" / commit


def is_cached(repo: str, file: RemoteFile, commit: str) -> bool:
    """Whether a file is in the cache."""
    return (snapshot(repo, commit) / file.path).is_file()


def known_commit(repo: str, revision: str | None) -> str | None:
    """The commit that the cache remembers for a revision (the default branch for None)."""
    path = storage(repo) / "refs" / (revision or constants.DEFAULT_REVISION)
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if _COMMIT.match(text) else None


def remember_commit(repo: str, revision: str | None, commit: str) -> None:
    """Note in the cache which commit a branch or tag was, so that it is found offline."""
    name = revision or constants.DEFAULT_REVISION
    if _COMMIT.match(name) or known_commit(repo, revision) == commit:
        return
    path = storage(repo) / "refs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(commit, "utf-8")
    beside.replace(path)


class Fetcher:
    """Downloads files of one repo at one commit, several at a time.

    Args:
        recheck: also compare files that are in the cache already with their checksums.
    """

    def __init__(
        self, hub: Hub, repo: str, commit: str, task: Task, *, jobs: int, recheck: bool = True
    ) -> None:
        self._hub, self._repo, self._commit = hub, repo, commit
        self._task, self._jobs, self._recheck = task, jobs, recheck

    @contextmanager
    def start(self, files: Iterable[RemoteFile]) -> Iterator[dict[str, Future[Fetched]]]:
        """Begin with ``files``; inside the block their results come in. Leaving it by an error
        ends the downloads that still run."""
        with ThreadPoolExecutor(max_workers=max(1, self._jobs)) as pool:
            try:
                yield {file.path: pool.submit(self.fetch, file) for file in files}
            except BaseException:
                self._hub.closing.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def fetch(self, file: RemoteFile) -> Fetched:
        """One file, whole and as the Hub has it.

        Raises:
            BrokenAdapter: what arrived is not what the Hub says it has; it was deleted again.
            HubError: see :mod:`.failures`.
        """
        where = self._hub.where(self._repo, file.path)
        path = snapshot(self._repo, self._commit) / file.path
        if path.is_file():
            with explained(where):
                digest = _checked(path, file) if self._recheck else file.sha256 or ""
            if digest is not None:
                self._task.advance(file.size)
                return Fetched(path, digest, fresh=False)
            forget(path)
        path = self._download(where, file)
        with explained(where):
            digest = _checked(path, file)
        if digest is None:
            forget(path)
            raise BrokenAdapter(
                f"{where}: arrived damaged (its checksum is not the Hub's); it was deleted again",
                hint="pull it again; if that happens twice, something between here and the Hub "
                "changes files",
            )
        return Fetched(path, digest, fresh=True)

    def _download(self, where: Where, file: RemoteFile) -> Path:
        self._hub.require_online(where)
        if self._hub.closing.is_set():
            raise Stopped
        counted = [0.0]
        bar = type(
            "_Bar", (_Bar,), {"task": self._task, "stop": self._hub.closing, "counted": counted}
        )
        with explained(where):
            path = Path(
                hf_hub_download(
                    self._repo,
                    file.path,
                    revision=self._commit,
                    endpoint=self._hub.endpoint,
                    library_name=LIBRARY,
                    tqdm_class=bar,
                )
            )
        # What another file brought already is not transferred again.
        self._task.advance(file.size - counted[0])
        return path


def forget(path: Path) -> None:
    """Delete a file from the cache: its name, and the blob behind it unless another needs it."""
    blob = path.resolve() if path.is_symlink() else None
    path.unlink(missing_ok=True)
    if blob is None or blob.parent.name != "blobs":
        return
    snapshots = blob.parent.parent / "snapshots"
    if not any(p.is_symlink() and p.resolve() == blob for p in snapshots.rglob("*")):
        blob.unlink(missing_ok=True)


def blob_is_whole(path: Path) -> bool:
    """Whether a cached LFS file has the checksum that its blob is named after.

    Files that git holds itself, and caches without links, have no such name: they pass.
    """
    name = path.resolve().name
    return not _SHA256.match(name) or file_sha256(path) == name


def _checked(path: Path, file: RemoteFile) -> str | None:
    """The file's SHA-256 if it is what the Hub has; None if not."""
    if path.stat().st_size != file.size:
        return None
    digest = file_sha256(path)
    if file.sha256 is not None:
        return digest if digest == file.sha256 else None
    if file.git_id is not None and git_id(path.read_bytes()) != file.git_id:
        return None
    return digest


def git_id(content: bytes) -> str:
    """What git calls a file with this content."""
    head = b"blob %d\0" % len(content)
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()


class _Bar:
    """What the client takes for a progress bar: passes bytes on, and can end a download."""

    task: Task
    stop: threading.Event
    counted: list[float]
    total: float | None = None
    n = 0

    def __init__(self, *_args: object, **_options: object) -> None:
        pass

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def update(self, n: float | None = 1) -> None:
        if self.stop.is_set():
            raise Stopped
        self.counted[0] += n or 0
        self.task.advance(n or 0)

    def _nothing(self, *_args: object, **_options: object) -> None:
        pass

    # Two bars are made for a transfer in chunks; with this method it makes do with one.
    update_transfer: Callable[..., None] = _nothing
    set_postfix_str: Callable[..., None] = _nothing
    set_transfer_postfix_str: Callable[..., None] = _nothing
    refresh: Callable[..., None] = _nothing
    close: Callable[..., None] = _nothing


def total_bytes(files: Sequence[Any]) -> int:
    """What files weigh together, one that is named twice counted once."""
    return sum({file.path: file.size for file in files}.values())
