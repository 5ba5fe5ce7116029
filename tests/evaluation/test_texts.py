"""Which files are text, which documents are in them, and what is said of those that hold none."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.evaluation import texts
from lesa_ray.evaluation.texts import find_files, read_documents
from lesa_ray.training.documents import read_fragments
from lesa_ray.training.sources import deal, find_sources
from tests.end_to_end.test_s3_faults import Moody


def names(*sources: object) -> list[str]:
    return [Path(file.name).name for file in find_files([str(source) for source in sources])]


def documents(*sources: object, column: str = "text") -> list[str]:
    return [one.text for one in read_documents(find_files([str(source) for source in sources]), column)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a/c.md", "a/d.py", ".hidden/e.txt", "a/.f.txt", "g.json", "h.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    return tmp_path


def test_folders_files_and_globs(folder: Path) -> None:
    assert names(folder) == ["c.md", "d.py", "b.txt"]
    assert names(folder / "b.txt", folder, folder / "b.txt") == ["b.txt", "c.md", "d.py"]
    assert names(folder / "*/*.md") == ["c.md"]
    assert [file.nbytes for file in find_files([str(folder / "b.txt")])] == [len("text of b.txt")]


def test_a_name_with_the_signs_of_a_glob_is_a_file_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_documents_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo \xff\n")
    lines = [{"text": "drei\n"}, {"text": ""}, {"text": "half \ud83d", "more": 1}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    pq.write_table(pa.table({"text": ["vier", None, "", "fünf"], "n": [1, 2, 3, 4]}), tmp_path / "c.parquet")
    assert documents(tmp_path) == ["one\r\ntwo �\n", "drei\n", "half ?", "vier", "fünf"]
    read = [one.read for one in read_documents(find_files([str(tmp_path)]), "text")]
    assert read == sorted(read)
    assert read[-1] == sum(file.nbytes for file in find_files([str(tmp_path)]))


def test_another_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no", "content": "yes"}\n')
    pq.write_table(pa.table({"content": pa.array(["ja"], pa.large_string())}), tmp_path / "b.parquet")
    assert documents(tmp_path, column="content") == ["yes", "ja"]


@pytest.mark.parametrize("text", ["", "ab\n", "abcdefgh\n" * 5, "x" * 47, "abcdefghij\n" + "y" * 25, "0123456789" * 2])
def test_long_texts_are_cut_and_nothing_is_lost(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST", 10)
    (tmp_path / "a.txt").write_text(text)
    found = documents(tmp_path / "a.txt")
    assert "".join(found) == text
    assert all(0 < len(piece) <= 20 for piece in found)
    assert all(len(piece) == 20 or piece.endswith("\n") for piece in found[:-1])


def test_a_huge_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deal, "__defaults__", (1000,))
    lines = [f"line {number}\n" for number in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    with (tmp_path / "b.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": line}) + "\n" for line in lines)
    found = documents(tmp_path / "a.txt")
    assert len(found) > 8
    assert "".join(found) == "".join(lines)
    assert documents(tmp_path / "b.jsonl") == lines
    read = [one.read for one in read_documents(find_files([f"{tmp_path}/*"]), "text")]
    assert read == sorted(read)
    assert read[0] < 1100


def test_what_is_tokenised_is_what_is_scored(tmp_path: Path) -> None:
    """Odd contents and all kinds: the same documents as for training."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    rows = b'{"text": null}\n{"text": "caf\xe9"}\n{"text": ""}\n{"text": "d"}'
    (tmp_path / "b.jsonl").write_bytes(rows)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(rows))
    for number, kind in enumerate((pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.string())):
        column = pa.array(["e", None, "f"]).cast(kind)
        pq.write_table(pa.table({"text": column}), tmp_path / f"{number}.parquet")
    pq.write_table(pa.table({"text": pa.array([b"\xff"]).view(pa.string())}), tmp_path / "x.parquet")
    found = documents(tmp_path / "*")
    assert found == ["e", "f", "e", "f", "e", "f", "abc", "caf\ufffd", "d", "caf\ufffd", "d", "\ufffd"]
    parts = [part for piece in deal(find_sources([f"{tmp_path}/*"], None, "train")) for part in piece.parts]
    assert found == [one.text for part in parts for one in read_fragments(part, "text", (None, "train"))]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text":\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1: there is no text in a column 'text'; its columns: body"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: there is no text in a column 'text'"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object of columns"),
        ("a.jsonl", b'{"text": "x", "m": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "line 1 is not JSON"),
        ("a.parquet", b"PAR1 but not really", "is not Parquet"),
    ],
)
def test_what_is_not_text_is_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        documents(tmp_path)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no column 'text'; its columns: n$"):
        documents(tmp_path)
    pq.write_table(pa.table({"input_ids": [[1]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="token blocks, which are given as their whole, finished folder"):
        documents(tmp_path)


def test_sources_without_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, says in (
        (tmp_path / "nowhere", "there is no such file or folder"),
        (
            tmp_path / "nowhere" / "*.txt",
            "no data found; expected files that end with .txt, .md, .py, .jsonl, .jsonl.gz",
        ),
        (tmp_path / "empty", "no data found"),
        (tmp_path / "h.bin", "is of no kind that is read here"),
        ("gopher://x/y.txt", "gopher"),
    ):
        with pytest.raises(UserError, match=f"--data {source!s}".replace("*", r"\*")) as error:
            find_files([str(source)])
        assert says in str(error.value)


def test_a_store_that_does_not_answer(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Storage(f"{s3}/texts").write("a.txt", b"x")
    proxy = Moody(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server.server_port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3FileSystem.clear_instance_cache()
    try:
        assert documents(f"{s3}/texts") == ["x"]
        proxy.refuses = lambda number: True
        with pytest.raises(MachineError, match=r"^--data s3://bucket/texts: the store does not answer"):
            find_files([f"{s3}/texts"])
    finally:
        S3FileSystem.clear_instance_cache()
        proxy.stop()


def test_files_that_go_away_or_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    files = find_files([str(tmp_path)])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match="there is no such file"):
        list(read_documents(files, "text"))
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(MachineError, match="cannot be read"):
        list(read_documents(files, "text"))
