"""What is measured on: text in each checkpoint's own tokens, or token blocks as they are.

Decides
- Each document of a text is scored on its own, every token of it once and nothing else: the first is predicted from the
  tokenizer's begin-of-text token (its end-of-text token where it has no other), which is not scored. Where a tokenizer
  itself begins texts with such a token, so does every window: some models (Gemma) are lost without it. This is the
  `bits_per_byte` of lm-evaluation-harness but for that last point.
- Text is text: `</s>` written in a document is scored as ordinary tokens, as it is when text is tokenised for training;
  so no figure depends on which special tokens a tokenizer knows.
- Bits per byte, the loss over the text's bytes in UTF-8, compares models of different tokenizers; perplexity does not.
- A row of token blocks is scored on its own as well, a row of conversations example by example, so that
  no family needs to understand packed rows, which costs no more since padding is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lesa_ray.checkpoint.search import is_pattern
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.evaluation.perplexity import Row
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.evaluation.texts import Document, find_files, read_documents
from lesa_ray.places import shown
from lesa_ray.training.sources import Source, count_endings
from lesa_ray.training.tokens import UNSCORED, Split, open_blocks, read_manifest

_DOCUMENTS = 64
_CHARACTERS = 1_000_000
"""Documents are given to the tokenizer so many at once, or as many as have so many characters."""
_ROWS = 64


@dataclass(frozen=True)
class TextData:
    """Files of text, as `sources` named them."""

    sources: tuple[str, ...]
    files: tuple[Source, ...]
    column: str
    unread: dict[str, int]
    """Files among them that are left out, by ending."""

    @property
    def total(self) -> float:
        """What `Row.done` ends at: bytes."""
        return sum(file.nbytes for file in self.files)

    @property
    def name(self) -> str:
        return " ".join(map(shown, self.sources))


@dataclass(frozen=True)
class BlockData:
    """A split of a folder of token blocks called `name`; `digest` names the folder's content."""

    name: str
    kind: str
    largest_id: int
    digest: str
    split: Split

    @property
    def total(self) -> float:
        """What `Row.done` ends at: rows."""
        return self.split.rows


def open_data(config: EvaluateConfig) -> TextData | BlockData | None:
    """Find the data without reading it; None if only tasks are asked for.

    Raises: UserError if it is not there, empty, or neither text nor token blocks."""
    if not config.data:
        return None
    folder = next((source for source in config.data if _is_blocks(source)), None)
    if folder is None:
        unread: set[str] = set()
        files = find_files(config.data, unread)
        return TextData(config.data, tuple(files), config.text_column, count_endings(unread))
    if len(config.data) > 1:
        raise UserError(f"--data {folder}: is a folder of token blocks; give it alone")
    blocks = open_blocks(folder)
    split = blocks.heldout if config.split == "heldout" else blocks.train
    if not split.rows:
        raise UserError(f"--data {folder}: there is no row in the split {config.split}")
    if config.window is not None and config.window > blocks.seq_len:
        raise UserError(f"window {config.window}: the rows of {folder} have {blocks.seq_len} tokens; give at most that")
    return BlockData(folder, blocks.kind, blocks.largest_id, blocks.digest, split)


def _is_blocks(source: str) -> bool:
    """Whether a source is a folder whose manifest is that of token blocks."""
    if is_pattern(source) or source.startswith(("http://", "https://")):
        return False
    try:
        manifest = read_manifest(Storage(source))
    except MachineError:
        raise
    except UserError:
        return False  # find_files says what is wrong with the place, or that the file is no text
    return manifest is not None and "seq_len" in manifest


def text_rows(data: TextData, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Iterator[Row]:
    """The documents as rows of ids, each led by the token that begins a text."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    lead = begin if begin is not None and tokenizer("a")["input_ids"][0] == begin else None
    front = [] if begin is None else [begin]
    for documents in _batches(islice(read_documents(data.files, data.column), limit)):
        texts = [one.text for one in documents]
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for one, ids in zip(documents, encoded, strict=True):
            yield Row(np.array([*front, *ids], np.int64), lead=lead, nbytes=len(one.text.encode()), done=one.read)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _DOCUMENTS or sum(len(one.text) for one in batch) >= _CHARACTERS:
            yield batch
            batch = []
    if batch:
        yield batch


def block_rows(data: BlockData, limit: int | None) -> Iterator[Row]:
    """The rows of token blocks in their order; a row of conversations as its examples, each a row."""
    rows = min(data.split.rows, limit or data.split.rows)
    for begin in range(0, rows, _ROWS):
        indices = range(begin, min(begin + _ROWS, rows))
        columns = data.split.read(indices)  # each (rows, seq_len)
        for place, index in enumerate(indices):
            ids = columns["input_ids"][place]
            if data.kind == "text":
                yield Row(ids, done=index + 1)
                continue
            labels = columns["labels"][place]
            for first, end in _examples(columns["position_ids"][place]):
                if (labels[first + 1 : end] != UNSCORED).any():
                    yield Row(ids[first:end], labels[first:end], done=index + 1)


def _examples(positions: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """First and end of each run of `positions` (seq_len,), which begins where they start again at 0."""
    return pairwise([0, *(np.flatnonzero(positions[1:] == 0) + 1).tolist(), len(positions)])
