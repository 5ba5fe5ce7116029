"""An S3 server that answers 503: now and then, and from some moment on. Nothing is lost, the result is the same."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from s3fs import S3FileSystem

from lesa_ray import ExpandConfig, MachineError, expand
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.expansion.runner import InlineRunner

Bases = Callable[[str], str]
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class Moody:
    """A proxy before a real S3 server that answers 503 whenever `refuses` says so of the request's number."""

    def __init__(self, upstream: str) -> None:
        self.refuses: Callable[[int], bool] = lambda number: False
        self.seen = self.refused = 0
        lock, address = threading.Lock(), urlparse(upstream).netloc
        moody = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    moody.seen += 1
                    refuse = moody.refuses(moody.seen)
                    moody.refused += refuse
                if refuse:
                    self.answer(503, [], SLOW_DOWN)
                    return
                connection = http.client.HTTPConnection(address, timeout=30)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body)
                response = connection.getresponse()
                self.answer(response.status, response.getheaders(), response.read())
                connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response(status)
                kept = [(n, v) for n, v in headers if n.lower() not in ("transfer-encoding", "connection", "date")]
                for name, value in kept:
                    if name.lower() != "content-length":
                        self.send_header(name, value)
                length = next((v for n, v in kept if n.lower() == "content-length"), str(len(body)))
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(timeout=10)


@pytest.fixture
def moody(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moody]:
    proxy = Moody(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server.server_port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own retries wait for minutes; s3fs's are left
    S3FileSystem.clear_instance_cache()
    yield proxy
    S3FileSystem.clear_instance_cache()
    proxy.stop()


def test_a_store_that_refuses_now_and_then(
    s3: str, moody: Moody, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")
    storage = Storage(f"{s3}/moody/base")
    for file in Path(bases("llama")).iterdir():
        storage.write(file.name, file.read_bytes())
    moody.refuses = lambda number: number % 7 == 0
    out = f"{s3}/moody/out"
    result = expand(ExpandConfig(base=storage.url, out=out, method="avg-deus"), runner=InlineRunner())
    assert moody.refused > 5
    moody.refuses = lambda number: False
    assert not result.resumed
    expand(ExpandConfig(base=bases("llama"), out=str(tmp_path / "local"), method="avg-deus"), runner=InlineRunner())
    for file in (tmp_path / "local").glob("model*"):
        assert Storage(out).read(file.name) == file.read_bytes()


def test_a_store_that_goes_away_in_the_middle(s3: str, moody: Moody, bases: Bases, tmp_path: Path) -> None:
    config = ExpandConfig(base=bases("llama"), out=f"{s3}/moody/outage", method="avg-deus")
    moody.refuses = lambda number: number > 40
    with pytest.raises(MachineError, match="the same command goes on from here"):
        expand(config, runner=InlineRunner())
    moody.refuses = lambda number: False
    left = Storage(config.out)
    assert left.exists(".lesa-ray/run.json")
    assert not left.exists("config.json")
    assert expand(config, runner=InlineRunner()).resumed
    expand(ExpandConfig(base=bases("llama"), out=str(tmp_path / "local"), method="avg-deus"), runner=InlineRunner())
    assert left.list().keys() == {f.name for f in (tmp_path / "local").iterdir()}
    for file in (tmp_path / "local").glob("model*"):
        assert left.read(file.name) == file.read_bytes()


def test_a_base_whose_store_is_away(s3: str, moody: Moody, bases: Bases, tmp_path: Path) -> None:
    storage = Storage(f"{s3}/moody/base-away")
    for file in Path(bases("llama")).iterdir():
        storage.write(file.name, file.read_bytes())
    start = moody.seen
    for after in (0, 3):  # at the listing, at the headers
        moody.seen = start
        moody.refuses = lambda number, after=after: number > start + after  # type: ignore[misc]
        with pytest.raises(MachineError, match="the store does not answer"):
            expand(ExpandConfig(base=storage.url, out=str(tmp_path / "out"), method="solar"), runner=InlineRunner())
        assert not (tmp_path / "out" / "config.json").exists()
