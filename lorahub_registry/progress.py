"""How the lower layers report progress; only ``cli/`` draws it.

A layer that does long work takes ``progress: Progress = silent`` and writes

    with progress.task("Downloading", total=size, unit="B") as task:
        task.advance(len(chunk))

Facts that change a result (something skipped, cut, inferred) go to :meth:`Progress.warn`; what a
user likes to know goes to :meth:`Progress.say`. Both end on stderr.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, n: float = 1) -> None:
        """``n`` more units are done."""

    def describe(self, text: str) -> None:
        """Replace the words beside the bar."""


class Progress(Protocol):
    """Somebody who watches."""

    def task(
        self, title: str, total: float | None = None, unit: str = ""
    ) -> AbstractContextManager[Task]:
        """Start a piece of work of ``total`` units (bytes where ``unit`` is "B"; None: unknown)."""

    def say(self, text: str) -> None:
        """A line of talk."""

    def warn(self, text: str) -> None:
        """A line that the reader must not miss."""


class _SilentTask:
    def advance(self, n: float = 1) -> None:
        pass

    def describe(self, text: str) -> None:
        pass


class _Silent:
    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        yield _SilentTask()

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass


silent: Progress = _Silent()
