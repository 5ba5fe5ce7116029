"""Three kinds of storage that an artifact store may lie on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from tests.servers import moto_server

PLACES = ["folder", "conditional", "plain"]
"""A local folder; an S3 server that honours conditional writes (moto's); one that does not (rclone's)."""


@pytest.fixture(scope="session")
def conditional_server() -> Iterator[str]:
    """The address of an S3 server that honours If-None-Match and If-Match, with a bucket `bucket`."""
    with moto_server("bucket") as address:
        yield address


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty store, on each kind of storage."""
    yield from place_of(request.param, request, tmp_path, monkeypatch)


def place_of(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    if kind == "folder":
        yield str(tmp_path / "store")
        return
    name = f"{request.node.name}-{id(request)}".replace("[", "-").replace("]", "")
    if kind == "plain":
        yield f"{request.getfixturevalue('s3')}/{name}"
        return
    settings = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    for key, value in {**settings, "ENDPOINT_URL": request.getfixturevalue("conditional_server")}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    S3FileSystem.clear_instance_cache()  # which keeps clients of other servers
    yield f"s3://bucket/{name}"
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def conditional(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty store on the server that honours conditional writes."""
    yield from place_of("conditional", request, tmp_path, monkeypatch)
