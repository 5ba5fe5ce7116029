"""What is to be tokenised, and how: the settings of `lesa-ray tokenize`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lesa_ray.config import Settings


class TokenizeConfig(Settings):
    """Data, a tokenizer, and where the token blocks go."""

    data: tuple[str, ...] = Field(min_length=1)
    """Files (.txt, .md, .py: a document each; .jsonl, .jsonl.gz, .json.gz, .jsonl.zst, .parquet: a document a row),
    folders of them, globs, fsspec URLs, or names of Hugging Face datasets."""
    tokenizer: str
    """A folder with a tokenizer (a checkpoint's will do), a Hugging Face repo id or an fsspec URL."""
    out: str
    """Where the token blocks go: a folder or an fsspec URL."""
    kind: Literal["text", "chat"] = "text"
    """`text`: documents, for pre-training. `chat`: conversations (`messages`), or `prompt` and `response`, or
    `instruction` and `output`, for fine-tuning on the answers."""
    seq_len: int = Field(default=2048, ge=2, le=2**24)
    """Tokens in a row."""
    text_column: str = "text"
    """The column of rows that holds the text (kind `text`)."""
    holdout: float = Field(default=0.01, ge=0, lt=1)
    """Share of the documents held out, by a hash of how each begins. Where that gives less than a row, the end of the
    data is held out instead."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many documents."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What becomes of a conversation longer than a row: cut after `seq_len` tokens, or left out."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What becomes of a row that is wrong (no JSON, no text, a conversation that the chat template does not take): it
    ends the run, which goes on once it is mended; or it is left out, and the manifest says how many and where."""
    dataset_config: str | None = None
    """Which configuration of a Hugging Face dataset, if not its default."""
    dataset_split: str = "train"
    """Which split of a Hugging Face dataset."""
