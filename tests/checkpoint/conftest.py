"""S3 servers that can be watched: one that copies ranges itself (moto), behind a proxy that counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from s3fs import S3FileSystem

from lesa_ray.checkpoint import server_copy
from lesa_ray.checkpoint.storage import Storage
from tests.moody import Moody
from tests.servers import moto_server


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The address of an S3 server that knows UploadPartCopy, with the buckets `bucket` and `other`."""
    with moto_server("bucket", "other") as address:
        S3FileSystem.clear_instance_cache()  # which keeps clients of other servers
        yield address
        S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def proxy(moto: str) -> Iterator[Moody]:
    proxy = Moody(moto)
    yield proxy
    proxy.stop()


@pytest.fixture
def store(proxy: Moody, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moody]:
    """The watched server, in a good mood; nothing is known of what it refuses."""
    settings = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "ENDPOINT_URL": proxy.url}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(server_copy, "_refused", set())
    proxy.passed.clear()
    proxy.seen = proxy.refused = proxy.cut = 0
    yield proxy
    proxy.refuses = proxy.cuts = lambda number: False
    proxy.answers = lambda request, headers: None
    proxy.forgets = frozenset()


@pytest.fixture
def uploads_left() -> Callable[[], list[str]]:
    """The keys of uploads in `bucket` that were neither completed nor aborted."""
    return lambda: [upload["Key"] for upload in Storage("s3://bucket").fs.list_multipart_uploads("bucket")]
