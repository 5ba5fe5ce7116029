"""Which errors of the libraries behind a store mean that it is away, and which are the machine's at all."""

from __future__ import annotations

import pytest

from lesa_ray.faults import is_fault, is_outage


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
