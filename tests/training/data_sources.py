"""Sources of the data that tests lay out."""

from __future__ import annotations

from pathlib import Path

from lesa_ray.training.documents import read_fragments
from lesa_ray.training.sources import Part, Piece, Source, deal, find_sources

NO_DATASET = (None, "train")


def find(*names: str | Path) -> list[Source]:
    return find_sources([str(name) for name in names], *NO_DATASET)


def parts_of(pieces: list[Piece]) -> list[Part]:
    return [part for piece in pieces for part in piece.parts]


def read(path: Path, column: str = "text", piece: int = 2**20, longest: int = 1000) -> list[str]:
    """Documents of a file, from parts of `piece` bytes."""
    documents: list[str] = []
    for part in parts_of(deal(find(path), piece)):
        for fragment in read_fragments(part, column, NO_DATASET, longest):
            documents += [""] if fragment.begins else []
            documents[-1] += fragment.text
    return documents
