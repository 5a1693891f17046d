"""Names of things: ``owner/name[/sub/folder][@revision]`` on the Hub, or a path, or a plain name.

A plain name (``zog``, ``my-mixture``) is one that the registry knows. A path is written so that it
cannot be taken for a repo: absolute, or starting with ``.`` or ``~``. A recipe's reader may also
take ``a/b`` as a path where such a folder exists; that is decided by :func:`looks_like_path`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from lorahub_registry.errors import UsageError

_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?\Z")
_REVISION = re.compile(r"[^\s@\\:^~?*\[\x00-\x1f\x7f]+\Z")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._+-]{0,94}[A-Za-z0-9_+])?\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_WINDOWS_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))]
)


@dataclass(frozen=True)
class AdapterRef:
    """One adapter in a Hub repo: (repo, subfolder, revision).

    Attributes:
        repo: ``owner/name``.
        subfolder: ``""`` for the repo's root, else ``a/b`` with forward slashes.
        revision: branch, tag or commit; None means the default branch.
    """

    repo: str
    subfolder: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Read ``owner/name[/sub/folder][@revision]``.

        Raises:
            UsageError: it is not of that form.
        """
        body, _, revision = text.partition("@")
        parts = body.split("/")
        well_formed = (
            len(parts) >= 2
            and all(_PART.match(p) and "--" not in p and ".." not in p for p in parts[:2])
            and all(safe_part(p) for p in parts[2:])
            and ("@" not in text or (_REVISION.match(revision) and ".." not in revision))
        )
        if not well_formed:
            raise UsageError(
                f"{text!r} is not a Hub id",
                hint="write owner/name, owner/name/sub/folder or owner/name@revision",
            )
        return cls("/".join(parts[:2]), "/".join(parts[2:]), revision or None)

    @property
    def pinned(self) -> bool:
        """Whether the revision is a full commit id."""
        return bool(self.revision and _COMMIT.match(self.revision))

    def at(self, revision: str | None) -> AdapterRef:
        """The same adapter at another revision."""
        return AdapterRef(self.repo, self.subfolder, revision)

    def __str__(self) -> str:
        path = f"{self.repo}/{self.subfolder}" if self.subfolder else self.repo
        return f"{path}@{self.revision}" if self.revision else path


def looks_like_path(text: str) -> bool:
    """Whether ``text`` can only be a path: absolute, or starting with ``.`` or ``~``."""
    return (
        text.startswith(("/", "./", "../", "~", ".\\", "..\\"))
        or text in {".", ".."}
        or (len(text) > 2 and text[1] == ":" and text[2] in "\\/")
    )


def is_commit(revision: str | None) -> bool:
    """Whether ``revision`` is a full 40-digit commit id."""
    return bool(revision and _COMMIT.match(revision))


def safe_part(part: str) -> bool:
    """Whether ``part`` may be one component of a path inside a store, on every system.

    False for ``..``, absolute and UNC starts, NUL and control characters, backslashes, drive
    letters, and names that Windows reserves.
    """
    if part in {"", ".", ".."} or len(part) > 200 or not _storable(part):
        return False
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or c in '/\\:*?"<>|' for c in part):
        return False
    if part != part.strip() or part.endswith("."):
        return False
    # Windows means the device by nul.tar.gz, too.
    return part.split(".")[0].rstrip().lower() not in _WINDOWS_RESERVED


def _storable(part: str) -> bool:
    """Whether file systems can hold it: 255 bytes of UTF-8, no half of a surrogate pair."""
    try:
        return len(part.encode()) <= 255
    except UnicodeEncodeError:
        return False


def safe_path(path: str) -> bool:
    """Whether ``path``, a repo's own file name, stays inside the folder it is written to."""
    return bool(path) and all(safe_part(p) for p in path.split("/"))


def check_name(name: str, *, what: str) -> str:
    """``name`` if it can name a recipe, adapter or mixture: letters, digits, ``. _ + -``.

    Raises:
        UsageError: separators, spaces, a leading dot or something else a file name cannot hold.
    """
    if _NAME.match(name) and ".." not in name and safe_part(name):
        return name
    raise UsageError(
        f"{name!r} cannot be the name of {what}",
        hint="use letters, digits and . _ + - (no path separators), starting with one of the "
        "first two",
    )


def expand(path: str, *, beside: Path | None = None) -> Path:
    """``path`` with ``~`` expanded, absolute, counted from ``beside`` (default: here).

    ``..`` is taken away by the words alone; links stay as they are, so that what a user sees as
    one place has one name.
    """
    # A user whom nobody knows (~nobody/x) stays as it is written, and is then not found.
    return Path(os.path.abspath((beside or Path.cwd()) / os.path.expanduser(path)))
