"""The log of requests, for tests that count calls."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

KEPT_HEADERS = ("Range", "User-Agent", "Content-Type", "If-None-Match")
"""Headers worth looking at. A token never gets into the log, only whether there was one."""


@dataclass(frozen=True)
class Request:
    """One request as it came, and the status it was answered with."""

    method: str
    path: str
    """Decoded, without the query."""
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    authenticated: bool
    size: int
    """Bytes of its body."""
    status: int
    """What was answered; 0 where a fault cut the line instead."""

    @property
    def range(self) -> str | None:
        return self.headers.get("Range")

    def matches(self, pattern: str, method: str | None, status: int | None) -> bool:
        """Whether the path fits a shell pattern (`*` spans slashes) and the rest agrees."""
        fits = fnmatchcase(self.path, pattern)
        return fits and method in (None, self.method) and status in (None, self.status)


class Log:
    """Requests in the order they were answered. An entry is there before its answer is sent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        with self._lock:
            self._requests.append(request)

    def clear(self) -> None:
        with self._lock:
            self._requests.clear()

    def find(
        self, pattern: str = "*", *, method: str | None = None, status: int | None = None
    ) -> list[Request]:
        with self._lock:
            return [r for r in self._requests if r.matches(pattern, method, status)]
