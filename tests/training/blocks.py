"""Small token blocks written straight to a folder, without text or tokenizer."""

from __future__ import annotations

import json

import numpy as np

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.training.tokens import content_digest, write_rows


def periodic(rows: int, seq_len: int, vocab: int, seed: int) -> np.ndarray:
    """Ids (rows, seq_len) that can be learnt: a token follows from the last by a fixed rule, nine times in ten."""
    draw = np.random.default_rng(seed)
    ids = np.zeros((rows, seq_len), np.int32)
    ids[:, 0] = draw.integers(0, vocab, rows)
    for place in range(1, seq_len):
        noise = draw.random(rows) < 0.1
        ids[:, place] = np.where(noise, draw.integers(0, vocab, rows), (ids[:, place - 1] * 5 + 3) % vocab)
    return ids


def make_blocks(
    url: str, *, rows: int = 64, heldout: int = 8, seq_len: int = 32, vocab: int = 128, group: int = 8
) -> str:
    """Token blocks of kind text at `url`, in row groups of `group` rows."""
    storage = Storage(url)
    splits, files = {}, []
    for name, many, seed in (("train", rows, 1), ("heldout", heldout, 2)):
        ids = periodic(many, seq_len, vocab, seed)
        groups = [{"input_ids": ids[at : at + group]} for at in range(0, many, group)]
        record = write_rows(storage, f"{name}/part-00000.parquet", "text", seq_len, groups)
        splits[name] = {"rows": many, "tokens": many * seq_len, "files": [record] if many else []}
        files.append(record)
    manifest = {
        "format": 1, "kind": "text", "seq_len": seq_len, "vocab_size": vocab, "rows_per_group": group,
        "digest": content_digest("text", seq_len, files), "splits": splits,
    }  # fmt: skip
    storage.write("manifest.json", json.dumps(manifest).encode())
    return url


def make_chat_blocks(url: str, columns: dict[str, np.ndarray]) -> str:
    """Token blocks of kind chat at `url`: the rows of `columns`, each (rows, seq_len), to train on and held out."""
    storage, (rows, seq_len) = Storage(url), columns["input_ids"].shape
    splits, files = {}, []
    for name in ("train", "heldout"):
        files.append(write_rows(storage, f"{name}/part-00000.parquet", "chat", seq_len, [columns]))
        splits[name] = {"rows": rows, "tokens": rows * seq_len, "files": [files[-1]]}
    manifest = {
        "format": 1, "kind": "chat", "seq_len": seq_len, "vocab_size": int(columns["input_ids"].max()) + 1,
        "rows_per_group": rows, "digest": content_digest("chat", seq_len, files), "splits": splits,
    }  # fmt: skip
    storage.write("manifest.json", json.dumps(manifest).encode())
    return url
