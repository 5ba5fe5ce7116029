"""A folder anywhere: files appear whole or not at all, listings are fresh, names resolve as users expect."""

from __future__ import annotations

import errno
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from s3fs.errors import translate_boto_error

from lesa_ray import MachineError, UserError
from lesa_ray.checkpoint.search import find_files
from lesa_ray.checkpoint.storage import Storage, read_file, resolve_base, split_place
from lesa_ray.expansion.out import check_out
from lesa_ray.faults import reaching

Place = Callable[[str], Storage]


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A new folder on each kind of storage."""
    roots = {"local": str(tmp_path), "memory": f"memory://{tmp_path.name}"}
    root = roots.get(request.param) or f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return lambda name: Storage(f"{root}/{name}")


def test_what_is_written_is_read_listed_and_removed(place: Place) -> None:
    storage = place("folder")
    assert storage.is_empty()
    assert storage.list() == {}
    assert storage.size("a") is None
    storage.write("a", b"0123456789")
    storage.write("sub/b", b"x")
    storage.write("sub/none", b"")
    assert (storage.read("sub/none"), storage.read("a", 10)) == (b"", b"")
    with pytest.raises(FileNotFoundError):
        storage.read("c")
    assert storage.list() == {"a": 10}
    assert (storage.read("a"), storage.read("a", 2, 5)) == (b"0123456789", b"234")
    assert (storage.size("a"), storage.exists("a"), storage.exists("c")) == (10, True, False)
    assert not storage.is_empty()
    other: Storage = pickle.loads(pickle.dumps(storage))
    other.write("a", b"newer")
    assert storage.read("a") == b"newer"
    assert storage.list() == {"a": 5}
    storage.remove("a")
    storage.remove("a")
    assert storage.list() == {}
    storage.remove_tree()
    assert storage.is_empty()


def test_a_local_path_is_no_chain_of_filesystems(tmp_path: Path) -> None:
    for url in (f"{tmp_path}/a::b", f"{tmp_path}/memory::{tmp_path}/c"):
        storage = Storage(url)
        storage.write("a.txt", b"here")
        assert storage.is_local
        assert Path(url, "a.txt").read_bytes() == b"here"
        assert list(storage.list()) == ["a.txt"]
        assert list(find_files(url, (".txt",), "--data")) == [f"{url}/a.txt"]


def write_half(file: IO[bytes]) -> None:
    file.write(b"half")
    file.flush()
    raise RuntimeError("stop")


def test_a_file_whose_writing_fails_never_was(place: Place) -> None:
    storage = place("folder")
    storage.write("kept", b"old")
    for name in ("kept", "fresh"):
        with pytest.raises(RuntimeError, match="stop"), storage.create(name) as file:
            write_half(file)
    assert storage.list() == {"kept": 3}
    assert storage.read("kept") == b"old"
    if storage.is_local:
        assert os.listdir(storage.root) == ["kept"]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".model.safetensors.0a1b2c3d.tmp").write_bytes(b"half")
    (tmp_path / "model.safetensors").write_bytes(b"whole")
    Storage(str(tmp_path)).remove_leftovers()
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_links_are_what_they_lead_to(tmp_path: Path) -> None:
    """A snapshot in the hub's cache is a folder of links."""
    (tmp_path / "blobs" / "more").mkdir(parents=True)
    (tmp_path / "blobs" / "0a1b").write_bytes(b"weights")
    (tmp_path / "snapshot").mkdir()
    for name, target in (("model.safetensors", "0a1b"), ("gone.json", "no"), ("original", "more")):
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{target}")
    storage = Storage(str(tmp_path / "snapshot"))
    assert storage.list() == {"model.safetensors": 7}
    assert storage.folders() == ("original",)
    assert storage.read("model.safetensors") == b"weights"


def test_base_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    assert resolve_base("org/name") == str(tmp_path / "org" / "name")  # a folder that is there wins
    assert resolve_base("org/other") == "hf://org/other"
    assert resolve_base("org/other@v1.0") == "hf://org/other@v1.0"
    assert resolve_base("s3://bucket/model") == "s3://bucket/model"
    for wrong in ("nowhere", "./org/other", "/not/there", "~/model", "file", "a/b/c"):
        with pytest.raises(UserError, match=f"BASE {wrong}"):
            resolve_base(wrong)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://", "s3://: names no bucket; write s3://BUCKET/…"),
        ("s3:///out", "names no bucket"),
        ("s3://bucket//out", "has an empty name between two slashes; write s3://bucket/out"),
        ("gs://bucket/a///b/", "write gs://bucket/a/b"),
    ],
)
def test_an_empty_variable_in_a_url_is_told_of(url: str, says: str) -> None:
    """s3fs lists `bucket//out` as empty, whatever was written there: finished work was done again, over itself."""
    with pytest.raises(UserError, match=re.escape(says)):
        Storage(url)
    with pytest.raises(UserError, match=r"empty name|names no bucket"):
        split_place(f"{url}//config.json")
    assert Storage("s3://bucket/out//").url == "s3://bucket/out"


