"""The documents and rows in a part of the data.

Decides
- A document travels in fragments of about 260,000 characters: a tokenizer needs some 100 bytes for a character of one
  call, and a document may be a file of any size. It is cut where a line ends and the next is not indented, else between
  words; there the byte-level tokenizers of GPT-2, Llama 3 and Qwen give the same ids as for the whole. (A tokenizer
  that puts a space before every text, as Llama 2's does, puts one there too.)
- Bytes that are not UTF-8 become replacement characters, in Parquet's strings too, halves of surrogate pairs in JSON
  question marks.
- A line of JSON is at most 64 MiB: a packed file of some kilobytes may hold one that fills any memory.
- Parquet is read a buffer at a time: a column of a row group may be of any size (pandas writes a million rows to each).
- Documents without a character are skipped. So are rows whose text is null.
- Which split a document belongs to is a hash of its first 64 KiB: the same wherever it stands, the same for copies.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lesa_ray.checkpoint.storage import filesystem
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import explain, is_outage
from lesa_ray.places import named
from lesa_ray.training.sources import PACKED, Part, open_dataset

LONGEST = 2**18
"""Characters after which a document is cut."""
_KEY_BYTES = 2**16
_LONGEST_LINE = 2**26
_SEARCH = 2**20
_BUFFER = 2**20
_READ_AHEAD = 2**23
"""s3fs's own 50 MiB would be fetched beyond the end of each part, and beyond each column of a row group."""
_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(r"\n(?=\S)")
_WORD_END = re.compile(r"(?<=\S)(?= \S)")
_LINE_END_BYTES = re.compile(rb"\n(?=\S)")
_WORD_END_BYTES = re.compile(rb"(?<=\S)(?= \S)")


@dataclass(frozen=True)
class Fragment:
    """Some of a document's text, in order."""

    text: str
    begins: bool
    """It is the document's first."""
    ends: bool
    """It is the document's last."""
    key: bytes
    """How the document begins."""
    share: float = field(default=0.0, compare=False)
    """Of the part, up to here; 0 where that is not known."""


@dataclass(frozen=True)
class Row:
    """A row of data and where it stands, for messages."""

    where: str
    values: dict[str, Any]
    share: float = 0.0
    """Of the part, up to here; 0 where that is not known."""
    columnar: bool = False
    """From columns of Arrow's: an object has every key that any row has, None where this one has none."""


OnBad = Callable[[UserError], None]
"""Is told of a row that is wrong; if it returns, the row is left out."""


def refuse(error: UserError) -> None:
    """A row that is wrong ends the reading."""
    raise error


def document_key(head: bytes) -> bytes:
    """What a file of text is known by when documents are held out. head: its first bytes, 64 KiB or more."""
    return head.removeprefix(_BOM)[:_KEY_BYTES]


