"""Which documents are read from which part of the data."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.caching import ReadAheadCache
from fsspec.exceptions import FSTimeoutError
from s3fs import S3FileSystem
from s3fs.core import S3File

from lesa_ray.checkpoint.storage import split_place
from lesa_ray.errors import MachineError, UserError
from lesa_ray.evaluation.texts import find_files, read_documents
from lesa_ray.training import documents
from lesa_ray.training.documents import Fragment, is_heldout, read_fragments, read_rows
from lesa_ray.training.sources import Part, Source, deal
from tests.moody import Moody
from tests.training.data_sources import NO_DATASET, find, parts_of, read

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("piece", [1, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("longest", [5, 10**6])
def test_lines_are_each_in_one_part(tmp_path: Path, piece: int, longest: int) -> None:
    texts = [f"{number} " + "é𝄞" * (number * 7 % 40) for number in range(30)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).rstrip("\n"))
    assert read(file, piece=piece, longest=longest) == texts


def test_what_a_store_sends_is_copied_once_not_for_each_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"text": "word " * 180}).encode() + b"\n"
    url = f"{s3}/lines/a.jsonl"
    split_place(url)[0].write("a.jsonl", line * 1000)
    copied = 0
    fetch = ReadAheadCache._fetch

    def counted(cache: Any, *span: Any) -> bytes:
        nonlocal copied
        data: bytes = fetch(cache, *span)
        copied += len(data)
        return data

    monkeypatch.setattr(ReadAheadCache, "_fetch", counted)
    parts = parts_of(deal(find(url), 2**19))
    assert len(parts) == 2
    for part in parts:
        assert len(list(read_rows(part, ("text",), NO_DATASET))) == 500
    assert len(list(read_documents(find_files([url]), "text"))) == 1000
    assert copied < 4 * 1000 * len(line)


def test_little_is_fetched_beyond_a_part(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_BUFFER", 2**12)
    monkeypatch.setattr(documents, "_READ_AHEAD", 2**14)
    line = b'{"text": "a"}\n'
    url = f"{s3}/ahead/a.jsonl"
    split_place(url)[0].write("a.jsonl", line * 2**16)
    fetched = 0
    fetch = S3File._fetch_range

    def counted(file: Any, start: int, end: int) -> bytes:
        nonlocal fetched
        fetched += end - start
        data: bytes = fetch(file, start, end)
        return data

    monkeypatch.setattr(S3File, "_fetch_range", counted)
    part = parts_of(deal(find(url), 2**17))[1]
    assert len(list(read_rows(part, ("text",), NO_DATASET))) == pytest.approx(part.nbytes / len(line), abs=1)
    assert fetched < part.nbytes + 2**15


@pytest.mark.parametrize("piece", [1, 13, 64, 1000])
@pytest.mark.parametrize("text", ["ab\n\n  c\né𝄞𝄞\nf" * 20, "𝄞é" * 70, "\n" * 99, "x", "a\n" * 50 + "b" * 300])
def test_one_document_in_parts_is_the_same_text(tmp_path: Path, text: str, piece: int) -> None:
    (tmp_path / "a.txt").write_text(text, newline="")
    assert read(tmp_path / "a.txt", piece=piece, longest=4) == [text]
    found = [f for part in parts_of(deal(find(tmp_path), piece)) for f in read_fragments(part, "", NO_DATASET, 4)]
    assert [f.begins for f in found] == [True, *[False] * (len(found) - 1)]
    assert [f.ends for f in found] == [*[False] * (len(found) - 1), True]
    assert len({f.key for f in found}) == 1


@pytest.mark.parametrize("text", ["a b\n  c\nd e\n\n\nf  g\n" * 40, " naïve \n    words" * 60])
def test_parts_of_a_document_begin_with_a_line_or_a_word(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, newline="")
    texts = [fragment.text for part in parts_of(deal(find(tmp_path), 37)) for fragment in _whole(part)]
    starts = [len("".join(texts[:number])) for number in range(1, len(texts))]
    assert len(set(starts)) > 10
    for start in set(starts) - {len(text)}:
        line = text[start - 1] == "\n" and not text[start].isspace()
        word = not text[start - 1].isspace() and text[start] == " " and not text[start + 1].isspace()
        assert line or word


def _whole(part: Part) -> list[Fragment]:
    return list(read_fragments(part, "", NO_DATASET))


def test_row_groups_are_shared_among_parts(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(50)]
    pq.write_table(pa.table({"text": texts, "other": range(50)}), tmp_path / "a.parquet", row_group_size=7)
    for piece in (100, 1000, 10**6):
        assert read(tmp_path / "a.parquet", piece=piece) == texts


def test_odd_contents_are_read(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "latin.py").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty.md").write_bytes(b"")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write(b'\xef\xbb\xbf{"text": "\\ud800 half"}\r\n\n{"text": ""}\n{"text": null}\n{"text": "\xff"}')
    assert read(tmp_path) == ["abc", "na\ufffdve", "? half", "\ufffd"]
    pq.write_table(pa.table({"text": pa.array(["a", None, ""], pa.large_string())}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == ["a"]


def test_a_document_has_the_same_key_however_it_is_stored(tmp_path: Path) -> None:
    """Else a copy of it may be both trained on and held out."""
    text = "a" + "é" * 2**16
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    (tmp_path / "marked.txt").write_text(text, encoding="utf-8-sig")
    (tmp_path / "row.jsonl").write_text(json.dumps({"text": text}))
    parts = [part for file in sorted(tmp_path.iterdir()) for part in parts_of(deal(find(file)))]
    keys = {fragment.key for part in parts for fragment in read_fragments(part, "text", NO_DATASET, 1000)}
    assert keys == {text.encode()[: 2**16]}


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("ending", ["jsonl.gz", "json.gz", "jsonl.zst"])
def test_packed_lines_are_read_whole(tmp_path: Path, ending: str) -> None:
    pack = zstd if ending.endswith("zst") else gzip.compress
    texts = [f"{number} é" * (number % 50) + "." for number in range(2000)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    packed = pack(b"\xef\xbb\xbf" + b"".join(lines[:1000])) + pack(b"".join(lines[1000:]))  # as pigz and cat make them
    (tmp_path / f"a.{ending}").write_bytes(packed)
    assert len(deal(find(tmp_path), 100)) == 1
    assert read(tmp_path, piece=100) == texts


def test_wrong_rows_are_named_by_place(tmp_path: Path) -> None:
    good = '{"text": "a"}\n'
    for name, data, message in [
        ("a.jsonl", good + "{", "a.jsonl: line 2 is not JSON"),
        ("b.jsonl", good + "[1]", "b.jsonl: line 2 is not a JSON object"),
        ("c.jsonl", good + '{"body": 1}', "c.jsonl: line 2: there is no text in a column 'text'; its columns: body"),
        ("d.jsonl", good + '{"text": 1}', "d.jsonl: line 2: there is no text in a column 'text'"),
        ("e.parquet", "text", "e.parquet: is not Parquet"),
        ("f.jsonl.zst", "text", "f.jsonl.zst: is not packed as its name says"),
        ("f.jsonl.gz", "text", "f.jsonl.gz: is not packed as its name says"),
    ]:
        (tmp_path / name).write_text(data)
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"the line at byte 14 is not JSON"):
        read(tmp_path / "a.jsonl", piece=10)
    for name, pack in (("f.jsonl.gz", gzip.compress), ("f.jsonl.zst", zstd)):
        packed = pack(good.encode() * 1000)
        (tmp_path / name).write_bytes(packed[: len(packed) // 2])
        with pytest.raises(UserError, match="is not packed as its name says, or damaged"):
            read(tmp_path / name)
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "g.parquet")
    with pytest.raises(UserError, match=r"has no column 'text'; its columns: body, n"):
        read(tmp_path / "g.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "h.parquet")
    with pytest.raises(UserError, match=r"h.parquet: row 1: there is no text in a column 'text'"):
        read(tmp_path / "h.parquet")


def test_rows_of_parquet_are_counted_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"] * 20}), tmp_path / "a.parquet", row_group_size=5)
    parts = parts_of(deal(find(tmp_path), (tmp_path / "a.parquet").stat().st_size // 2 + 1))
    assert len(parts) == 2
    first, second = ([*read_rows(part, ("text",), NO_DATASET)] for part in parts)
    assert [row.where.rpartition(": ")[2] for row in first + second] == [f"row {number}" for number in range(1, 21)]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_how_much_of_a_part_was_read_goes_up_to_all_of_it(tmp_path: Path, ending: str) -> None:
    texts, file = ["word " * 200] * 40, tmp_path / f"a.{ending}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if ending == "parquet":
        pq.write_table(pa.table({"text": texts}), file, row_group_size=5)
    elif ending == "txt":
        file.write_text("".join(texts))
    else:
        file.write_bytes(gzip.compress(lines.encode()) if ending == "jsonl.gz" else lines.encode())
    parts = parts_of(deal(find(file), file.stat().st_size // 2 + 1))
    assert len(parts) == (1 if ending == "jsonl.gz" else 2)
    for part in parts:
        shares = [fragment.share for fragment in read_fragments(part, "text", NO_DATASET, 1000)]
        assert shares == sorted(shares)
        assert 0 < shares[0] < 0.2 or ending == "jsonl.gz"
        assert shares[-1] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_a_line_that_fills_memory_is_left_out(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_LONGEST_LINE", 2**20)
    line = json.dumps({"text": "a"}).encode() + b"\n"
    longest = json.dumps({"text": "b" * (2**20 - 12)}).encode() + b"\n"
    assert len(longest) == 2**20 + 1, "its end is no part of a line"
    content = line + longest + b'{"text": "' + b" " * 2**25 + b'"}\n' + line + b" " * 2**21
    file = tmp_path / f"a.{ending}"
    file.write_bytes(gzip.compress(content, 1) if ending.endswith("gz") else content)
    told: list[str] = []
    tracemalloc.start()
    texts = [
        fragment.text[:1]
        for part in parts_of(deal(find(file), 2**23))
        for fragment in read_fragments(part, "text", NO_DATASET, bad=lambda error: told.append(str(error)))
        if fragment.begins
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["a", "b", "a"]
    assert told[0] == f"DATA {file}: line 3 is longer than 1,048,576 bytes"
    assert len(told) == 2
    assert peak < 2**24 + documents._READ_AHEAD
    with pytest.raises(UserError, match="is longer than"):
        read(file)


def test_a_parquet_file_of_one_row_group_is_not_held_whole(tmp_path: Path) -> None:
    texts, file = [os.urandom(2**10).hex() for _ in range(32_000)], tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), file, use_dictionary=False)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    rows = read_rows(*parts_of(deal(find(file), 2**30)), ("text",), NO_DATASET)
    assert next(rows).values["text"] == texts[0]
    held = pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < file.stat().st_size / 2
    assert [row.values["text"] for row in rows] == texts[1:]


def test_strings_of_parquet_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    text = pa.array([b"abc", b"\xff caf\xe9", None]).view(pa.string())
    large = pa.array([b"a", b"\xff", b""], pa.large_binary()).view(pa.large_string())
    message = pa.StructArray.from_arrays([pa.array(["user"] * 3), text], ["role", "content"])
    messages = pa.ListArray.from_arrays([0, 2, 2, 3], message)
    table = {
        "text": text,
        "large": large,
        "known": text.dictionary_encode(),
        "messages": messages,
        "raw": [b"\xff"] * 3,
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    for column in ("text", "known"):
        assert read(tmp_path / "a.parquet", column) == ["abc", "\ufffd caf\ufffd"]
    rows = [row.values for row in read_rows(parts_of(deal(find(tmp_path)))[0], tuple(table), NO_DATASET)]
    assert [row["large"] for row in rows] == ["a", "\ufffd", ""]
    contents = [[one["content"] for one in row["messages"]] for row in rows]
    assert contents == [["abc", "\ufffd caf\ufffd"], [], [None]]
    assert rows[0]["raw"] == b"\xff"


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_a_damaged_row_group_is_named(tmp_path: Path, codec: str) -> None:
    file = tmp_path / "a.parquet"
    texts = [f"{number:05}" * 20 for number in range(200)]
    pq.write_table(pa.table({"text": texts}), file, row_group_size=100, compression=codec, use_dictionary=False)
    chunk = pq.ParquetFile(file).metadata.row_group(1).column(0)
    damaged = bytearray(file.read_bytes())
    damaged[chunk.data_page_offset : chunk.data_page_offset + 200] = b"\xa5" * 200
    file.write_bytes(damaged)
    rows = read_rows(parts_of(deal(find(file)))[0], ("text",), NO_DATASET)
    assert [next(rows).values["text"] for _ in range(100)] == texts[:100]
    with pytest.raises(
        UserError, match=r"^DATA .*a\.parquet: row group 1 cannot be read, is the file damaged\? \("
    ) as caught:
        next(rows)
    assert "\n" not in str(caught.value)


def test_a_store_that_goes_away_within_a_file_is_no_damage(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = pa.BufferOutputStream()
    texts = [f"{number:06}" * 100 for number in range(400)]
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=100, compression="none", use_dictionary=False)
    url = f"{s3}/away/a.parquet"
    split_place(url)[0].write("a.parquet", sink.getvalue().to_pybytes())
    proxy = Moody(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setattr(documents, "_READ_AHEAD", 2**12)
    S3FileSystem.clear_instance_cache()
    try:
        rows = read_rows(parts_of(deal(find(url)))[0], ("text",), NO_DATASET)
        assert next(rows).values["text"] == texts[0]
        proxy.refuses = lambda number: True
        with pytest.raises(MachineError, match=r"^DATA .*a\.parquet: cannot be read"):
            list(rows)
    finally:
        S3FileSystem.clear_instance_cache()
        proxy.stop()


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst"])
def test_a_disk_that_fails_within_a_packed_file_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            if fails and self.tell():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readinto(buffer)

    fails = False
    file = tmp_path / f"a.{ending}"
    lines = "".join(json.dumps({"text": os.urandom(50).hex()}) + "\n" for _ in range(2000)).encode()
    file.write_bytes(zstd(lines) if ending.endswith("zst") else gzip.compress(lines))
    opened = SimpleNamespace(open=lambda path, *_, **__: Failing(path))
    monkeypatch.setattr(documents, "filesystem", lambda url: (opened, url))
    monkeypatch.setattr(documents, "_BUFFER", 2**12)
    part = Part(Source(str(file), file.stat().st_size, ""))
    assert len(list(read_rows(part, ("text",), NO_DATASET))) == 2000
    fails = True
    with pytest.raises(MachineError, match=r"cannot be read .*Input/output error"):
        list(read_rows(part, ("text",), NO_DATASET))


def test_too_little_memory_for_a_row_group_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")

    def full(*_: Any, **__: Any) -> Any:
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: iter(full, None))
    with pytest.raises(MemoryError, match="malloc of size 64 failed"):
        read(tmp_path / "a.parquet")


def test_an_answer_that_comes_too_late_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError without a number, as pyarrow's own are, but of a class of its own."""
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")

    def late(*_: Any, **__: Any) -> Any:
        raise FSTimeoutError

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: iter(late, None))
    with pytest.raises(MachineError, match=r"^DATA .*a\.parquet: cannot be read"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("ending", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_a_file_that_is_gone_when_it_is_read_is_told_as_that(ending: str, tmp_path: Path) -> None:
    part = Part(Source(str(tmp_path / f"a.{ending}"), 100, ""))
    with pytest.raises(UserError, match=rf"^DATA .*a\.{ending}: there is no such file \(any more\)$"):
        list(read_fragments(part, "text", NO_DATASET))


def test_the_share_held_out_is_about_what_was_asked() -> None:
    keys = [f"document {number}".encode() for number in range(20_000)]
    assert 900 < sum(is_heldout(key, 0.05) for key in keys) < 1100  # 1000 ± 3 standard deviations (31)
    assert not any(is_heldout(key, 0.0) for key in keys)


def test_rows_of_a_dataset_are_read_by_shard(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for number in range(3):
        pq.write_table(pa.table({"text": [f"{number}-{row}" for row in range(4)]}), tmp_path / f"{number}.parquet")
    source = Source(str(tmp_path), 0, "", shards=3)  # a folder is a dataset too, and needs no hub
    found = [
        [row.values["text"] for row in read_rows(part, ("text",), (None, "train"))] for part in parts_of(deal([source]))
    ]
    assert found == [[f"{number}-{row}" for row in range(4)] for number in range(3)]
    fragment = next(read_fragments(Part(source, 2, 3, take=1), "text", (None, "train")))
    assert fragment == Fragment("2-0", True, True, b"2-0")


def test_a_window_that_is_too_long_is_told_from_damage(tmp_path: Path) -> None:
    """A frame by hand (RFC 8878): a window of 2 GiB, as `zstd --long=31` asks for, and one block, as it is."""

    def rows() -> list[Any]:
        file = tmp_path / "a.jsonl.zst"
        return list(read_rows(Part(Source(str(file), file.stat().st_size, "")), ("text",), NO_DATASET))

    line = b'{"text": "whole"}\n'
    block = (len(line) << 3 | 1).to_bytes(3, "little") + line
    for window, whole in ((0x00, True), (21 << 3, False)):
        (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00" + bytes([window]) + block)
        if whole:
            assert [row.values["text"] for row in rows()] == ["whole"]
        else:
            with pytest.raises(UserError, match=r"a\.jsonl\.zst: is packed with a longer window .* pack it again"):
                rows()