def test_a_protocol_nobody_knows() -> None:
    with pytest.raises(UserError, match="nosuch"):
        Storage("nosuch://bucket")


class Answered(OSError):
    """What the hub's client raises."""

    def __init__(self, status: int) -> None:
        super().__init__("the server said so")
        self.response = SimpleNamespace(status_code=status)


def of_the_server(code: str, status: int, says: str = "no") -> OSError:
    """What s3fs makes of an answer that it does not know."""
    answer = {"Error": {"Code": code, "Message": says}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(answer, "GetObject"))


def because_of(error: Exception) -> FileNotFoundError:
    not_cached = FileNotFoundError("not in the cache")
    not_cached.__cause__ = error
    return not_cached


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "x/a"),
            MachineError,
            "no space .*the same command",
        ),
        (OSError(errno.EIO, "Input/output error"), MachineError, "Input/output error"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x/a"),
            UserError,
            r"is shut \(Perm.*; ask for a key",
        ),
        (OSError(errno.EROFS, "Read-only file system"), UserError, "Read-only"),
        (NoCredentialsError(), UserError, "Unable to locate credentials"),
        (EndpointConnectionError(endpoint_url="http://x"), MachineError, "the store does not answer"),
        (ConnectionRefusedError("refused"), MachineError, "the store does not answer"),
        (of_the_server("Unheard", 400), UserError, r"is shut \(OSError: (?!.*run out)"),
        (of_the_server("400", 400), UserError, r"is shut \(.* without a reason; have the credentials run out\?\)"),
        (of_the_server("ExpiredToken", 400), MachineError, "^OUT x: the credentials have run out; renew them"),
        (
            of_the_server("InvalidRequest", 400, "Content-MD5 is required with Object Lock parameters"),
            UserError,
            "is shut .*; the bucket keeps what is put there",
        ),
        (of_the_server("RequestExpired", 403), MachineError, "the credentials have run out"),
        (of_the_server("InvalidAccessKeyId", 403), UserError, "is shut"),
        (of_the_server("Unheard", 502), MachineError, "the store does not answer"),
        (Answered(403), UserError, "is shut"),
        (Answered(429), MachineError, "the store does not answer"),
        (because_of(Answered(503)), MachineError, "the store does not answer"),
        (because_of(Answered(404)), UserError, "is shut"),
        (UserError("as it is"), UserError, "^as it is$"),
        (MachineError("as it is"), MachineError, "^as it is$"),
    ],
)
def test_who_has_to_mend_a_place_that_fails(error: Exception, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as caught, reaching("OUT x", "is shut", "ask for a key"):
        raise error
    assert str(caught.value).startswith("OUT x: ") == ("as it is" not in says)


def test_a_place_is_tried_without_a_trace(place: Place) -> None:
    storage = place("new/folder")
    storage.try_writing()
    assert storage.is_empty()
    if storage.is_local:
        assert not os.path.exists(os.path.dirname(storage.root))


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
def test_a_full_disk_is_seen_when_it_is_tried(small_disk: Path) -> None:
    Storage(str(small_disk)).try_writing()
    (small_disk / "all").write_bytes(bytes(64 * 1024))
    with pytest.raises(MachineError, match="no space left"), reaching("OUT x"):
        Storage(f"{small_disk}/below/it").try_writing()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for wrong in ("file", "file/below"):
        with pytest.raises(UserError, match="is a file; give a folder"):
            Storage(str(tmp_path / wrong)).list()


def test_a_small_file_by_its_whole_name(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = place("folder")
    storage.write("a.yaml", b"x: 1")
    assert read_file(f"{storage.url}/a.yaml", "config") == b"x: 1"
    missing = "there is no such file$" if storage.is_local else r"cannot be read \(FileNotFoundError.*check the address"
    with pytest.raises(UserError, match=f"^config b: {missing}"):
        read_file(f"{storage.url}/b.yaml", "config b")
    with pytest.raises(UserError, match=r"^config a: cannot be read \(IsADirectoryError.*; give a file that you may"):
        read_file(str(tmp_path), "config a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("here")
    assert read_file("a.yaml", "config") == b"here"


def test_the_home_folder_is_meant_where_no_shell_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Storage("~/deeper").url == str(tmp_path / "deeper")
    assert Storage("file://~x").url == "file://~x"
    (tmp_path / "base").mkdir()
    assert resolve_base("~/base") == str(tmp_path / "base")
    with pytest.raises(UserError, match="lies inside BASE"):
        check_out("~/base", "~/base/deeper")
