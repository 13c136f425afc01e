"""``ser-edge listen --web``: the live view as a page, from the standard library's server.

The page and its one stream of server-sent events are all there is; nothing can be asked of the listener through them,
and they hold no audio. Whoever is not on this machine needs the token. A browser that reads slowly or not at all holds
up its own thread alone, and only for a while.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import os
import re
import secrets
import socket
import socketserver
import threading
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from edge_runtime.errors import SinkError, UsageError
from edge_runtime.monitor import Monitor

LOOPBACK = "127.0.0.1"
TOKEN_VARIABLE = "SER_EDGE_WEB_TOKEN"

PERIOD_S = 0.2
"""Between two messages to a page."""

CLIENT_S = 10.0
"""How long a client may send or take nothing before it is left."""

JOIN_S = 0.5
MOST_CLIENTS = 32


class LivePage:
    """Serves the live view while it is entered.

    Args:
        monitor: what to show.
        address: ``PORT``, which only this machine reaches, or ``HOST:PORT``; port 0 takes any that is free.
        environment: where ``SER_EDGE_WEB_TOKEN`` is looked up, the token to ask for. Without it, one is made for an
            address that other machines reach, and none is asked for on the others.

    Attributes:
        url: of the page, with the token.

    Raises:
        UsageError: an address or token that cannot be.
        SinkError: the port is in use, or not ours to take.

    Example:
        >>> with LivePage(monitor, "8765") as page:  # doctest: +SKIP
        ...     print(page.url)
        http://127.0.0.1:8765/
    """

    def __init__(self, monitor: Monitor, address: str, environment: Mapping[str, str] = os.environ) -> None:
        host, port = _parse(address)
        token = environment.get(TOKEN_VARIABLE)
        if token is not None and not re.fullmatch(r"[A-Za-z0-9_-]{16,}", token):
            raise UsageError(f"${TOKEN_VARIABLE}: valid: at least 16 letters, digits, '-' and '_'")
        try:
            family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            if token is None and not ipaddress.ip_address(where[0]).is_loopback:
                token = secrets.token_urlsafe(24)
            self._server = _Server(monitor, family, where, {host, "localhost", socket.gethostname()}, token)
        except OSError as error:
            raise SinkError(f"--web {address}: {error.strerror}; choose another address or port") from None
        self.url = f"http://{_shown(host)}:{self._server.server_address[1]}/" + (f"?token={token}" if token else "")
        self._thread = threading.Thread(target=self._serve, name="ser-edge web", daemon=True)

    def __enter__(self) -> LivePage:
        """Begin to serve."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave every client and free the port."""
        self._server.ending.set()
        with suppress(OSError):
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for a client
        self._thread.join(JOIN_S)
        self._server.server_close()

    def _serve(self) -> None:
        # Not serve_forever, which looks twice a second whether it is to end.
        while not self._server.ending.is_set():
            self._server.handle_request()


def _parse(address: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:(?:\[([^\]]+)\]|([^:\[\]]+)):)?(\d{1,5})", address)
    if not found or int(found[3]) > 65535:
        raise UsageError(f"--web {address!r}: valid: PORT, HOST:PORT or [IPV6]:PORT, port 0 to 65535")
    return found[1] or found[2] or LOOPBACK, int(found[3])


def _shown(host: str) -> str:
    """Return how a browser is to name a host; the address that stands for all of a machine's becomes its name."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


class _Server(socketserver.ThreadingTCPServer):
    """Knows what its clients are to see; each has a thread, and no more are taken than there may be threads.

    Not http.server's own, which asks a name server for this machine's name and waits for the answer.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = MOST_CLIENTS

    def __init__(
        self, monitor: Monitor, family: socket.AddressFamily, address: Any, names: set[str], token: str | None
    ) -> None:
        self.monitor = monitor
        self.token = token
        self.names = {name.lower() for given in names for name in (given, f"{given}.local")}
        page = files("edge_runtime").joinpath("live.html").read_text(encoding="utf-8")
        self.page = page.encode()
        self.policy = _policy(page)
        self.ending = threading.Event()
        self.address_family = family
        self._free = threading.BoundedSemaphore(MOST_CLIENTS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that went away is no error of ours."""


def _policy(page: str) -> str:
    """Return a content security policy that lets a page run its own script and style, and load nothing."""
    hashes = {
        element: base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        for element, content in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    }
    sources = " ".join(f"{element}-src 'sha256-{found}';" for element, found in hashes.items())
    return f"default-src 'none'; {sources} connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"


class _Handler(BaseHTTPRequestHandler):
    """Answers one client."""

    server: _Server
    timeout = CLIENT_S

    def do_GET(self) -> None:
        """Give the page or its events to a client that may have them."""
        url = urlsplit(self.path)
        if not self._names_us():
            self.send_error(HTTPStatus.FORBIDDEN, "not under this name: use the machine's name or address")
        elif not self._is_trusted(parse_qs(url.query)):
            self.send_error(HTTPStatus.FORBIDDEN, "the address lacks the token that ser-edge printed")
        elif url.path == "/":
            self._begin(HTTPStatus.OK, "text/html; charset=utf-8", len(self.server.page))
            self.wfile.write(self.server.page)
        elif url.path == "/events":
            self._send_events()
        else:
            self.send_error(HTTPStatus.NOT_FOUND, "there is only /")

    def _names_us(self) -> bool:
        """Return whether the client asked for this machine, by its name or by an address.

        A page of a stranger's that had its own name lead here (DNS rebinding) would ask for that name.
        """
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            return host in self.server.names or bool(ipaddress.ip_address(host))
        except ValueError:
            return False

    def _is_trusted(self, query: dict[str, list[str]]) -> bool:
        given = query.get("token", [""])[0]
        return self.server.token is None or secrets.compare_digest(given.encode(), self.server.token.encode())

    def _send_events(self) -> None:
        self._begin(HTTPStatus.OK, "text/event-stream")
        monitor, revision = self.server.monitor, 0
        while not self.server.ending.is_set():
            entries = monitor.entries(after=revision)
            revision = max((entry.revision for entry in entries), default=revision)
            message = monitor.snapshot().to_dict() | {"entries": [entry.to_dict() for entry in entries]}
            self.wfile.write(f"data: {json.dumps(message)}\n\n".encode())
            self.server.ending.wait(PERIOD_S)

    def _begin(self, status: HTTPStatus, content: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Allow", "GET")
        self.send_header("Content-Security-Policy", f"{self.server.policy}; frame-ancestors 'none'")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Refuse with a line of text, and with 405 what is no GET."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        text = f"{message if status == code and message else status.phrase}\n".encode()
        self._begin(status, "text/plain; charset=utf-8", len(text))
        self.wfile.write(text)

    def version_string(self) -> str:
        """Keep the versions of what runs here to ourselves."""
        return "ser-edge"

    def log_message(self, format: str, *values: Any) -> None:
        """Say nothing: messages are about listening."""
