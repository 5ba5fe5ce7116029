"""A proxy before a real S3 server that has moods: it refuses, cuts answers off in the middle, or is away."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class Moody:
    """Asks `refuses` and `cuts` of each request's number. Refused is answered 503. Cut off: half of an answer's body is
    sent under its whole length; where there is none, the connection is closed in place of the answer; and an upload's
    connection is closed half-way, before the store has seen it. It goes away when `leaves` says so of a request, as
    "PUT /bucket/name". `answers` may answer a request in the store's place, with a status and a body. Requests that the
    store answered are in `passed`, each with the bytes sent and received. Headers in `forgets` do not reach it."""

    def __init__(self, upstream: str) -> None:
        self.refuses: Callable[[int], bool] = lambda number: False
        self.cuts: Callable[[int], bool] = lambda number: False
        self.leaves: Callable[[str], bool] = lambda request: False
        self.answers: Callable[[str, Message], tuple[int, bytes] | None] = lambda request, headers: None
        self.forgets: frozenset[str] = frozenset()
        self.passed: list[tuple[str, int, int]] = []
        self.seen = self.refused = self.cut = 0
        self._address = urlparse(upstream).netloc
        self._lock = threading.Lock()
        self._open: set[Any] = set()
        self.server = self._serve(0)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        """Go away: nothing listens, and what was connected is closed."""
        self._away = True  # to requests that come while the server shuts down
        self.leaves = lambda request: False
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self._open):
            connection.close_connection = True
            with contextlib.suppress(OSError):
                connection.connection.shutdown(socket.SHUT_RDWR)  # closed, it would live on in the stream that reads it

    def come_back(self) -> None:
        """At the same address."""
        self.server = self._serve(self.server.server_port)

    def _serve(self, port: int) -> ThreadingHTTPServer:
        moody, self._away = self, False

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                moody._open.add(self)

            def finish(self) -> None:
                moody._open.discard(self)
                super().finish()

            def handle_any(self) -> None:
                if moody._away:
                    self.close_connection = True
                    return
                if moody.leaves(f"{self.command} {self.path}"):
                    moody._away = self.close_connection = True
                    threading.Thread(target=moody.stop).start()
                    return
                length = int(self.headers.get("Content-Length") or 0)
                with moody._lock:
                    moody.seen += 1
                    refuse, cut = moody.refuses(moody.seen), moody.cuts(moody.seen)
                    moody.refused += refuse
                    moody.cut += cut and not refuse
                if cut and not refuse and length:
                    self.rfile.read(length // 2)
                    self.close_connection = True
                    return
                body = self.rfile.read(length)
                if refuse:
                    self.answer(503, [], SLOW_DOWN)
                    return
                if answer := moody.answers(f"{self.command} {self.path}", self.headers):
                    self.answer(answer[0], [], answer[1])
                    return
                connection = http.client.HTTPConnection(moody._address, timeout=30)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in moody.forgets:
                        connection.putheader(name, value)
                connection.endheaders(body)
                response = connection.getresponse()
                content = response.read()
                moody.passed.append((f"{self.command} {self.path}", length, len(content)))
                self.answer(response.status, response.getheaders(), content, cut)
                connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
                self.close_connection = self.close_connection or cut
                if cut and not (body and self.command != "HEAD"):
                    return
                self.send_response(status)
                kept = [(n, v) for n, v in headers if n.lower() not in ("transfer-encoding", "connection", "date")]
                for name, value in kept:
                    if name.lower() != "content-length":
                        self.send_header(name, value)
                length = next((v for n, v in kept if n.lower() == "content-length"), str(len(body)))
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[: len(body) // 2] if cut else body)

            def log_message(self, format: str, *args: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None: ...

        server = Server(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


def hold_until(moody: Moody, together: int, which: Callable[[str, Message], bool]) -> Callable[[], int]:
    """Hold requests until `together` of them are there, and a moment longer for one too many; how many there were."""
    gate, one_more, lock = threading.Barrier(together), threading.Barrier(together + 1), threading.Lock()
    now = most = 0

    def hold(request: str, headers: Message) -> None:
        nonlocal now, most
        if not which(request, headers):
            return
        with lock:
            now += 1
            most = max(most, now)
        with contextlib.suppress(threading.BrokenBarrierError):
            gate.wait(timeout=20)
            one_more.wait(timeout=0.3)
        with lock:
            now -= 1

    moody.answers = hold
    return lambda: most
