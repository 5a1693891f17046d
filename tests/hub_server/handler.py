"""HTTP: reads a request, has it answered, sends the answer."""

from __future__ import annotations

import socket
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from . import routes  # noqa: F401  (registers them)
from .faults import Fault, Faults
from .log import KEPT_HEADERS, Log, Request
from .store import Store, User
from .wire import ROUTES, Call, HubError, Response


class Listener(ThreadingHTTPServer):
    """The listening socket, with what its handlers share, and a list of open connections."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, store: Store, faults: Faults, log: Log) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.store, self.faults, self.log = store, faults, log
        self.base_url = f"http://127.0.0.1:{self.server_port}"
        self.closing = threading.Event()
        self.connections: set[socket.socket] = set()

    def close_all(self) -> None:
        """Stop listening and cut every connection, those kept alive included."""
        self.closing.set()
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other side was first

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news here; tests kill clients on purpose."""


class Handler(BaseHTTPRequestHandler):
    """One connection, kept alive over many requests."""

    server: Listener
    protocol_version = "HTTP/1.1"
    server_version = "hub"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and a small body leave in one packet

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def handle(self) -> None:
        if not self.server.closing.is_set():
            super().handle()

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed: the log is for tests to read."""

    def do_any(self) -> None:
        body = self._read_body()
        target = urlsplit(self.path)
        path = target.path if target.path == "/" else target.path.rstrip("/")
        query = parse_qs(target.query, keep_blank_values=True)
        fault = self.server.faults.befalling(self.command, unquote(path))
        response = (fault and fault.error()) or None
        silent = fault is not None and (fault.drop or fault.lost)
        if response is None and not (fault and fault.drop):
            response = self._answer(path, query, body)
        self.server.log.add(
            Request(
                method=self.command,
                path=unquote(path),
                query=query,
                headers={n: self.headers[n] for n in KEPT_HEADERS if n in self.headers},
                authenticated="Authorization" in self.headers,
                size=len(body),
                status=0 if silent or response is None else response.status,
            )
        )
        if fault and fault.cut is None:
            fault.wait(self.server.closing)
        if silent or response is None:
            self.close_connection = True
            return
        self._send(response, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_any

    def _read_body(self) -> bytes:
        """The request's body, which clients may send in chunks of unknown total."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(parts)

    def _answer(self, path: str, query: dict[str, list[str]], body: bytes) -> Response:
        """The answer of the route for this path, or the error it ends with."""
        store = self.server.store
        with store.lock:
            try:
                call = Call(
                    store=store,
                    base_url=self.server.base_url,
                    method=self.command,
                    path=path,
                    query=query,
                    headers=self.headers,
                    body=body,
                    user=self._user(store),
                )
                for method, pattern, handler in ROUTES:
                    match = pattern.fullmatch(path) if method == self.command else None
                    if match:
                        parts = match.groupdict(default="")
                        call.args = {name: unquote(text) for name, text in parts.items()}
                        return handler(call)
                raise HubError(404, "Sorry, we can't find the page you are looking for.")
            except HubError as error:
                return error.response
            except Exception as error:  # a mistake of this server's: say so, loudly
                traceback.print_exc()
                return HubError(500, f"The test server failed: {error!r}").response

    def _user(self, store: Store) -> User | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        user = next((user for user in store.users.values() if user.token == token), None)
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _send(self, response: Response, fault: Fault | None) -> None:
        """Send it all, or as much as a fault lets through."""
        body = fault.spoil(response.body) if fault else response.body
        self.send_response(response.status)
        for name, value in {"Content-Length": str(len(body)), **response.headers}.items():
            self.send_header(name, value)
        if fault and fault.cut is not None:
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if fault is None else body[: fault.cut])
        self.wfile.flush()
        if fault and fault.cut is not None:
            fault.wait(self.server.closing)
