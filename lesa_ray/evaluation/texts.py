"""Raw text to measure on: which files, and the documents in them, found and read as for tokenising.

Decides
- A document longer than a million characters is cut into several, as is one of more than 32 MiB where its parts meet.
  Each is scored on its own, so that memory stays bounded whatever the size of a file; one token in some 250,000 loses
  its context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lesa_ray.errors import UserError
from lesa_ray.training.documents import read_fragments
from lesa_ray.training.sources import Source, deal, each_once, file_sources

LONGEST = 1_000_000
"""Characters after which a document is cut: a tokenizer needs about 100 bytes for a character of one call."""
_NO_DATASET = (None, "")


@dataclass(frozen=True)
class Document:
    """A text, and how many bytes of all files had been read when it was found."""

    text: str
    read: int


def find_files(names: Sequence[str], unread: set[str] | None = None) -> list[Source]:
    """The text files of files, folders, globs and URLs, each once, name by name. unread: files left out are added.

    Raises: UserError naming what is not there, cannot be read, or holds no text; MachineError if its store does not
    answer."""

    def files_of(name: str, left_out: set[str]) -> list[Source]:
        where = f"--data {name}"
        files = file_sources(name, where, unread=left_out)
        if not files:
            raise UserError(f"{where}: there is no such file or folder")
        return files

    return each_once(names, files_of, unread)


def read_documents(files: Sequence[Source], column: str) -> Iterator[Document]:
    """All documents, file by file. Raises: UserError naming file and line of what is not text in `column`;
    MachineError if the store fails."""
    before = 0
    for piece in deal(files):
        for part in piece.parts:
            for fragment in read_fragments(part, column, _NO_DATASET, LONGEST):
                if fragment.text:
                    yield Document(fragment.text, before + int(fragment.share * part.nbytes))
            before += part.nbytes
