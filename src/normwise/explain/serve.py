"""One page on this machine's own address, for this machine's browser alone."""

from __future__ import annotations

import os
import re
import time
from http import HTTPStatus
from socketserver import StreamRequestHandler, ThreadingTCPServer

from . import page

ADDRESS = "127.0.0.1"
HEAD = 16384  # bytes of request line and headers; browsers send about a thousand
SECONDS = 5.0  # for a request to arrive, and for its answer to be taken
METHODS = ("GET", "HEAD")
REQUEST = re.compile(r"([A-Z]+) (\S+) HTTP/1\.[01]")
HEADER = re.compile(r"([-!#$%&'*+.^`|~\w]+):[ \t]*([^\r\n]*)", re.ASCII)


class Server(ThreadingTCPServer):
    """Serves one page at ``/``, until it is closed; ``serve_forever`` runs it.

    Args:
        document: The page.
        port: Where; 0 for any that is free.

    Raises:
        OSError: If the port is taken, or may not be.
    """

    daemon_threads = True  # a slow reader does not keep the program from ending
    block_on_close = False
    allow_reuse_address = os.name == "posix"  # elsewhere it would let another program take the port too

    def __init__(self, document: str, port: int = 0) -> None:
        super().__init__((ADDRESS, port), _Request)
        self.port = int(self.server_address[1])
        self.document = document.encode()
        names = (ADDRESS, "localhost")
        self.hosts = {f"{name}:{self.port}" for name in names} | set(names if self.port == 80 else ())  # 80 goes unsaid
        self.policy = f"{page.policy()}; frame-ancestors 'none'"

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that leaves is no error here."""


class _Request(StreamRequestHandler):
    """One request and its answer; the connection ends with it."""

    server: Server

    def handle(self) -> None:
        head = self._head()
        if not head:
            return  # browsers open connections ahead of need
        method, status = self._asked(head)
        body = self.server.document if status is HTTPStatus.OK else f"{status.phrase}\n".encode()
        kind = "text/html" if status is HTTPStatus.OK else "text/plain"
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": self.server.policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "Connection": "close",
        }
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(METHODS)
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {text}" for name, text in headers.items())]
        self.connection.settimeout(SECONDS)
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else body))
        self._drain()

    def _asked(self, head: str) -> tuple[str, HTTPStatus]:
        """The method, and what the request deserves."""
        if not head.endswith("\r\n\r\n"):
            late = len(head) < HEAD
            return "", HTTPStatus.REQUEST_TIMEOUT if late else HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        first, *rest = head[:-4].split("\r\n")
        request, headers = REQUEST.fullmatch(first), [HEADER.fullmatch(line) for line in rest]
        if request is None or None in headers:
            return "", HTTPStatus.BAD_REQUEST
        method, target = request.groups()
        hosts = [found[2].strip().lower() for found in headers if found is not None and found[1].lower() == "host"]
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            return method, HTTPStatus.FORBIDDEN  # a foreign name that leads here, to read the page from its site
        if method not in METHODS:
            return method, HTTPStatus.METHOD_NOT_ALLOWED
        return method, HTTPStatus.OK if target == "/" else HTTPStatus.NOT_FOUND

    def _head(self) -> str:
        """What came up to the empty line, up to the limit, or in time."""
        found, end = b"", time.monotonic() + SECONDS
        while b"\r\n\r\n" not in found and (data := self._receive(HEAD - len(found), end)):
            found += data
        before, mark, _ = found.partition(b"\r\n\r\n")
        return (before + mark).decode("latin-1")

    def _drain(self) -> None:
        """Take what the client still sends, for a while: closed before that, it might not get its answer."""
        end = time.monotonic() + 1
        self.connection.shutdown(1)
        while self._receive(65536, end):
            pass

    def _receive(self, size: int, end: float) -> bytes:
        """What has come; nothing where the client has ended, or the time is over."""
        left = end - time.monotonic()
        if left <= 0:
            return b""
        self.connection.settimeout(left)
        try:
            return self.connection.recv(size)
        except OSError:
            return b""
