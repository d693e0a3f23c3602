"""The live page: an HTTP server on this machine's loopback address.

`/` is the page, `/data?boot=B&version=N` what it does not have yet, as JSON. Both only read. Each
request for data reads on from where the last one ended; without a browser nothing is read.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ffcv_ssl.config.stdout import say
from ffcv_ssl.errors import UserError
from ffcv_ssl.monitor.board import Board
from ffcv_ssl.monitor.page import make_page

HOST = "127.0.0.1"
POLL_S = 2.0
_NAMES = ("127.0.0.1", "localhost", "[::1]")
_PATIENCE_S = 30
_COMPRESS_BYTES = 1 << 16


class Server(ThreadingHTTPServer):
    """Shows a board at HOST. port: 0 for any that is free. Raises UserError for a port that cannot
    be had."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, board: Board, port: int) -> None:
        self.board = board
        self.page = make_page(None, {"poll_s": POLL_S}).encode()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            reason = "is taken" if is_taken else f"cannot be had ({error.strerror or error})"
            raise UserError(f"--port: {port} {reason}; choose another, or leave it out") from None
        self.url = f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error of ours."""


class Handler(BaseHTTPRequestHandler):
    """Answers one browser."""

    server: Server
    timeout = _PATIENCE_S

    def do_GET(self) -> None:
        """The page or its news; 403 for a name of this host that is not loopback's: a page of
        another site could have made its own name lead here."""
        name = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        if name not in _NAMES:
            self._answer(403, "text/plain", b"only for 127.0.0.1 and localhost\n")
            return
        address = urlsplit(self.path)
        if address.path == "/":
            self._answer(200, "text/html; charset=utf-8", self.server.page)
        elif address.path == "/data":
            self._answer(200, "application/json", self._news(parse_qs(address.query)))
        else:
            self._answer(404, "text/plain", b"no such page\n")

    do_HEAD = do_GET

    def _news(self, query: dict[str, list[str]]) -> bytes:
        boot, version = query.get("boot", [""])[0], query.get("version", ["0"])[0]
        is_number = version.isascii() and version.isdigit() and len(version) < 19
        self.server.board.refresh()
        update = self.server.board.since(boot, int(version) if is_number else 0)
        return json.dumps(update, allow_nan=False, separators=(",", ":")).encode()

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        accepted = self.headers.get("Accept-Encoding", "")
        if len(body) > _COMPRESS_BYTES and "gzip" in accepted:  # for who comes through ssh
            body = gzip.compress(body, compresslevel=1)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def run(board: Board, port: int) -> dict[str, Any]:
    """Show a board until SIGINT or SIGTERM comes; returns the summary. Raises UserError."""
    with Server(board, port) as server, _stop_signal() as stop:
        thread = threading.Thread(target=server.serve_forever, args=(0.2,), daemon=True)
        thread.start()
        try:
            say(f"{server.url} shows the runs; Ctrl-C ends it")
            stop.wait()
        finally:
            server.shutdown()
            thread.join()
    return {"status": "ended", "url": server.url, "runs": len(board.runs)}


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set within the block."""
    stop, numbers = threading.Event(), (signal.SIGINT, signal.SIGTERM)
    former = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
