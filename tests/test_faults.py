"""Which errors of the libraries behind a store mean that it is away, and which are the machine's at all."""

from __future__ import annotations

import errno
import os
import socket
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from lesa_ray import MachineError, UserError
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.faults import explain, is_fault, is_outage, reaching
from lesa_ray.store.register import outages


class HttpError(Exception):
    """As gcsfs raises it, whose library is no dependency: an Exception with a code, and no response."""

    __module__ = "gcsfs.retry"

    def __init__(self, code: object) -> None:
        super().__init__(f"{code}, from Google")
        self.code = code


@pytest.mark.parametrize(("code", "away"), [(503, True), (429, True), (404, False), (None, False), ("503", False)])
def test_an_answer_of_google_cloud_storage(code: object, away: bool) -> None:
    assert is_outage(HttpError(code)) == away
    assert is_fault(HttpError(code))


def test_what_a_librarys_neighbour_raises_is_no_fault() -> None:
    """Google's cloud clients and its protocol buffers share a package; a tokenizer's file that is no such buffer is
    wrong input."""
    for module, fault in (("google.auth.exceptions", True), ("google.protobuf.message", False)):
        assert is_fault(type("Error", (Exception,), {"__module__": module})()) == fault


def refused(server_time: float) -> Exception:
    """What s3fs makes of a refusal of a request for an object's size, as the server words none."""
    date = formatdate(server_time, usegmt=True)
    metadata = {"HTTPStatusCode": 403, "HTTPHeaders": {"date": date}}
    try:
        try:
            answer: Any = {"Error": {"Code": "403", "Message": "Forbidden"}, "ResponseMetadata": metadata}
            raise ClientError(answer, "HeadObject")
        except ClientError as error:
            raise translate_boto_error(error, set_cause=False)  # noqa: B904 - as s3fs does
    except PermissionError as error:
        return error


@pytest.mark.parametrize(
    ("ahead", "says"), [(1_200, "20 minutes ahead of the server's"), (-3_600, "60 minutes behind"), (600, "")]
)
def test_a_clock_that_is_far_off_is_named_where_s3_refuses_what_it_signed(ahead: float, says: str) -> None:
    error = refused(time.time() - ahead)
    storage = Storage("s3://bucket/model")
    storage.fs = SimpleNamespace(info=Mock(side_effect=error))
    for reach in (lambda: storage.size("config.json"), lambda: storage.info("config.json")):
        with pytest.raises(MachineError if says else PermissionError) as caught:
            reach()
        named = f"s3://bucket/model: refuses requests, as the clock of the machine {socket.gethostname()} is {says}"
        assert str(caught.value).startswith(named) == bool(says)
    with pytest.raises(MachineError if says else PermissionError), outages(storage):
        raise error


def test_a_file_too_large_for_its_disk_says_what_may_be_why() -> None:
    assert "`ulimit -f`" in explain(OSError(errno.EFBIG, os.strerror(errno.EFBIG)))


def test_what_to_check_is_the_path_of_a_folder_and_the_credentials_of_a_store(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    denied = translate_boto_error(ClientError({"Error": {"Code": "AccessDenied", "Message": "No"}}, "PutObject"))
    path = r"^OUT here: cannot be read \(NotADirectoryError.*; check the path and its permissions$"
    with pytest.raises(UserError, match=path), reaching("OUT here"):
        os.listdir(file)
    with pytest.raises(UserError, match=r"PermissionError.*; check the address and the credentials$"), reaching("OUT"):
        raise denied
