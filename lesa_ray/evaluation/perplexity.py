"""Perplexity of a checkpoint on a row of token ids.

Decides
- Every token but the very first, which nothing precedes, is predicted exactly once; the loss is the mean over
  tokens, not over windows or texts.
- Windows of `window` inputs begin every `stride` tokens. The first is scored whole, a later one only on the
  tokens no window has scored: each of those has at least `window - stride` tokens before it. `stride =
  window` (the default) is the cheapest and the harshest, since the first tokens of each window have almost
  no context; a stride of half the window costs twice as much and is kinder. Figures under different windows
  or strides must not be compared.
- The last window is moved back to end with the text, so all have one length and nothing is padded. A text
  shorter than the window is one window.
- Cross-entropy in float32, its sum in float64; matrix products in the checkpoint's own element type unless
  `dtype` says otherwise. Memory for a batch's logits: batch × window × vocabulary × 6 bytes or more (8 ×
  2048 × 128,256: 13 GB; take `batch_size` 1 there).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from lesa_ray.config import DtypeName
from lesa_ray.errors import UserError

LONGEST_WINDOW = 2048  # default where the model allows more: the usual window of published WikiText figures


@dataclass(frozen=True)
class Perplexity:
    """`loss`: mean negative log-likelihood in nats; `tokens`: how many were predicted."""

    loss: float
    tokens: int
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class Window:
    """Inputs `start … start + length - 1`; of their successors, those from `first` (a position in the text)
    on count."""

    start: int
    first: int


def plan_windows(tokens: int, window: int, stride: int) -> list[Window]:
    """The windows over a text of `tokens` ids: positions 1 … tokens-1 are each scored in exactly one of them."""
    last = tokens - 1 - window  # the start of a window that ends with the text
    if last <= 0:
        return [Window(0, 1)]
    windows = [Window(0, 1)]
    scored = window  # positions up to here are predicted
    while scored < tokens - 1:
        windows.append(Window(min(windows[-1].start + stride, last), scored + 1))
        scored = windows[-1].start + window
    return windows


def perplexity(
    checkpoint: str,
    ids: NDArray[np.integer[Any]],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    dtype: DtypeName | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of the Hugging Face folder (or repo id) `checkpoint` on `ids` (tokens,).

    `window` defaults to what the model was made for, at most 2048; `stride` to the window. `progress` is
    called with the windows done and their number. Raises: UserError if the checkpoint cannot be loaded whole
    or does not fit the ids.
    """
    model = load_model(checkpoint, dtype).to(device)
    config = model.config.get_text_config()
    if len(ids) < 2:
        raise UserError(f"{len(ids)} token ids: at least 2 are needed, one to predict from and one to predict")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise UserError(
            f"{checkpoint}: token ids go from {ids.min()} to {ids.max()}, its vocabulary has {config.vocab_size}: "
            "was the text encoded with another tokenizer?"
        )
    window = window or min(getattr(config, "max_position_embeddings", LONGEST_WINDOW), LONGEST_WINDOW)
    stride = stride or window
    if not 1 <= stride <= window:
        raise UserError(f"stride {stride}: expected 1 … window ({window}); a longer one would leave tokens out")
    return score(model, ids, window, stride, batch_size, progress)


def load_model(checkpoint: str, dtype: DtypeName | None) -> PreTrainedModel:
    """The model, ready to evaluate. Raises: UserError also where weights are missing, which would be random."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype or "auto", output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}: cannot be loaded: {str(error).splitlines()[0]}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserError(f"{checkpoint}: {len(names)} tensors are missing, the first {names[0]}")
    return model.eval()


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    ids: NDArray[np.integer[Any]],
    window: int,
    stride: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The loss of `model` over `ids`, in batches of windows."""
    text = torch.from_numpy(ids.astype(np.int64))  # (tokens,)
    windows = plan_windows(len(text), window, stride)
    length = min(window, len(text) - 1)
    total, count = 0.0, 0
    for begin in range(0, len(windows), batch_size):
        batch = windows[begin : begin + batch_size]
        block = torch.stack([text[one.start : one.start + length + 1] for one in batch]).to(model.device)  # (B, T+1)
        logits = model(input_ids=block[:, :-1], use_cache=False).logits  # (B, T, vocabulary)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), block[:, 1:].flatten(), reduction="none")
        for one, row in zip(batch, losses.view(len(batch), length), strict=True):
            scored = row[one.first - one.start - 1 :]  # row[t] is the loss of position start + t + 1
            total += scored.double().sum().item()
            count += len(scored)
        if progress is not None:
            progress(begin + len(batch), len(windows))
    return Perplexity(loss=total / count, tokens=count, window=window, stride=stride)
