"""Faults to inject: errors, cut lines, silence, wrong bytes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from .wire import HubError, Response


@dataclass
class Fault:
    """What goes wrong, for which requests, and how often."""

    pattern: str
    """A shell pattern for the decoded path; `*` spans slashes."""
    method: str | None = None
    """None: any method; for faults of a body, GET."""
    times: int | None = 1
    """How many requests it befalls; None: all of them."""
    after: int = 0
    """How many matching requests it lets pass first."""
    status: int | None = None
    """Answer with this error instead."""
    message: str | None = None
    code: str | None = None
    """`X-Error-Code` of that error."""
    retry_after: int | None = None
    """Seconds in `Retry-After` of that error."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers of that error, such as `RateLimit`."""
    drop: bool = False
    """Close the connection without an answer."""
    lost: bool = False
    """Do what was asked, then close the connection without an answer."""
    cut: int | None = None
    """Announce the whole body, send this many bytes of it, close the connection."""
    truncate: int | None = None
    """Send this many bytes of the body as if that were all of it."""
    flip: int | None = None
    """Invert the byte at this offset of the body."""
    delay: float = 0.0
    """Seconds of silence: before the answer, or after the bytes of `cut`."""
    hold: threading.Event | None = None
    """Silence, at the same point, until this is set."""
    hits: int = 0
    """How many requests it has befallen."""
    reached: threading.Event = field(default_factory=threading.Event)
    """Set once a request is held."""
    _seen: int = 0

    def __post_init__(self) -> None:
        if self.method is None and (self.cut, self.truncate, self.flip) != (None, None, None):
            self.method = "GET"

    def befalls(self, method: str, path: str) -> bool:
        """Whether this request is hit. Asking counts."""
        if self.method not in (None, method) or not fnmatchcase(path, self.pattern):
            return False
        self._seen += 1
        spent = self.times is not None and self.hits >= self.times
        if self._seen <= self.after or spent:
            return False
        self.hits += 1
        return True

    def error(self) -> Response | None:
        """The error to answer with, None where this fault is of another kind."""
        if self.status is None:
            return None
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        message = self.message or f"Injected {self.status}"
        return HubError(self.status, message, code=self.code, headers=headers).response

    def spoil(self, body: bytes) -> bytes:
        """The body with bytes missing or wrong."""
        if self.flip is not None and self.flip < len(body):
            body = body[: self.flip] + bytes([body[self.flip] ^ 0xFF]) + body[self.flip + 1 :]
        return body if self.truncate is None else body[: self.truncate]

    def wait(self, closing: threading.Event) -> None:
        """Keep silent as long as asked to, but not past the server's end."""
        if self.delay:
            closing.wait(self.delay)
        if self.hold:
            self.reached.set()
            while not (self.hold.wait(0.02) or closing.is_set()):
                pass


class Faults:
    """All faults of a server, the first that fits taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def befalling(self, method: str, path: str) -> Fault | None:
        with self._lock:
            return next((fault for fault in self._faults if fault.befalls(method, path)), None)
