"""One Hub, as a command uses it: reading JSON, pages and parts of files, and what the client says.

Calls go through huggingface_hub's own session, so that its offline mode, proxies and
``set_client_factory`` hold. Listings are read as plain JSON, since one odd entry makes the
client's own iterator fail for all.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
)

from lorahub_registry.errors import HubError, UsageError
from lorahub_registry.hub.failures import Busy, Where, explained, offline
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import AdapterRef
from lorahub_registry.settings import Settings

LIBRARY = "lorareg"
# The Hub counts requests by windows of five minutes: waiting longer than one makes no sense.
LONGEST_WAIT = 330
_ATTEMPTS = 4
_TIMEOUT = 30.0
_MOST_JSON = 64 << 20
_AGAIN = (408, 429, 500, 502, 503, 504)
_BROKEN_OFF = (httpx2.TimeoutException, httpx2.ReadError, httpx2.RemoteProtocolError)


@dataclass(frozen=True)
class Answer:
    """What came back: the bytes that were asked for, and what the headers say."""

    data: bytes
    total: int | None
    """Size of the whole file, where only a part was asked for."""
    next_page: str | None


class Stopped(Exception):
    """Other work failed, or the user gave up: this need not go on."""


class Hub:
    """One Hub.

    Attributes:
        requests: how many calls were made by this object's own methods.
        closing: once set, nobody waits any more for the Hub to have time.
    """

    def __init__(self, settings: Settings, progress: Progress = silent) -> None:
        self.endpoint = settings.endpoint
        self.offline = settings.offline
        self.progress = progress
        self.requests = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()

    @cached_property
    def api(self) -> HfApi:
        """The client; it finds the token by itself."""
        return HfApi(endpoint=self.endpoint, library_name=LIBRARY)

    def where(self, repo: str, file: str = "", revision: str | None = None) -> Where:
        """What a call is about, for messages."""
        return Where(self.endpoint, repo, file, revision or "")

    def require_online(self, where: Where) -> None:
        """Refuse where offline mode is on.

        Raises:
            HubError: it is.
        """
        if self.offline or constants.is_offline_mode():
            raise offline(where)

    def info(self, repo: str, revision: str | None = None) -> dict[str, Any]:
        """A repo at a revision as the Hub describes it. One call.

        Raises:
            HubError: see :mod:`.failures`.
        """
        where = self.where(repo, revision=revision)
        url = f"{self.endpoint}/api/models/{quote(repo)}"
        if revision is not None:
            url += f"/revision/{quote(revision, safe='')}"
        found, _ = self.json(url, where)
        if not isinstance(found, dict) or not isinstance(found.get("sha"), str):
            raise HubError(f"{where}: the Hub names no commit of it", hint="is it an empty repo?")
        return found

    def json(
        self, url: str, where: Where, params: Mapping[str, Any] | None = None
    ) -> tuple[Any, str | None]:
        """A JSON document, and the address of the next page where there is one."""
        answer = self._get(url, where, params=params, most=_MOST_JSON)
        with explained(where):
            return json.loads(answer.data), self._here(answer.next_page)

    def part(self, repo: str, path: str, commit: str, start: int, stop: int) -> Answer:
        """Bytes ``start`` to ``stop`` (not included) of a file, fewer where it ends. One call."""
        where = self.where(repo, path)
        url = hf_hub_url(repo, path, revision=commit, endpoint=self.endpoint)
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        return self._get(url, where, headers=headers, start=start, most=stop - start)

    def _here(self, url: str | None) -> str | None:
        """A next page's address at this endpoint: a mirror may name the Hub that it copies."""
        return url and self.endpoint + re.sub(r"^https?://[^/]+", "", url)

    def _get(
        self,
        url: str,
        where: Where,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        start: int = 0,
        most: int,
    ) -> Answer:
        """GET, asking again where that can help: not where nobody answers at all."""
        self.require_online(where)
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            with explained(where):
                try:
                    return self._once(url, params, dict(headers or {}), start, most)
                except HfHubHTTPError as error:
                    if last or error.response.status_code not in _AGAIN:
                        raise
                    seconds = _asked_to_wait(error, 2.0**attempt)
                except _BROKEN_OFF as error:
                    if last or isinstance(error, httpx2.ConnectTimeout):
                        raise
                    seconds = 2.0**attempt
            if seconds > LONGEST_WAIT:
                raise Busy(
                    f"{where}: too many requests; the Hub asks to wait {seconds:.0f} s",
                    hint="run this again then: what is done is not done again",
                )
            self.progress.say(f"{where}: the Hub is busy, asking again in {seconds:.0f} s")
            self._pause(seconds)
        raise AssertionError("unreachable")

    def _pause(self, seconds: float) -> None:
        if self.closing.wait(seconds):
            raise Stopped

    def _once(
        self,
        url: str,
        params: Mapping[str, Any] | None,
        headers: dict[str, str],
        start: int,
        most: int,
    ) -> Answer:
        with self._lock:
            self.requests += 1
        headers = {**build_hf_headers(library_name=LIBRARY), **headers}
        with get_session().stream(
            "GET", url, params=params or None, headers=headers, timeout=_TIMEOUT
        ) as response:
            if response.status_code == 416:  # a range of an empty file
                return Answer(b"", 0, None)
            hf_raise_for_status(response)
            # A server that knows no ranges sends all of it, from the start.
            skip = start if response.status_code == 200 else 0
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= skip + most:
                    break
            return Answer(
                bytes(data[skip : skip + most]),
                _total(response),
                response.links.get("next", {}).get("url"),
            )


def _total(response: httpx2.Response) -> int | None:
    """The size of the whole file."""
    found = re.search(r"/(\d+)\s*$", response.headers.get("Content-Range", ""))
    length = found[1] if found else response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _asked_to_wait(error: HfHubHTTPError, otherwise: float) -> float:
    """How long the Hub wants us to wait: as its headers say, plus a second."""
    headers = error.response.headers
    limits = parse_ratelimit_headers(headers)
    if error.response.status_code == 429 and limits is not None and limits.remaining == 0:
        return limits.reset_in_seconds + 1.0
    after = headers.get("Retry-After", "").strip()
    return float(after) + 1 if after.isdigit() else otherwise


@contextmanager
def heard(progress: Progress) -> Iterator[None]:
    """What the client logs goes to ``progress``, and its own bars stay away."""
    logger = logging.getLogger("huggingface_hub")
    handlers, logger.handlers = logger.handlers, [_Teller(progress)]
    try:
        wanted = constants.HF_HUB_DISABLE_PROGRESS_BARS is False  # the user asks for them
        with warnings.catch_warnings(), nullcontext() if wanted else disable_progress_bars():
            warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
            yield
    finally:
        logger.handlers = handlers


class _Teller(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        # Addresses of a storage are signed: the part after ? is nobody's business.
        self._progress.say(re.sub(r"\?[^\s'\"]+", "", record.getMessage()).strip())


def hub_id(text: str, *, what: str) -> str:
    """``text`` if it is a repo's id, without folder or revision.

    Raises:
        UsageError: it is none.
    """
    ref = AdapterRef.parse(text)
    if ref.subfolder or ref.revision:
        raise UsageError(f"{text!r} is not the id of {what}", hint="write owner/name alone")
    return ref.repo
