"""Token blocks: the folder between text and training. Its format, how its files are written, how rows are read.

    OUT/manifest.json              written last: from then on the folder is token blocks
    OUT/train/part-00000.parquet   rows of `seq_len` int32: `input_ids`; conversations also `labels`, `position_ids`
    OUT/heldout/part-00000.parquet
    OUT/tokenizer/                 what the ids mean

Decides
- Parquet, so that anything can read it. A row group holds 2**20 tokens (4 MiB a column before compression), and groups
  are counted over the whole split, so that row i lies in group i // rows_per_group whatever the files are. Reading one
  row costs a group: readers should go through rows group by group, or shuffle within a few groups.
- Ids are small numbers in four bytes: split into byte streams and compressed they take under half of that.
- The reader asks the storage for exactly the bytes of a group, and keeps the last 18 decoded groups (75 MB; three times
  that for conversations).
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import IO, Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import explain, reaching

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER_DIR = "tokenizer"
UNSCORED = -100
"""The label of a token that is not to be predicted (PyTorch's cross entropy leaves it out)."""
SPLITS = ("train", "heldout")
COLUMNS = {"text": ("input_ids",), "chat": ("input_ids", "labels", "position_ids")}
GROUP_TOKENS = 2**20
_CACHED_GROUPS = 18
_FOOTER = 2**16
"""Bytes of the first guess at a footer: pyarrow asks for as many."""

Kind = Literal["text", "chat"]
Rows = Mapping[str, NDArray[np.int32]]
"""By column, each (rows, seq_len)."""


class FileRecord(TypedDict):
    """A file of rows, as the manifest knows it; `name` is relative to the folder."""

    name: str
    rows: int
    bytes: int
    sha256: str


def rows_per_group(seq_len: int) -> int:
    """Rows of a row group."""
    return max(1, GROUP_TOKENS // seq_len)


class _Hashed(io.RawIOBase):
    """A file being written, its digest and length taken on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.nbytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.sha256.update(data)
        self.nbytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.nbytes


def write_rows(storage: Storage, name: str, kind: Kind, seq_len: int, groups: Iterable[Rows]) -> FileRecord:
    """Write a file of rows, each of `groups` as one row group; it appears whole or not at all. The same rows give the
    same bytes (with the same pyarrow)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    element = pa.list_(pa.field("element", pa.int32(), nullable=False), seq_len)
    schema = pa.schema([pa.field(column, element, nullable=False) for column in COLUMNS[kind]])
    rows = 0
    with storage.create(name) as raw:
        file = _Hashed(raw)
        writer = pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=False,
            column_encoding={f"{column}.list.element": "BYTE_STREAM_SPLIT" for column in COLUMNS[kind]},
            write_statistics=False,
        )
        with writer:
            for group in groups:
                arrays = [
                    pa.FixedSizeListArray.from_arrays(
                        pa.array(np.ascontiguousarray(group[c]).reshape(-1)), type=element
                    )
                    for c in COLUMNS[kind]
                ]
                table = pa.Table.from_arrays(arrays, schema=schema)
                writer.write_table(table, row_group_size=max(1, table.num_rows))
                rows += table.num_rows
    return FileRecord(name=name, rows=rows, bytes=file.nbytes, sha256=file.sha256.hexdigest())


def content_digest(kind: Kind, seq_len: int, files: Iterable[FileRecord]) -> str:
    """The name of the content of token blocks: SHA-256 over kind, seq_len and the files' digests."""
    text = json.dumps([kind, seq_len, [[file["name"], file["sha256"]] for file in files]])
    return hashlib.sha256(text.encode()).hexdigest()


class _Window(io.RawIOBase):
    """A file of which only the bytes from `start` on are at hand."""

    def __init__(self, data: bytes, start: int, size: int) -> None:
        self._data, self._start, self._size, self._at = data, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        if self._at < self._start or end > self._start + len(self._data):
            raise ValueError(f"bytes {self._at} to {end} were not read")
        data = self._data[self._at - self._start : end - self._start]
        self._at = end
        return data


@dataclass
class Split:
    """The rows of one split. Safe to share between threads; travels to other processes without what it has cached."""

    url: str
    name: str
    kind: Kind
    seq_len: int
    rows_per_group: int
    rows: int
    tokens: int
    """Tokens in all rows; padding (conversations) not counted."""
    files: tuple[FileRecord, ...]
    _groups: OrderedDict[int, Future[dict[str, NDArray[np.int32]]]] = field(
        default_factory=OrderedDict, repr=False, compare=False
    )
    _footers: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._storage = Storage(self.url)
        groups = [-(-file["rows"] // self.rows_per_group) for file in self.files]
        self._first_groups = np.concatenate([[0], np.cumsum(groups)]).astype(np.int64)  # (files + 1,)

    def __reduce__(self) -> tuple[Any, ...]:
        kept = (self.url, self.name, self.kind, self.seq_len, self.rows_per_group, self.rows, self.tokens, self.files)
        return Split, kept

    def read(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> dict[str, NDArray[np.int32]]:
        """Rows by their index in the split, in the order asked: each column (len(indices), seq_len).

        Raises: IndexError; UserError if a file is damaged or gone; MachineError if the storage fails."""
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.rows):
            raise IndexError(f"{self.url}: rows {wanted.min()} to {wanted.max()} of {self.rows} in {self.name}")
        out = {column: np.empty((wanted.size, self.seq_len), np.int32) for column in COLUMNS[self.kind]}
        group_of = wanted // self.rows_per_group
        for group in np.unique(group_of):  # each once, however the rows are mixed
            here = np.flatnonzero(group_of == group)
            rows = self._group(int(group))
            for column, values in out.items():
                values[here] = rows[column][wanted[here] - group * self.rows_per_group]
        return out

    def _group(self, group: int) -> dict[str, NDArray[np.int32]]:
        with self._lock:
            future = self._groups.get(group)
            mine = future is None
            if future is None:
                future = self._groups[group] = Future()
                while len(self._groups) > _CACHED_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
        if mine:
            try:
                future.set_result(self._load(group))
            except BaseException as error:
                with self._lock:
                    self._groups.pop(group, None)
                future.set_exception(error)
        return future.result()

    def _load(self, group: int) -> dict[str, NDArray[np.int32]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        index = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        file, inside = self.files[index], group - int(self._first_groups[index])
        try:
            footer = self._footer(file)
            meta = footer.row_group(inside)
            columns = [meta.column(i) for i in range(meta.num_columns)]
            start = min(column.data_page_offset for column in columns)
            end = start + sum(column.total_compressed_size for column in columns)
            window = _Window(self._storage.read(file["name"], start, end), start, file["bytes"])
            table = pq.ParquetFile(window, metadata=footer, pre_buffer=False).read_row_group(inside)
            return {
                name: table.column(name).combine_chunks().flatten().to_numpy().reshape(-1, self.seq_len)
                for name in COLUMNS[self.kind]
            }
        except FileNotFoundError:
            raise UserError(f"{self.url}: {file['name']} is gone; make the token blocks anew") from None
        except (UserError, MachineError):
            raise
        except (pa.ArrowException, ValueError, KeyError, IndexError) as error:
            raise UserError(f"{self.url}: {file['name']} is damaged ({explain(error)[:200]}); make it anew") from error
        except OSError as error:
            if isinstance(error, pa.ArrowInvalid) or error.errno is None:  # pyarrow's own errors carry no errno
                raise UserError(f"{self.url}: {file['name']} is damaged ({explain(error)[:200]})") from error
            raise MachineError(f"{self.url}: {file['name']} cannot be read ({explain(error)})") from error

    def _footer(self, file: FileRecord) -> Any:
        import pyarrow.parquet as pq

        name, size = file["name"], file["bytes"]
        if name not in self._footers:
            start = max(0, size - _FOOTER)
            tail = self._storage.read(name, start, size)
            length = 8 + int.from_bytes(tail[-8:-4], "little")
            if length > len(tail):
                start = max(0, size - length)
                tail = self._storage.read(name, start, size)
            footer = pq.ParquetFile(_Window(tail, start, size), pre_buffer=False).metadata
            if footer.num_rows != file["rows"]:
                raise ValueError(f"{footer.num_rows} rows, {file['rows']} expected")
            self._footers[name] = footer
        return self._footers[name]


@dataclass(frozen=True)
class TokenBlocks:
    """An opened folder of token blocks. `digest` names its content; `vocab_size` is that of the tokenizer, `largest_id`
    the largest id that is there."""

    url: str
    kind: Kind
    seq_len: int
    vocab_size: int
    largest_id: int
    rows_per_group: int
    digest: str
    train: Split
    heldout: Split
    manifest: dict[str, Any]


def open_blocks(url: str) -> TokenBlocks:
    """Open a folder of token blocks: one small file and two listings are read.

    Raises: UserError if it is no such folder, is unfinished, is of another format, or lacks files."""
    storage = Storage(url)
    manifest = read_manifest(storage)
    if manifest is None:
        raise UserError(f"{url}: holds no finished token blocks (no {MANIFEST}); make them with `lesa-ray tokenize`")
    try:
        if manifest["format"] != FORMAT:
            raise UserError(f"{url}: token blocks of format {manifest['format']}; this version reads {FORMAT}")
        kind, seq_len, group = manifest["kind"], int(manifest["seq_len"]), int(manifest["rows_per_group"])
        splits = {
            name: Split(
                storage.url, name, kind, seq_len, group, int(part["rows"]), int(part["tokens"]), tuple(part["files"])
            )
            for name, part in ((name, manifest["splits"][name]) for name in SPLITS)
        }
        for name, split in splits.items():
            with reaching(url, "cannot be listed"):
                sizes = storage.within(name).list() if split.files else {}
            for file in split.files:
                if sizes.get(file["name"].rsplit("/", 1)[-1]) != file["bytes"]:
                    raise UserError(f"{url}: {file['name']} is missing or of another size; make the token blocks anew")
        return TokenBlocks(
            url=storage.url,
            kind=kind,
            seq_len=seq_len,
            vocab_size=int(manifest["vocab_size"]),
            largest_id=int(manifest.get("largest_id", manifest["vocab_size"] - 1)),
            rows_per_group=group,
            digest=manifest["digest"],
            train=splits["train"],
            heldout=splits["heldout"],
            manifest=manifest,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{url}: {MANIFEST} is not that of token blocks ({explain(error)[:100]})") from error


def read_manifest(storage: Storage) -> dict[str, Any] | None:
    """The manifest of a folder, or None if it has none. Raises: UserError if it cannot be read."""
    with reaching(storage.url):
        try:
            manifest = json.loads(storage.read(MANIFEST))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise UserError(f"{storage.url}: {MANIFEST} is not JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{storage.url}: {MANIFEST} is not that of token blocks")
    return manifest
