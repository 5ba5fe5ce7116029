"""What a person, or a program, is told of token blocks that were made."""

from __future__ import annotations

from typing import Any

from lesa_ray.distributed.tokenize import Tokenized
from lesa_ray.report.terminal import count, duration, unread_files


def describe_tokens(result: Tokenized) -> dict[str, Any]:
    """As JSON values."""
    blocks = result.blocks
    told = (
        *("documents", "truncated", "left_out", "bad_rows", "first_bad_rows", "dropped_tokens", "heldout_from_end"),
        "unread_files",
    )
    return {
        "out": blocks.url,
        "kind": blocks.kind,
        "seq_len": blocks.seq_len,
        "train": {"rows": blocks.train.rows, "tokens": blocks.train.tokens},
        "heldout": {"rows": blocks.heldout.rows, "tokens": blocks.heldout.tokens},
        **{name: blocks.manifest[name] for name in told if name in blocks.manifest},
        "digest": blocks.digest,
        "seconds": round(result.seconds, 3),
        "reused": result.reused,
        "resumed": result.resumed,
    }


def token_lines(result: Tokenized) -> str:
    """How much there is, and what was not taken as it was."""
    blocks, facts = result.blocks, describe_tokens(result)
    again = " (they were there already)" if result.reused else ""
    how = " (an interrupted run was taken up)" if result.resumed else again
    lines = [
        f"{blocks.url}: {count(blocks.train.tokens)} tokens in {blocks.train.rows:,} rows of {blocks.seq_len:,} to "
        f"train on, {blocks.heldout.rows:,} rows held out, {duration(result.seconds)}{how}"
    ]
    for name, what in (
        ("truncated", "cut to a row, longer than {:,} tokens"),
        ("left_out", "left out: without an answer, or with none within {:,} tokens"),
    ):
        if facts.get(name):
            lines.append(f"{facts[name]:,} conversations {what.format(blocks.seq_len)}")
    if unread := facts.get("unread_files"):
        lines.append(unread_files(unread))
    if facts.get("bad_rows"):
        lines += [f"{facts['bad_rows']:,} rows left out, as they are wrong; the first:", *facts["first_bad_rows"]]
    return "\n".join(lines)
