"""A call and its answer: what routes get and give, and how the Hub phrases errors and pages."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs, urlencode

if TYPE_CHECKING:
    from .store import Store, User

T = TypeVar("T")


@dataclass
class Response:
    """An answer, complete and in memory."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An answer that ends a call early.

    The Hub puts the message into both the JSON body and `X-Error-Message`; `X-Error-Code` is what
    a client decides on (`RepoNotFound`, `RevisionNotFound`, `EntryNotFound`, `GatedRepo`).
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ) -> None:
        super().__init__(message)
        self.response = as_json({"error": message, **body}, status)
        # Header values are latin-1: what does not fit is only in the body.
        text = " ".join(message.split()).encode("latin-1", errors="replace").decode("latin-1")
        self.response.headers |= {"X-Error-Message": text, **(headers or {})}
        if code:
            self.response.headers["X-Error-Code"] = code


@dataclass
class Call:
    """A request on its way through a route."""

    store: Store
    base_url: str
    method: str
    path: str
    """As it came, still percent-encoded."""
    query: dict[str, list[str]]
    headers: Message
    body: bytes
    user: User | None
    args: dict[str, str] = field(default_factory=dict)
    """The decoded variable parts of the path."""

    def first(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        return self.first(name).lower() in ("1", "true")

    def json(self) -> dict[str, Any]:
        try:
            data = json.loads(self.body or b"{}")
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise HubError(400, "Invalid JSON body")
        return data

    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.body.decode())


Handler = Callable[[Call], Response]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []


def route(methods: str, pattern: str) -> Callable[[Handler], Handler]:
    """Register a handler. `{repo}`, `{rev}`, `{n}` are one part of the path, `{path}` the rest."""
    parts = {"repo": r"[^/]+(?:/[^/]+)?", "n": r"\d+", "path": ".*"}
    regex = re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{parts.get(m[1], '[^/]+')})", pattern)

    def register(handler: Handler) -> Handler:
        ROUTES.extend((method, re.compile(regex), handler) for method in methods.split())
        return handler

    return register


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Response(status, json.dumps(value).encode(), {**kind, **(headers or {})})


def page_of(
    call: Call,
    items: Sequence[T],
    key: Callable[[T], list[Any]],
    size: int,
    *,
    descending: bool = False,
) -> tuple[list[T], dict[str, str]]:
    """The page that `?cursor=` asks for, and its `Link` header.

    The cursor holds the key of the last item sent, so that a page neither repeats nor skips an
    item when others come or go meanwhile. `items` must be in the order of `key`.
    """
    cursor = call.first("cursor")
    if cursor:
        try:
            last = json.loads(base64.urlsafe_b64decode(cursor))
            items = [i for i in items if (key(i) < last if descending else key(i) > last)]
        except (ValueError, TypeError) as error:
            raise HubError(400, "Invalid cursor") from error
    page = list(items[:size])
    if len(items) <= size:
        return page, {}
    following = base64.urlsafe_b64encode(json.dumps(key(page[-1])).encode()).decode()
    query = urlencode({**call.query, "cursor": [following]}, doseq=True)
    return page, {"Link": f'<{call.base_url}{call.path}?{query}>; rel="next"'}
