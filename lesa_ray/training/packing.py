"""Documents → one stream of ids → rows; whole conversations → rows.

Decides
- Text: a document is the token that begins a text, where the tokenizer itself puts one there (Llama; not Qwen or
  GPT-2), then its ids, then the end-of-text token. Documents follow one another in one stream, which is cut every
  `seq_len` tokens: nothing is padded, a document may begin in one row and end in another, and attention sees across
  its bounds, as is usual in pre-training. What does not fill the last row of a split is dropped.
- Text is text: `<|endoftext|>` or `<s>` written in a document becomes ordinary tokens, never the special one.
- Conversations are never cut to fill a row: each goes into the fullest of 128 open rows that has room (best fit). When
  there is no room in any, a row is opened, and the fullest of more than 128 is finished. Over 99 % of a row is used
  where examples are short; rows of long ones are padded. Lengths decide, in the order of the data: nothing is random.
- `position_ids` begin again with each conversation, and with the padding: that is how training keeps them apart.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lesa_ray.errors import UserError
from lesa_ray.training.documents import Fragment
from lesa_ray.training.tokens import UNSCORED

Ids = NDArray[np.int32]
_BATCH_FRAGMENTS = 64
_BATCH_CHARACTERS = 2**20
_OPEN_ROWS = 128


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and what it puts around a text."""

    tokenizer: PreTrainedTokenizerBase
    prefix: tuple[int, ...]
    """What the tokenizer itself puts before a text."""
    eos: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, name: str) -> Encoder:
        """Raises: UserError if the tokenizer has no end-of-text token."""
        if tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {name}: has no end-of-text token (eos_token), which documents are parted by")
        plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(tokenizer("a")["input_ids"])
        place = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        return cls(tokenizer, tuple(full[:place]), int(tokenizer.eos_token_id))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return encoded


def encode(encoder: Encoder, fragments: Iterable[Fragment]) -> Iterator[tuple[Fragment, Ids]]:
    """The fragments with their ids, in order; each document with its beginning and its end."""
    batch: list[Fragment] = []
    characters = 0
    for fragment in fragments:
        batch.append(fragment)
        characters += len(fragment.text)
        if len(batch) == _BATCH_FRAGMENTS or characters >= _BATCH_CHARACTERS:
            yield from _encode(encoder, batch)
            batch, characters = [], 0
    yield from _encode(encoder, batch)


def _encode(encoder: Encoder, batch: list[Fragment]) -> Iterator[tuple[Fragment, Ids]]:
    if not batch:
        return
    for fragment, ids in zip(batch, encoder([fragment.text for fragment in batch]), strict=True):
        begin = encoder.prefix if fragment.begins else ()
        end = (encoder.eos,) if fragment.ends else ()
        yield fragment, np.array([*begin, *ids, *end], np.int32)


@dataclass(frozen=True)
class Packed:
    """Which examples each row holds."""

    examples: NDArray[np.int64]
    """Indices of examples, row after row."""
    starts: NDArray[np.int64]
    """(rows + 1,): row r holds examples[starts[r] : starts[r + 1]]."""

    @property
    def rows(self) -> int:
        return len(self.starts) - 1


def pack_examples(lengths: Sequence[int] | NDArray[np.integer], seq_len: int) -> Packed:
    """Best fit with a bounded number of open rows. lengths: 1 … seq_len each. Rows are in the order in which they were
    opened."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted: the first with enough room fits best
    for index, length in enumerate(lengths):
        place = bisect_left(open_rows, (int(length), -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            insort(open_rows, (room - int(length), row))
        if len(open_rows) > _OPEN_ROWS:
            open_rows.pop(0)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
    return Packed(np.fromiter((index for row in rows for index in row), np.int64, len(lengths)), starts)


def hide(ids: Ids, scored: NDArray[np.bool_]) -> Ids:
    """Ids and whether each is scored, in one number: the id, or its complement (below 0) where it is not."""
    return np.where(scored, ids, ~ids).astype(np.int32)


def fill_rows(rows: Sequence[Sequence[Ids]], seq_len: int, pad: int) -> dict[str, Ids]:
    """Rows of examples as columns, each (len(rows), seq_len). Examples are as `hide` gives them; the first token of one
    is never scored, as what stands before it is another example."""
    ids = np.full((len(rows), seq_len), pad, np.int32)
    labels = np.full((len(rows), seq_len), UNSCORED, np.int32)
    positions = np.empty((len(rows), seq_len), np.int32)
    for number, row in enumerate(rows):
        at = 0
        for example in row:
            end = at + len(example)
            ids[number, at:end] = np.where(example < 0, ~example, example)
            labels[number, at + 1 : end] = np.where(example < 0, UNSCORED, example)[1:]
            positions[number, at:end] = np.arange(len(example))
            at = end
        positions[number, at:] = np.arange(seq_len - at)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}
