"""Raw text to measure on: which files, and the documents in them.

Decides
- A `.txt`, `.md` or `.py` file is one document, a row of a `.jsonl` or `.parquet` file another. Folders are searched to
  the bottom, linked ones too, for files of these kinds, hidden ones left out; the order is that of the paths.
- A document longer than a million characters is cut at a line's end into several. Each is scored on its own, so that
  memory stays bounded whatever the size of a file; one token in some 250,000 loses its context.
- Bytes that are not UTF-8 become replacement characters. Documents without a character are skipped.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from lesa_ray.checkpoint import search
from lesa_ray.checkpoint.storage import filesystem
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import explain

PLAIN = (".txt", ".md", ".py")
ROWS = (".jsonl", ".parquet")
KINDS = (*PLAIN, *ROWS)
LONGEST = 1_000_000
"""Characters after which a document is cut: a tokenizer needs about 100 bytes for a character of one call."""


@dataclass(frozen=True)
class TextFile:
    """A file of text and its size in bytes (0 where the store does not say)."""

    url: str
    nbytes: int


@dataclass(frozen=True)
class Document:
    """A text, and how many bytes of all files had been read when it was found."""

    text: str
    read: int


def find_files(sources: Sequence[str]) -> list[TextFile]:
    """The text files of files, folders, globs and URLs, each once, source by source.

    Raises: UserError naming a source that is not there, cannot be read, or holds no text; MachineError if its store
    does not answer."""
    found: dict[str, TextFile] = {}
    for source in sources:
        where = f"--data {source}"
        files = search.find_files(source, KINDS, where)
        if not files:
            raise UserError(f"{where}: there is no such file or folder")
        for url, info in files.items():
            found.setdefault(url, TextFile(url, int(info.get("size") or 0)))
    return list(found.values())


def read_documents(files: Sequence[TextFile], column: str) -> Iterator[Document]:
    """All documents, file by file. Raises: UserError naming file and line of what is not text in `column`;
    MachineError if the store fails."""
    before = 0
    for file in files:
        reader = _parquet if file.url.endswith(".parquet") else _lines if file.url.endswith(".jsonl") else _plain
        for document in reader(file, column):
            if document.text:
                yield Document(document.text, before + min(document.read, file.nbytes))
        before += file.nbytes


def _plain(file: TextFile, column: str) -> Iterator[Document]:
    with _open(file.url) as raw:
        read = 0
        for text in pieces(io.TextIOWrapper(raw, encoding="utf-8", errors="replace", newline="")):
            read += len(text.encode())
            yield Document(text, read)


def _lines(file: TextFile, column: str) -> Iterator[Document]:
    with _open(file.url) as raw:
        read = 0
        # a remote file of fsspec's reads, and copies, a whole block for each line
        for number, line in enumerate(io.BufferedReader(raw, 2**20), 1):
            read += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"--data {file.url}: line {number} is not JSON ({error})") from error
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise UserError(f"--data {file.url}: line {number} has no text in a column {column!r}")
            for text in pieces(io.StringIO(row[column].encode(errors="replace").decode(), newline="")):
                yield Document(text, read)  # encoded and back: JSON can hold halves of surrogate pairs


def _parquet(file: TextFile, column: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(file.url) as raw:
        try:
            table = pq.ParquetFile(raw)
        except pa.ArrowInvalid as error:
            raise UserError(f"--data {file.url}: is not Parquet ({explain(error)[:200]})") from error
        schema, rows = table.schema_arrow, table.metadata.num_rows
        kind = schema.field(column).type if column in schema.names else None
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            hint = "; token blocks are given as their whole, finished folder" if "input_ids" in schema.names else ""
            raise UserError(
                f"--data {file.url}: has no column {column!r} of text; its columns: {', '.join(schema.names)}{hint}"
            )
        seen = 0
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            for value in batch.column(0):
                seen += 1
                if (row := value.as_py()) is not None:
                    for text in pieces(io.StringIO(row, newline="")):
                        yield Document(text, file.nbytes * seen // rows)


def pieces(stream: IO[str], longest: int = LONGEST) -> Iterator[str]:
    """A text in pieces of about `longest` characters that end with a line, or after as many again where there is no
    line's end."""
    while text := stream.read(longest):
        yield text + stream.readline(longest) if len(text) == longest and not text.endswith("\n") else text


@contextmanager
def _open(url: str) -> Iterator[Any]:
    try:
        fs, path = filesystem(url)
        with fs.open(path, "rb") as file:
            yield file
    except (UserError, MachineError):
        raise
    except FileNotFoundError as error:
        raise UserError(f"--data {url}: there is no such file (any more)") from error
    except OSError as error:
        raise MachineError(f"--data {url}: cannot be read ({explain(error)})") from error
