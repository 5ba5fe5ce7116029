"""An emulated S3 server (moto) on loopback, in threads of this process."""

from __future__ import annotations

import contextlib
import http.client
import logging
from collections.abc import Iterator
from urllib.parse import urlparse

from moto.server import ThreadedMotoServer


@contextlib.contextmanager
def moto_server(*buckets: str) -> Iterator[str]:
    """The address of a server with these buckets."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for bucket in buckets:
        connection = http.client.HTTPConnection(urlparse(address).netloc, timeout=30)
        connection.request("PUT", f"/{bucket}")
        assert connection.getresponse().status == 200
        connection.close()
    yield address
    server.stop()
