"""An output that is not finished: a folder beside its place, and a journal of what it holds.

A killed run goes on where it was: the same command finds the folder, and the journal in it names
what is done already. The journal's first line is the key of all that decides the output; a folder
of another key is begun anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorahub_registry.errors import OutputError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are the user's to avoid
    fcntl = None

JOURNAL = ".journal.jsonl"
_SYNC = 256 << 20  # bytes written between two entries into the journal


def unfinished(out: Path) -> Path:
    """Where the output of ``out`` grows."""
    return out.with_name(f".{out.name}.unfinished")


class Part:
    """The folder that becomes ``out``; a context manager, one process at a time.

    Args:
        out: where the output will be; resolved.
        key: all that decides what is written, JSON.

    Attributes:
        folder: where to write.
        done: what an earlier run finished and this one: name → facts given to :meth:`mark`. What
            turns out not to be there may be taken out.
        resumed: how many of them were there already.

    Raises:
        OutputError: it cannot be written, or another process is writing it.
    """

    def __init__(self, out: Path, key: Mapping[str, Any]) -> None:
        self.folder = unfinished(out)
        self.done: dict[str, Any] = {}
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._out, self._waiting, self._weight = out, [], 0  # type: ignore[var-annotated]
        self._lock = threading.Lock()
        self._sync: Callable[[], None] = lambda: None
        self._file: Any = None
        self.resumed = 0

    def __enter__(self) -> Part:
        journal = self.folder / JOURNAL
        try:
            while self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = journal.open("a+", encoding="utf-8")
                self._own()
                if not _is_at(self._file, journal):  # moved away while we waited for it
                    self._close()
            self._file.seek(0)
            lines = self._file.read().splitlines(keepends=True)
            if lines[:1] == [json.dumps(self._key) + "\n"]:
                self._read(lines[1:])
            else:
                self._begin()
        except OSError as error:
            self._close()
            raise OutputError(f"{self._out} cannot be written: {error.strerror or error}") from None
        self.resumed = len(self.done)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.flush()
        self._close()

    def before_marking(self, sync: Callable[[], None]) -> None:
        """``sync`` brings to the disk what the next entries of the journal will say is there."""
        self._sync = sync

    def mark(self, name: str, facts: Any = None, size: int = 0) -> None:
        """``name`` is written, ``size`` bytes; entries wait until there is some work to lose."""
        with self._lock:
            self.done[name] = facts
            self._waiting.append(json.dumps([name, facts]) + "\n")
            self._weight += size
            full = self._weight >= _SYNC
        if full:
            self.flush()

    def flush(self) -> None:
        """What was marked survives a kill of this process from here on."""
        with self._lock:
            self._flush()

    def settle(self, put: Callable[[Path], Path]) -> None:
        """All is written: ``put`` moves the folder to where it belongs, and the journal goes.

        The lock is held until then: nobody else finds the folder between.
        """
        self._waiting.clear()
        (put(self.folder) / JOURNAL).unlink(missing_ok=True)
        self._close()

    def forget(self) -> None:
        """Leave nothing: the output is not wanted."""
        self._waiting.clear()
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _own(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            self._file = None
            raise OutputError(
                f"{self._out}: another process is writing it", hint="wait for it, or stop it"
            ) from None

    def _begin(self) -> None:
        for left in self.folder.iterdir():
            if left.name != JOURNAL:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        self._file.truncate(0)
        self._file.write(json.dumps(self._key) + "\n")
        self._file.flush()

    def _read(self, lines: list[str]) -> None:
        whole = 0
        for line in lines:
            try:
                name, facts = json.loads(line)
            except ValueError:
                break  # cut off by a kill
            if not line.endswith("\n"):
                break
            self.done[name] = facts
            whole += 1
        if whole < len(lines):
            kept = "".join([json.dumps(self._key) + "\n", *lines[:whole]])
            self._file.truncate(len(kept.encode()))

    def _flush(self) -> None:
        if self._file is None or not self._waiting:
            return
        self._sync()
        self._file.write("".join(self._waiting))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._waiting.clear()
        self._weight = 0

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # a full disk: what is lost is done again
                file.close()


def _is_at(file: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
