"""Do conversations packed into one row see each other? Try it on a miniature of the same architecture.

Training passes `position_ids` that begin again with each conversation, and no mask. transformers 5 then makes a mask of
one block for each of them, in any number of rows (`masking_utils.find_packed_sequence_indices`) – where a model asks it
for the mask and hands it the positions, and attention takes masks (sdpa, eager; flash attention parts conversations
only in batches of one row). Recurrent layers (Mamba, gated delta rules) have no mask: their state runs on into the next
conversation, which no error would tell. So before training a miniature of two narrow layers (more where layers are of
several kinds) is asked two things:

- in training mode, do the logits of a conversation stay when others in its row, and the padding, change?
- are they those of the conversation alone, without any neighbour or `position_ids`?

It costs half a second (rarely ten, where a family cannot be made narrow). What a miniature cannot show is looked at
in the configuration: long-RoPE, which takes one set of frequencies for a whole batch, by the longest conversation in
it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lesa_ray.checkpoint.depth import PER_LAYER
from lesa_ray.checkpoint.settings import config_depth
from lesa_ray.errors import UserError
from lesa_ray.expansion.miniature import miniature, narrow, quiet_transformers, shake
from lesa_ray.training.model import build
from lesa_ray.training.packing import fill_rows, hide

_ROWS = ((9, 7, 5), (3, 12, 9))
"""Lengths of the conversations in each row of the trial; the first row ends in padding."""
_SEQ_LEN = 24
_TOLERANCE = 1e-3
"""Of the logits' standard deviation. Rounding is at 1e-6; a neighbour that is seen, at 0.1 and more."""
_SMALLER = {"sliding_window": 4, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 64}


def check_packing(architecture: dict[str, Any], where: str, seq_len: int) -> None:
    """Raises: UserError if this architecture does not keep packed conversations apart, or it cannot be tried.

    architecture: content of config.json; seq_len: tokens of a row."""
    family = architecture.get("model_type")
    switch = _long_rope(build(architecture, where).config.get_text_config())
    if switch is not None and seq_len > switch:
        raise UserError(
            f"{where}: {family} takes other rotary frequencies for sequences over {switch} tokens, for a whole batch "
            f"at once, so short conversations would be trained with those of long ones; rows of {seq_len} tokens are "
            f"too long for it, make them with --seq-len {switch}"
        )
    difference = _difference(json.dumps(architecture, sort_keys=True), where)
    if not difference <= _TOLERANCE:
        raise UserError(
            f"{where}: transformers' {family} does not keep conversations packed into one row apart (a miniature's "
            f"logits differ by {difference:.2g} standard deviations from those of each alone), so it cannot be "
            "fine-tuned on them"
        )


def _long_rope(text_config: Any) -> int | None:
    """The length above which the model changes to other rotary frequencies; None if it does not."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    lengths = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((int(length) for length in lengths if length), default=None)


@functools.lru_cache(maxsize=4)
def _difference(architecture: str, where: str) -> float:
    """How far packed conversations are from those alone, in standard deviations of the logits; NaN if something is
    not a number."""
    config = build(json.loads(architecture), where).config
    full: dict[str, Any] = config.to_dict()
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        failure: Exception | None = None
        for also in ({**_SMALLER, **narrow(full)}, {}):  # an unusual architecture may not take narrower settings
            try:
                raw = miniature(full, keep=range(_layers(full)), also=also)
                return _measure(_new_model(raw, config._attn_implementation))
            except Exception as error:  # a miniature of one can fail in ways of its own
                failure = error
    raise UserError(
        f"{where}: a miniature of {config.model_type} could not be built to try whether conversations packed into one "
        f"row see each other ({type(failure).__name__}: {' '.join(str(failure).split())[:160]}), so it cannot be "
        "fine-tuned on them"
    ) from failure


def _layers(full: dict[str, Any]) -> int:
    """The fewest layers that hold one of each kind, at least two."""
    depth = config_depth(full)
    lists = [full[key] for key in PER_LAYER if isinstance(full.get(key), list) and full[key]]
    kinds = [1 + max(kind.index(value) for value in kind) for kind in lists]
    enough: int = max([2, *kinds])
    return min(enough, depth[1]) if depth else enough


def _new_model(raw: dict[str, Any], attention: str) -> PreTrainedModel:
    """On the CPU, with random weights, attention as in training."""
    config = build(raw, "miniature").config
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )
    shake(model)
    return model


@torch.no_grad()
def _measure(model: PreTrainedModel) -> float:
    vocabulary = int(model.config.get_text_config().vocab_size)
    draw = np.random.default_rng(0)
    examples = [[draw.integers(1, vocabulary, length, dtype=np.int32) for length in row] for row in _ROWS]
    worst = []
    model.eval()
    packed = _logits(model, examples)  # (rows, seq_len, vocabulary)
    scale = float(packed.std())
    for number, begin, example in _places(examples):
        alone = model(input_ids=torch.from_numpy(example[None]).long(), use_cache=False).logits[0]
        worst.append((packed[number, begin : begin + len(example)] - alone).abs().max())
    model.train()
    before = _logits(model, examples, seed=1)
    for kept in range(len(_ROWS[0])):
        changed = [[e if i == kept else (e + 1) % vocabulary for i, e in enumerate(row)] for row in examples]
        after = _logits(model, changed, pad=1, seed=1)
        for index, (number, begin, example) in enumerate(_places(examples)):
            if index % len(_ROWS[0]) == kept:
                here = slice(begin, begin + len(example))
                worst.append((before[number, here] - after[number, here]).abs().max())
    return float(torch.stack(worst).max()) / scale


def _places(examples: list[list[Any]]) -> Iterator[tuple[int, int, Any]]:
    """Row, first token and ids of each conversation."""
    for number, row in enumerate(examples):
        begin = 0
        for example in row:
            yield number, begin, example
            begin += len(example)


def _logits(model: PreTrainedModel, examples: list[list[Any]], pad: int = 0, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)  # what noise a model adds in training is the same each time
    columns = fill_rows([[hide(e, np.ones(len(e), np.bool_)) for e in row] for row in examples], _SEQ_LEN, pad)
    inputs = {name: torch.from_numpy(columns[name]).long() for name in ("input_ids", "position_ids")}
    logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits.float()
