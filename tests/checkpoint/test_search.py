"""Which files there are behind a pattern, on a disk and on a store, and how often the store is asked."""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from lesa_ray.checkpoint.search import find_files, is_pattern
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError

pytestmark = pytest.mark.timeout(180)
NAMES = ("a.txt", "b.parquet/_SUCCESS", "b.parquet/part-0.parquet", "b.parquet/.part-0.parquet.crc", "c/d.txt", "e.csv")
HIDDEN = (".f.txt", ".g/h.txt", "c/.i.txt")


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder with these files on each kind of storage."""
    roots = {"local": str(tmp_path), "memory": f"memory://{tmp_path.name}"}
    root = roots.get(request.param) or f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    for name in (*NAMES, *HIDDEN):
        Storage(f"{root}/data").write(name, b"x")
    return f"{root}/data"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt"]),
        ("*.parquet", ["b.parquet/part-0.parquet"]),  # a folder, as Spark and Dask write them
        ("*", ["a.txt", "b.parquet/part-0.parquet", "c/d.txt"]),
        ("**", ["a.txt", "b.parquet/part-0.parquet", "c/d.txt"]),
        ("**/*.txt", ["a.txt", "c/d.txt"]),
        ("?/*", ["c/d.txt"]),
        (".g/*", [".g/h.txt"]),
        ("c/.*", ["c/.i.txt"]),
    ],
)
def test_a_pattern_stands_for_files_and_whole_folders(folder: str, pattern: str, expected: list[str]) -> None:
    found = find_files(f"{folder}/{pattern}", (".txt", ".parquet"), "DATA")
    assert [name.partition("/data/")[2] for name in found] == expected
    assert all(int(info["size"]) == 1 for info in found.values())


def test_a_pattern_costs_a_store_listings_not_a_question_for_each_file(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(f"{s3}/{tmp_path.name}")
    for number in range(20):
        storage.write(f"{number:02}.txt", b"x")
    asked: Counter[str] = Counter()
    call = S3FileSystem._call_s3

    async def counted(self: Any, method: str, *given: Any, **more: Any) -> Any:
        asked[method] += 1
        return await call(self, method, *given, **more)

    monkeypatch.setattr(S3FileSystem, "_call_s3", counted)
    assert len(found := find_files(f"{storage.url}/*.txt", (".txt",), "DATA")) == 20
    assert all(info["ETag"] for info in found.values())
    assert asked.total() < 8


def test_a_folder_here_with_a_patterns_signs_in_its_name_is_none(tmp_path: Path) -> None:
    """As anything below `~/data [old]` is."""
    folder = tmp_path / "my [x]" / "blocks"
    assert is_pattern(str(folder))
    folder.mkdir(parents=True)
    assert not is_pattern(str(folder))
    assert is_pattern(f"{folder}/*.txt")
    assert is_pattern(f"s3://bucket{folder}")


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"a\.txt is a link that leads nowhere"):
        find_files(f"{tmp_path}/*.txt", (".txt",), "DATA")


def test_files_that_a_web_page_lists_are_asked_for_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "data" / name).write_text("hello")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for place in ("data/", "data/*.txt"):
            url = f"http://127.0.0.1:{server.server_port}/{place}"
            assert [info["size"] for info in find_files(url, (".txt",), "DATA").values()] == [5, 5]
        server.shutdown()