def is_heldout(key: bytes, share: float) -> bool:
    """Whether a document that begins so is among the `share` held out."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < share * 2**64


def read_fragments(
    part: Part, column: str, dataset: tuple[str | None, str], longest: int = LONGEST, bad: OnBad = refuse
) -> Iterator[Fragment]:
    """The documents of a part, or what lies of one in it. dataset: configuration and split, for one of the hub.

    Raises: UserError naming file and line of what is not text in `column`; MachineError if the store fails."""
    if part.source.kind == "plain":
        yield from _plain(part, longest)
        return
    for row in read_rows(part, (column,), dataset, bad):
        text = row.values.get(column)
        if text is None and column in row.values:
            continue
        if not isinstance(text, str):
            names = ", ".join(map(str, row.values)) or "none"
            bad(UserError(f"DATA {row.where}: there is no text in a column {column!r}; its columns: {names}"))
            continue
        yield from fragments(clean(text), longest, row.share)


def fragments(text: str, longest: int = LONGEST, share: float = 0.0) -> Iterator[Fragment]:
    """A whole document in fragments; none if it is empty."""
    if text:
        key = text[:_KEY_BYTES].encode()[:_KEY_BYTES]
        pieces = list(cut(text, longest))
        for number, piece in enumerate(pieces):
            yield Fragment(piece, number == 0, number == len(pieces) - 1, key, share)


def clean(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode(errors="replace").decode()


def cut(text: str, longest: int) -> Iterator[str]:
    """Pieces of `longest` characters and up to as many again, to where a line ends, else a word, else anywhere."""
    start = 0
    while len(text) - start > 2 * longest:
        low, high = start + longest, start + 2 * longest
        found = _LINE_END.search(text, low, high) or _WORD_END.search(text, low, high)
        end = found.end() if found else high
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _plain(part: Part, longest: int) -> Iterator[Fragment]:
    source = part.source
    with _open(source.name) as file:
        head = file.read(_KEY_BYTES + len(_BOM))
        key = document_key(head)
        if not key:
            return
        start, end = part.span(source.nbytes)
        start = _boundary(file, start, source.nbytes) if part.index else len(head) - len(head.removeprefix(_BOM))
        last = part.index == part.count - 1
        count = -1 if last else _boundary(file, end, source.nbytes) - start
        file.seek(start)
        data = file.read(count)
    pieces = list(cut(data.decode(errors="replace"), longest)) or [""]  # the last part must end the document
    for number, piece in enumerate(pieces):
        begins, ends = part.index == 0 and number == 0, last and number == len(pieces) - 1
        yield Fragment(piece, begins, ends, key, (number + 1) / len(pieces))


def _boundary(file: Any, at: int, size: int) -> int:
    """Where the part of a document that begins at about byte `at` really does: the same for both that meet there."""
    file.seek(at)
    data = file.read(min(_SEARCH, size - at))
    if found := _LINE_END_BYTES.search(data) or _WORD_END_BYTES.search(data):
        return at + int(found.end())
    rest = len(data) if len(data) < 4 else 0
    return at + next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), rest)  # not within a character


def read_rows(part: Part, wanted: Sequence[str], dataset: tuple[str | None, str], bad: OnBad = refuse) -> Iterator[Row]:
    """The rows of a part, with at least those of the `wanted` columns that there are.

    Raises: UserError if it is not rows, or none of the columns is there; MachineError if the store fails."""
    kind = part.source.kind
    if kind == "hub":
        rows = _hub(part, dataset)
    elif kind == ".parquet":
        rows = _parquet(part, wanted)
    else:
        rows = _lines(part, bad)
    yield from islice(rows, part.take)


def _lines(part: Part, bad: OnBad) -> Iterator[Row]:
    url, packed = part.source.name, part.source.kind in PACKED
    start, end = part.span(part.source.nbytes)
    whole = packed or part.count == 1
    with _open(url) as file:
        # a remote file of fsspec's reads, and copies, a whole block for each line
        raw = io.BufferedReader(file, _BUFFER)
        stream = _unpacked(raw, url) if packed else raw
        at = 0
        if not whole and start:  # the line that begins before `start` is the part's before
            raw.seek(start - 1)
            at = start - 1 + _skip_line(raw)
        number = 0
        while whole or at < end:
            with _unpacking(url, packed):
                line = stream.readline(_LONGEST_LINE + 1)
            if not line:
                return
            number += 1
            where = f"{url}: line {number}" if not start else f"{url}: the line at byte {at}"
            at += len(line)
            if len(line) > _LONGEST_LINE and not line.endswith(b"\n"):
                bad(UserError(f"DATA {where} is longer than {_LONGEST_LINE:,} bytes"))
                with _unpacking(url, packed):
                    at += _skip_line(stream)
                continue
            if number == 1 and not start:
                line = line.removeprefix(_BOM)
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode(errors="replace"))
            except (ValueError, RecursionError) as error:
                bad(UserError(f"DATA {where} is not JSON ({explain(error)[:120]})"))
                continue
            if not isinstance(values, dict):
                bad(UserError(f"DATA {where} is not a JSON object of columns"))
                continue
            share = raw.tell() / max(part.source.nbytes, 1) if packed else (at - start) / max(end - start, 1)
            yield Row(where, values, min(share, 1.0))


def _skip_line(stream: Any) -> int:
    """How many bytes were left up to the end of the line; reading goes on behind it."""
    skipped = 0
    while piece := stream.readline(_BUFFER):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


@contextmanager
def _unpacking(url: str, packed: bool) -> Iterator[None]:
    """Around what is read from a file that may be packed. Raises: UserError if it is not what its name says; errors of
    the store pass."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        if not packed or (isinstance(error, OSError) and error.errno) or is_outage(error):
            raise
        if "requires too much memory" in str(error):
            raise UserError(
                f"DATA {url}: is packed with a longer window than is taken here (zstd --long); pack it again without"
            ) from error
        raise UserError(f"DATA {url}: is not packed as its name says, or damaged ({explain(error)})") from error


