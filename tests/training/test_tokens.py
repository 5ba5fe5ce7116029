"""Token blocks: what is written is read, rows by index, in bounded memory, from any thread or process."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.training import tokens
from lesa_ray.training.tokens import COLUMNS, Kind, content_digest, open_blocks, rows_per_group, write_rows

pytestmark = pytest.mark.timeout(180)
SEQ, GROUP = 6, 4
Columns = dict[str, np.ndarray]


def make(url: str, kind: Kind = "text", rows: tuple[int, ...] = (8, 8, 3)) -> Columns:
    """Token blocks with files of so many rows in `train`, none in `heldout`; what is in them by column."""
    draw = np.random.default_rng(0)
    whole = {column: draw.integers(-100, 2**31 - 1, (sum(rows), SEQ), np.int32) for column in COLUMNS[kind]}
    storage, files, at = Storage(url), [], 0
    for number, many in enumerate(rows):
        part = {column: values[at : at + many] for column, values in whole.items()}
        groups = [{c: v[i : i + GROUP] for c, v in part.items()} for i in range(0, many, GROUP)]
        files.append(write_rows(storage, f"train/part-{number:05d}.parquet", kind, SEQ, groups))
        at += many
    splits = {
        "train": {"rows": sum(rows), "tokens": sum(rows) * SEQ, "files": files},
        "heldout": {"rows": 0, "tokens": 0, "files": []},
    }
    manifest = {
        "format": 1, "kind": kind, "seq_len": SEQ, "vocab_size": 2**31, "rows_per_group": GROUP,
        "digest": content_digest(kind, SEQ, files), "splits": splits,
    }  # fmt: skip
    storage.write("manifest.json", json.dumps(manifest).encode())
    return whole


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_rows_come_back_in_the_order_asked(tmp_path: Path, kind: Kind) -> None:
    whole = make(str(tmp_path), kind)
    blocks = open_blocks(str(tmp_path))
    assert (blocks.kind, blocks.seq_len, blocks.train.rows, blocks.heldout.rows) == (kind, SEQ, 19, 0)
    for indices in ([18], [0, 18, 7, 8, 7], np.random.default_rng(1).permutation(19), []):
        got = blocks.train.read(indices)
        assert set(got) == set(COLUMNS[kind])
        for column, values in got.items():
            assert values.dtype == np.int32
            np.testing.assert_array_equal(values, whole[column][np.asarray(indices, int)])


@pytest.mark.parametrize("wrong", [[-1], [19], [0, 100]])
def test_rows_that_are_not_there_are_an_index_error(tmp_path: Path, wrong: list[int]) -> None:
    make(str(tmp_path))
    with pytest.raises(IndexError, match="of 19 in train"):
        open_blocks(str(tmp_path)).train.read(wrong)


def test_any_parquet_reader_sees_fixed_size_lists_in_whole_groups(tmp_path: Path) -> None:
    whole = make(str(tmp_path), "chat")
    files = sorted(tmp_path.glob("train/*.parquet"))
    assert pq.read_schema(files[0]).field("labels").type == pa.list_(pa.field("element", pa.int32(), False), SEQ)
    footers = [pq.read_metadata(file) for file in files]
    groups = [footer.row_group(group).num_rows for footer in footers for group in range(footer.num_row_groups)]
    assert groups == [4, 4, 4, 4, 3]
    assert pa.concat_tables(map(pq.read_table, files)).column("labels").to_pylist() == whole["labels"].tolist()


def test_the_record_of_a_file_is_true_and_its_bytes_are_the_same_each_time(tmp_path: Path) -> None:
    make(str(tmp_path / "a"), "chat")
    make(str(tmp_path / "b"), "chat")
    for file in open_blocks(str(tmp_path / "a")).train.files:
        data = (tmp_path / "a" / file["name"]).read_bytes()
        assert file["bytes"] == len(data)
        assert file["sha256"] == hashlib.sha256(data).hexdigest()
        assert data == (tmp_path / "b" / file["name"]).read_bytes()


def test_small_ids_are_stored_small(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 32_000, (256, 1024), np.int32)
    record = write_rows(Storage(str(tmp_path)), "a.parquet", "text", 1024, [{"input_ids": rows}])
    assert record["bytes"] < 0.52 * rows.nbytes  # two bytes of four say nothing


def test_groups_are_cached_but_not_more_than_eighteen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(str(tmp_path), rows=(80, 20))
    asked: list[tuple[str, int, int | None]] = []
    real = Storage.read

    def read(self: Storage, name: str, start: int = 0, end: int | None = None) -> bytes:
        asked.append((name, start, end))
        return real(self, name, start, end)

    monkeypatch.setattr(Storage, "read", read)
    split = open_blocks(str(tmp_path)).train
    asked.clear()
    np.testing.assert_array_equal(split.read(range(100))["input_ids"], whole["input_ids"])
    assert len(asked) == 25 + 2  # each group once, each footer once
    assert len(split._groups) == 18
    split.read(range(7 * GROUP, 100))
    assert len(asked) == 27
    split.read([0])
    assert len(asked) == 28
    size = (tmp_path / "train/part-00000.parquet").stat().st_size
    _, start, end = asked[-1]
    assert end is not None
    assert end - start < size / 10  # a group, not the file


def test_a_footer_longer_than_the_first_guess_is_read(tmp_path: Path) -> None:
    whole = make(str(tmp_path), "chat", rows=(2400,))["labels"]
    data = (tmp_path / "train/part-00000.parquet").read_bytes()
    assert int.from_bytes(data[-8:-4], "little") > tokens._FOOTER
    np.testing.assert_array_equal(open_blocks(str(tmp_path)).train.read([3, 2399])["labels"], whole[[3, 2399]])


def test_a_split_travels_without_its_cache_and_serves_many_threads(tmp_path: Path) -> None:
    whole = make(str(tmp_path), rows=(80, 80))["input_ids"]
    split = open_blocks(str(tmp_path)).train
    split.read(range(100))
    data = pickle.dumps(split)
    assert len(data) < 2000
    copy = pickle.loads(data)
    draws = [np.random.default_rng(seed).integers(0, 160, 30) for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for draw, got in zip(draws, pool.map(copy.read, draws), strict=True):
            np.testing.assert_array_equal(got["input_ids"], whole[draw])
    assert len(copy._groups) <= 18


def test_what_is_not_token_blocks_is_refused_by_name(tmp_path: Path) -> None:
    make(str(tmp_path / "good"))
    manifest = json.loads((tmp_path / "good/manifest.json").read_text())
    for text, message in [
        (None, "holds no finished token blocks"),
        ("{", "is not JSON"),
        ("[]", "not that of token blocks"),
        ("{}", "not that of token blocks"),
        (json.dumps({**manifest, "format": 2}), "of format 2; this version reads 1"),
        (json.dumps(manifest), "part-00000.parquet is missing"),
    ]:
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        if text is not None:
            (folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            open_blocks(str(folder))
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harm", ["short", "page", "footer", "gone"])
def test_a_damaged_file_is_named(tmp_path: Path, harm: str) -> None:
    whole = make(str(tmp_path))
    file = tmp_path / "train/part-00001.parquet"
    good = file.read_bytes()
    data = bytearray(good)
    blocks = open_blocks(str(tmp_path))
    if harm == "short":
        file.write_bytes(data[:-1])
        with pytest.raises(UserError, match=r"part-00001\.parquet is missing or of another size"):
            open_blocks(str(tmp_path))
    if harm == "page":
        data[4:40] = bytes(36)
    elif harm == "footer":
        data[-60:-8] = bytes(52)
    file.write_bytes(data)
    if harm in ("gone", "short"):
        file.unlink()
    with pytest.raises(UserError, match=r"part-00001\.parquet is (damaged|gone)"):
        blocks.train.read([9])
    blocks.train.read([0])  # the others still serve
    file.write_bytes(good)
    np.testing.assert_array_equal(
        blocks.train.read([9])["input_ids"], whole["input_ids"][[9]]
    )  # nor is the failure kept


def test_a_file_of_other_rows_than_the_manifest_has_is_named(tmp_path: Path) -> None:
    make(str(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["splits"]["train"]["files"][1]["rows"] = 7
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"part-00001\.parquet is damaged \(.*8 rows, 7 expected\)"):
        open_blocks(str(tmp_path)).train.read([8])


def test_a_store_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(str(tmp_path))
    split = open_blocks(str(tmp_path)).train

    def read(*_: object) -> bytes:
        raise OSError(errno.EIO, "no answer")

    monkeypatch.setattr(Storage, "read", read)
    with pytest.raises(MachineError, match=r"part-00000\.parquet cannot be read"):
        split.read([0])


def test_group_sizes() -> None:
    assert [rows_per_group(n) for n in (8, 2048, 2**20, 2**21)] == [131072, 512, 1, 1]
