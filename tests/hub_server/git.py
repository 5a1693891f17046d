"""Content-addressed files, trees and commits, hashed exactly as git hashes them.

The Hub stores small text as git blobs and everything else as git-LFS objects, of which git only
sees a pointer file. Both kinds have a git object id (sha1); an LFS file also has its sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gguf *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model "
    "*.msgpack *.npy *.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar "
    "*.safetensors *.tar *.tar.* *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*"
).split()
"""What the `.gitattributes` of a new model repo sends to LFS."""

LFS_SIZE = 10 * 1024 * 1024
"""From this size on, a file is LFS whatever its name."""


def goes_to_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub keeps this file in LFS: by name, size, or a NUL in its first bytes."""
    if size == 0:
        return False
    name = path.rsplit("/", 1)[-1]
    by_name = any(fnmatchcase(name, pattern) for pattern in LFS_PATTERNS)
    return by_name or size >= LFS_SIZE or b"\0" in sample


def gitattributes() -> bytes:
    """The first file of a repo created on the Hub."""
    lines = [f"{pattern} filter=lfs diff=lfs merge=lfs -text" for pattern in LFS_PATTERNS]
    return ("\n".join(lines) + "\n").encode()


def git_hash(kind: str, payload: bytes) -> str:
    """The id that git gives an object of this kind (`blob`, `tree`, `commit`)."""
    return hashlib.sha1(f"{kind} {len(payload)}\0".encode() + payload).hexdigest()


@dataclass(frozen=True, eq=False)
class Blob:
    """One file's content: bytes, or a file on disk that must not change while it is served."""

    content: bytes | Path
    lfs: bool

    @classmethod
    def of(cls, path: str, content: bytes | str | Path) -> Blob:
        """The blob that the Hub would make of `content` committed as `path`."""
        if isinstance(content, Path):
            size = content.stat().st_size
            with content.open("rb") as file:
                sample = file.read(512)
        else:
            content = content.encode() if isinstance(content, str) else content
            size, sample = len(content), content[:512]
        return cls(content, goes_to_lfs(path, size, sample))

    @cached_property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from `start` up to, not including, `stop`."""
        if isinstance(self.content, bytes):
            return self.content[start:stop]
        with self.content.open("rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else stop - start)

    @cached_property
    def sha256(self) -> str:
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        with self.content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def pointer(self) -> bytes:
        """The text that git stores in place of an LFS file."""
        return (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {self.size}\n"
        ).encode()

    @cached_property
    def oid(self) -> str:
        """The git id: of the content, or of the pointer when the content is in LFS."""
        return git_hash("blob", self.pointer if self.lfs else self.read())

    @property
    def etag(self) -> str:
        """What `resolve` sends as the file's identity: sha256 for LFS, git id otherwise."""
        return self.sha256 if self.lfs else self.oid


def folder_oids(files: Mapping[str, Blob]) -> dict[str, str]:
    """The tree id of every folder, the root being `""`."""
    children: dict[str, dict[str, str | None]] = {"": {}}  # folder -> path -> blob, None: folder
    for path, blob in files.items():
        folder = path.rpartition("/")[0]
        children.setdefault(folder, {})[path] = blob.oid
        while folder:
            parent = folder.rpartition("/")[0]
            children.setdefault(parent, {})[folder] = None
            folder = parent
    oids: dict[str, str] = {}
    for folder in sorted(children, key=lambda path: (-path.count("/") if path else 1, path)):
        payload = b""
        for path in sorted(children[folder], key=lambda path: _git_order(path, children)):
            blob_oid = children[folder][path]
            entry = f"{'100644' if blob_oid else '40000'} {path.rpartition('/')[2]}\0"
            payload += entry.encode() + bytes.fromhex(blob_oid or oids[path])
        oids[folder] = git_hash("tree", payload)
    return oids


def _git_order(path: str, folders: Container[str]) -> bytes:
    """Git sorts a folder as if its name ended in a slash."""
    return (path + "/" if path in folders else path).encode()


@dataclass(frozen=True, eq=False)
class Commit:
    """A snapshot of all files, with its parents. Same content, parents, date: same id."""

    files: Mapping[str, Blob]
    title: str
    date: datetime
    parents: tuple[str, ...] = ()
    description: str = ""
    author: str = "hub"
    oid: str = field(init=False)

    def __post_init__(self) -> None:
        stamp = f"{self.author} <{self.author}@hub> {int(self.date.timestamp())} +0000"
        lines = [f"tree {self.folders['']}", *(f"parent {oid}" for oid in self.parents)]
        lines += [f"author {stamp}", f"committer {stamp}", "", self.message, ""]
        object.__setattr__(self, "oid", git_hash("commit", "\n".join(lines).encode()))

    @property
    def message(self) -> str:
        return f"{self.title}\n\n{self.description}" if self.description else self.title

    @cached_property
    def folders(self) -> dict[str, str]:
        return folder_oids(self.files)


def iso(date: datetime) -> str:
    """A date as the Hub writes it, to the millisecond and in UTC."""
    return date.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