def _unpacked(raw: io.BufferedReader, url: str) -> Any:
    """What a packed file holds."""
    import pyarrow as pa

    if named(url).endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), _BUFFER)
    return gzip.GzipFile(fileobj=raw)


def _parquet(part: Part, wanted: Sequence[str]) -> Iterator[Row]:
    import pyarrow.parquet as pq

    url = part.source.name
    with _open(url) as raw:
        with _undamaged(f"DATA {url}: is not Parquet"):
            table = pq.ParquetFile(raw, pre_buffer=False, buffer_size=_READ_AHEAD)
        names = table.schema_arrow.names
        columns = [name for name in wanted if name in names]
        if not columns:
            hint = (
                "; these are token blocks, which are given as their whole, finished folder"
                if "input_ids" in names
                else ""
            )
            raise UserError(
                f"DATA {url}: has no column {' or '.join(map(repr, wanted))}; its columns: {', '.join(names)}{hint}"
            )
        groups = range(*part.span(table.num_row_groups))
        first = number = sum(table.metadata.row_group(group).num_rows for group in range(groups.start))
        rows = sum(table.metadata.row_group(group).num_rows for group in groups)
        for group in groups:
            batches = table.iter_batches(batch_size=32, row_groups=[group], columns=columns)
            while True:
                with _undamaged(f"DATA {url}: row group {group} cannot be read, is the file damaged?"):
                    batch = next(batches, None)
                if batch is None:
                    break
                for values in _values(batch):
                    number += 1
                    yield Row(f"{url}: row {number}", values, (number - first) / rows, columnar=True)


@contextmanager
def _undamaged(what: str) -> Iterator[None]:
    """Around what pyarrow does with a file. Raises: UserError that says `what` where it does not understand the
    content; errors of the store pass."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError) as error:  # an OSError of pyarrow's own is one without a number
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno or is_outage(error)):
            raise
        raise UserError(f"{what} ({explain(error)[:160]})") from error


def _values(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch of Arrow's."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:  # neither a file's writer nor its reader sees to it that strings are UTF-8
        columns = [[_value(value) for value in column] for column in batch.columns]
        return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]
    return rows


def _value(value: Any) -> Any:
    """What Arrow's scalar holds, with replacement characters for what is not UTF-8."""
    import pyarrow as pa

    if not value.is_valid:
        return None
    if pa.types.is_dictionary(value.type):
        return _value(value.value)
    if isinstance(value, pa.StringScalar):  # large strings and views are, too
        return value.as_buffer().to_pybytes().decode(errors="replace")
    if pa.types.is_struct(value.type):
        return {name: _value(field) for name, field in value.items()}
    return [_value(item) for item in value.values] if isinstance(value, pa.ListScalar) else value.as_py()


def _hub(part: Part, dataset: tuple[str | None, str]) -> Iterator[Row]:
    name = part.source.name
    try:
        rows = open_dataset(name, *dataset, part.source.mark)
        if part.count > 1:
            rows = rows.shard(num_shards=part.count, index=part.index)
        for number, values in enumerate(rows, 1):
            yield Row(f"{name}: row {number} of shard {part.index}", values, columnar=True)
    except ImportError as error:
        raise UserError(f"DATA {name}: install `lesa-ray[data]` on every machine of the cluster") from error
    except (UserError, MachineError):
        raise
    except Exception as error:  # the hub's clients have their own class for each way in which they may fail
        raise MachineError(f"DATA {name}: cannot be read from the hub ({explain(error)[:200]})") from error


@contextmanager
def _open(url: str) -> Iterator[Any]:
    try:
        fs, path = filesystem(url)
        with fs.open(path, "rb", block_size=_READ_AHEAD) as file:
            yield file
    except (UserError, MachineError):
        raise
    except FileNotFoundError as error:
        raise UserError(f"DATA {url}: there is no such file (any more)") from error
    except OSError as error:
        raise MachineError(f"DATA {url}: cannot be read ({explain(error)})") from error
