"""Compare-and-swap: what a store can do, and what a folder's lock does."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from lesa_ray import MachineError, UserError
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.store import register
from lesa_ray.store.lease import Leases
from tests.moody import Moody


@pytest.fixture
def moody(conditional: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moody]:
    """What stands between the tests and `conditional`'s server."""
    between = Moody(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
    S3FileSystem.clear_instance_cache()
    yield between
    between.stop()


@pytest.mark.timeout(180)
def test_what_a_store_can_do_is_found_out_once(place: str) -> None:
    control = Storage(f"{place}/control")
    found = register.register_of(control.within("leases"), control)
    kinds = {"folder": register.LocalRegister, "s3": register.S3Register}
    if control.is_local:
        assert isinstance(found, kinds["folder"])
        assert not control.exists(register.CONDITIONS_FILE)
        return
    honoured = b"true" in control.read(register.CONDITIONS_FILE)
    assert (found is not None) == honoured
    assert list(control.list()) == [register.CONDITIONS_FILE]  # nothing is left of the trial
    control.write(register.CONDITIONS_FILE, b'{"honoured": false}')
    assert not register.honours_conditions(control)
    assert register.register_of(control.within("leases"), control) is None  # all go by what is noted


@pytest.mark.timeout(180)
def test_a_refusal_of_something_else_says_nothing_of_the_store(conditional: str, moody: Moody) -> None:
    """A connection that was too slow is a 400, as may be a condition that a server does not know."""
    refusal = 400, b"<?xml version='1.0'?><Error><Code>Refused</Code><Message>No.</Message></Error>"
    once, always = (Storage(f"{conditional}/{name}") for name in ("once", "always"))
    seen: list[str] = []

    def answers(request: str, headers: Message) -> tuple[int, bytes] | None:
        if "If-None-Match" not in headers:
            return None
        seen.append(request)
        return None if "once" in request and len(seen) > 1 else refusal

    moody.answers = answers
    assert register.honours_conditions(once)
    assert not register.honours_conditions(always)
    assert list(always.list()) == [register.CONDITIONS_FILE]


@pytest.mark.timeout(180)
def test_a_bucket_that_forbids_to_remove_is_told_of_before_the_work(conditional: str, moody: Moody) -> None:
    denied = 403, b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>No.</Message></Error>"
    forbidden = {"DELETE"}
    moody.answers = lambda request, headers: denied if request.split()[0] in forbidden else None
    with pytest.raises(UserError, match=r"nothing may be removed there .*s3:DeleteObject"):
        register.honours_conditions(Storage(f"{conditional}/kept"))
    forbidden.add("PUT")
    with pytest.raises(PermissionError):  # what is refused first is what is told
        register.honours_conditions(Storage(f"{conditional}/closed"))


@pytest.mark.parametrize("kind", ["folder", "s3"])
@pytest.mark.timeout(180)
def test_a_file_is_replaced_only_where_it_is_what_was_read(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    control = Storage(str(tmp_path) if kind == "folder" else f"{request.getfixturevalue('conditional')}/control")
    storage = control.within("leases")
    found = register.register_of(storage, control)
    assert found is not None
    first = found.swap("a", None, b"1")
    assert first is not None
    assert found.swap("a", None, b"2") is None  # somebody was here before
    assert storage.read("a") == b"1"
    assert found.swap("a", first, b"3") is not None
    assert found.swap("a", first, b"4") is None
    assert storage.read("a") == b"3"
    assert found.swap("b", first, b"5") is None
    assert not storage.exists("b")
    if kind == "folder":
        shutil.rmtree(tmp_path / "leases")
        assert found.swap("a", first, b"6") is None
        assert not (tmp_path / "leases").exists()  # what was removed does not come back


def test_a_process_that_is_suspended_while_it_writes_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = Leases(Storage(str(tmp_path)))
    lease = leases.acquire("thing", "me")
    assert lease is not None
    monkeypatch.setattr(register, "_LOCK_SECONDS", 0.2)
    with (tmp_path / "leases" / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(MachineError, match=r"\.lock: locked by a process that is suspended"):
            leases.acquire("another", "me")
    lease.release()
