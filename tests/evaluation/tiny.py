"""What the tests of evaluation share: tiny checkpoints with real tokenizers, token blocks, and losses worked out one
token at a time in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.training.tokens import UNSCORED, Kind, content_digest, write_rows

VOCABULARY = 262
POSITIONS = 48
BEGIN, END = 256, 257

TEXTS = [
    "To be, or not to be, that is the question.\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 2,
    "a",
    "def f(x):\n\treturn x ** 2\r\n",
]


def tokenizer(*, begins: bool = True, merges: bool = False) -> PreTrainedTokenizerFast:
    """Bytes are tokens 0-255, `<s>` is 256, `</s>` 257; texts begin with `<s>` if `begins`. With `merges`, four common
    pairs are tokens 258-261."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("e", "r"), ("Ġ", "d"), ("o", "t")] if merges else []
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>", *map("".join, pairs)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if begins:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def llama(**changed: Any) -> LlamaConfig:
    """A tiny Llama whose predictions are far from uniform, so that a wrong context shows."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
        **changed,
    }
    return LlamaConfig(**settings)


def checkpoint(folder: Path, *, seed: int = 0, with_tokenizer: bool = True, merges: bool = False, **config: Any) -> str:
    """That Llama with random weights, and a tokenizer."""
    torch.manual_seed(seed)
    LlamaForCausalLM(llama(**config)).save_pretrained(folder)
    if with_tokenizer:
        tokenizer(merges=merges).save_pretrained(folder)
    return str(folder)


def token_losses(folder: str, ids: list[int], window: int, stride: int, lead: int | None = None) -> dict[int, float]:
    """-log p of each token but the first, by its place: a forward pass in float64 each, with the context that token is
    due. `lead`: what each window's first input is replaced by."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    model = model.double().eval()
    losses = {}
    for place in range(1, len(ids)):
        start = 0
        while place > start + window:  # the first window that reaches the token …
            start += stride
        start = max(0, min(start, len(ids) - 1 - window))  # … unless it would hang over the end
        context = list(ids[start:place])
        if lead is not None:
            context[0] = lead
        with torch.no_grad():
            logits = model(torch.tensor([context])).logits[0, -1]
        losses[place] = -torch.log_softmax(logits, -1)[ids[place]].item()
    return losses


def blocks(
    url: str, kind: Kind, seq_len: int, heldout: list[dict[str, list[int]]], vocab_size: int = VOCABULARY
) -> str:
    """A folder of token blocks without training rows; each of `heldout` is a row of every column."""
    storage = Storage(url)
    files = []
    if heldout:
        group = {name: np.array([row[name] for row in heldout], np.int32) for name in heldout[0]}
        files = [write_rows(storage, "heldout/part-00000.parquet", kind, seq_len, [group])]
    manifest = {
        "format": 1,
        "kind": kind,
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        "rows_per_group": max(1, 2**20 // seq_len),
        "splits": {
            "train": {"rows": 0, "tokens": 0, "files": []},
            "heldout": {"rows": len(heldout), "tokens": len(heldout) * seq_len, "files": files},
        },
        "digest": content_digest(kind, seq_len, files),
    }
    storage.write("manifest.json", json.dumps(manifest).encode())
    return url


def conversation_row(examples: list[tuple[list[int], int]], seq_len: int) -> dict[str, list[int]]:
    """A packed row of conversations: each example is its ids and how many of its first ones are not scored."""
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for ids, unscored in [*examples, ([END] * (seq_len - sum(len(ids) for ids, _ in examples)), seq_len)]:
        row["input_ids"] += ids
        row["labels"] += [UNSCORED] * min(unscored, len(ids)) + ids[unscored:]
        row["position_ids"] += range(len(ids))
    return row
