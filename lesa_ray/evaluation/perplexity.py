"""Perplexity of a model on rows of token ids.

Decides
- Every token but the very first of a row, which nothing precedes, is predicted exactly once; the loss is the mean over
  tokens, not over windows, rows or texts.
- Windows of `window` inputs begin every `stride` tokens. The first is scored whole, a later one only on the
  tokens no window has scored: each of those has at least `window - stride` tokens before it. `stride =
  window` (the default) is the cheapest and the harshest, since the first tokens of each window have almost
  no context; a stride of half the window costs twice as much and is kinder. Figures under different windows
  or strides must not be compared.
- The last window of a row is moved back to end with it, so nothing is padded but rows shorter than the window, on
  their right, where a causal model does not see it.
- Cross-entropy in float32, its sum in float64; matrix products in the checkpoint's own element type unless
  `dtype` says otherwise.
- Memory is that of the model and of one batch: its logits are made for scored positions only, and a batch has as many
  windows as keep them below 512 MiB on a CPU, 2 GiB on a GPU (one window of 2,048 tokens of a 128,256-token
  vocabulary in bfloat16: 525 MB).
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lesa_ray.checkpoint.settings import longest_window
from lesa_ray.config import DtypeName
from lesa_ray.errors import UserError
from lesa_ray.evaluation.checkpoints import choose_device, input_device, load_model
from lesa_ray.training.tokens import UNSCORED

LONGEST_WINDOW = 2048  # default where the model allows more: the usual window of published WikiText figures
_LOGIT_BYTES = (2**29, 2**31)  # on a CPU, on a GPU
_LARGEST_BATCH = 64
_LOSS_BYTES = 2**26  # float32 logits of one step of the cross-entropy
_SORTED = 8  # batches that are sorted by length together


@dataclass(frozen=True)
class Perplexity:
    """`loss`: mean negative log-likelihood in nats; `tokens`: how many were predicted."""

    loss: float
    tokens: int
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        return exp(self.loss)


def exp(loss: float) -> float:
    """e to the loss; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class Window:
    """Inputs `start … start + length - 1`; of their successors, those from `first` (a position in the text)
    on count."""

    start: int
    first: int


def plan_windows(tokens: int, window: int, stride: int) -> list[Window]:
    """The windows over a text of `tokens` ids: positions 1 … tokens-1 are each scored in exactly one of them."""
    last = tokens - 1 - window  # the start of a window that ends with the text
    windows = [Window(0, 1)]
    scored = window  # positions up to here are predicted
    while scored < tokens - 1:
        windows.append(Window(min(windows[-1].start + stride, last), scored + 1))
        scored = windows[-1].start + window
    return windows


@dataclass(frozen=True)
class Row:
    """A text as a model reads it: `ids` (tokens,), of which `labels` (tokens,), if given, is -100 where a token is not
    to be scored.

    `lead` replaces the first input of each window: some models (Gemma) are lost without their first token. `nbytes`:
    of the text in UTF-8. `done`: how much of the data has been read with this row."""

    ids: NDArray[np.integer[Any]]
    labels: NDArray[np.integer[Any]] | None = None
    lead: int | None = None
    nbytes: int = 0
    done: float = 0.0


@dataclass(frozen=True)
class Scores:
    """What was measured, window by window in the order of the rows: `nats` (windows,) float64 sums of losses, `tokens`
    (windows,) scored tokens, `rows` (windows,) the row of each; `nbytes` (rows,); `digest` names the ids, windows and
    what was scored: equal digests mean that windows correspond."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    rows: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    digest: str

    @property
    def count(self) -> int:
        return int(self.tokens.sum())

    @property
    def loss(self) -> float:
        """Mean over tokens, in nats."""
        return float(self.nats.sum() / self.tokens.sum())


def perplexity(
    checkpoint: str,
    ids: NDArray[np.integer[Any]],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    dtype: DtypeName | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of the Hugging Face folder (or repo id) `checkpoint` on `ids` (tokens,).

    `window` defaults to what the model was made for, at most 2048 (a longer one is tried as asked: rotary positions
    allow it); `stride` to the window; `batch_size` to what keeps memory bounded; `device` to a GPU where there is one.
    `progress` is called with the windows done and their number. Raises: UserError if the checkpoint cannot be loaded
    whole or does not fit the ids.
    """
    model = load_model(checkpoint, dtype, device=choose_device(device))
    if len(ids) < 2:
        raise UserError(f"{len(ids)} token ids: at least 2 are needed, one to predict from and one to predict")
    positions = longest_window(model.config.get_text_config())
    window = window or min(positions or LONGEST_WINDOW, LONGEST_WINDOW)
    stride = stride or window
    if not 1 <= stride <= window:
        raise UserError(f"stride {stride}: expected 1 … window ({window}); a longer one would leave tokens out")
    total = len(plan_windows(len(ids), window, stride))

    def tell(windows: int, done: float) -> None:
        if progress is not None:
            progress(windows, total)

    scores = score(model, [Row(ids)], window, stride, batch_size, name=checkpoint, progress=tell)
    return Perplexity(loss=scores.loss, tokens=scores.count, window=window, stride=stride)


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    rows: Iterable[Row],
    window: int,
    stride: int,
    batch_size: int | None = None,
    *,
    name: str = "the model",
    progress: Callable[[int, float], None] | None = None,
) -> Scores:
    """The losses of `model` over `rows`, window by window, each row on its own.

    `progress` is called after each batch with the windows scored so far and their rows' `done`.
    Raises: UserError if an id is outside the vocabulary, or the model's output is not a number."""
    batch_size = batch_size or fitting_batch(model, window)
    nbytes: list[int] = []
    digest = hashlib.sha256(f"{window} {stride}".encode())
    nats: list[float] = []
    tokens: list[int] = []
    owners: list[int] = []
    pieces = _cut(rows, window, stride, vocabulary_of(model), name, nbytes, digest)
    while group := list(islice(pieces, batch_size * _SORTED)):
        sums = np.zeros(len(group))
        order = np.argsort([-len(piece.inputs) for piece in group], kind="stable")  # batches of like lengths
        for begin in range(0, len(group), batch_size):
            chosen = order[begin : begin + batch_size]
            batch = [group[index] for index in chosen]
            sums[chosen] = _losses(model, batch)
            if progress is not None:
                progress(len(nats) + begin + len(batch), max(piece.done for piece in batch))
        if not np.isfinite(sums).all():
            raise UserError(
                f"{name}: its loss is not a number (element type {model.dtype}): there is NaN in its weights, or it "
                "overflows; try --dtype float32"
            )
        nats += sums.tolist()
        tokens += [int((piece.targets != UNSCORED).sum()) for piece in group]
        owners += [piece.row for piece in group]
    return Scores(
        np.array(nats, np.float64),
        np.array(tokens, np.int64),
        np.array(owners, np.int64),
        np.array(nbytes, np.int64),
        digest.hexdigest(),
    )


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many tokens the model can read: the rows of its input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def fitting_batch(model: PreTrainedModel, window: int) -> int:
    """How many windows keep their logits within bounds, at least one."""
    one: int = window * vocabulary_of(model) * model.dtype.itemsize
    return max(1, min(_LARGEST_BATCH, _LOGIT_BYTES[input_device(model).type == "cuda"] // one))


@dataclass(frozen=True)
class _Piece:
    """A window cut out: `inputs` and `targets` (length,), the latter -100 where nothing is scored."""

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    row: int
    done: float


def _cut(
    rows: Iterable[Row], window: int, stride: int, vocabulary: int, name: str, nbytes: list[int], digest: Any
) -> Iterator[_Piece]:
    """The windows of all rows; fills `nbytes` and `digest` on the way."""
    for index, row in enumerate(rows):
        nbytes.append(row.nbytes)
        ids = row.ids.astype(np.int64)
        if len(ids) < 2:
            continue
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise UserError(
                f"{name}: token ids go from {ids.min()} to {ids.max()}, its vocabulary has {vocabulary}: "
                "was the text encoded with another tokenizer?"
            )
        labels = ids if row.labels is None else np.where(row.labels == UNSCORED, UNSCORED, ids)
        digest.update(f"|{len(ids)} {row.lead}|".encode() + ids.tobytes() + labels.tobytes())
        length = min(window, len(ids) - 1)
        for one in plan_windows(len(ids), window, stride):
            targets = labels[one.start + 1 : one.start + length + 1].copy()
            targets[: one.first - one.start - 1] = UNSCORED
            if (targets == UNSCORED).all():
                continue
            inputs = ids[one.start : one.start + length].copy()
            if row.lead is not None:
                inputs[0] = row.lead  # llama.cpp's perplexity does the same
            yield _Piece(inputs, targets, index, row.done)


def _losses(model: PreTrainedModel, batch: list[_Piece]) -> NDArray[np.float64]:
    """For each piece the sum of its losses, in nats: (len(batch),)."""
    length = max(len(piece.targets) for piece in batch)

    def padded(rows: list[NDArray[np.int64]], value: int) -> NDArray[np.int64]:  # (B, T)
        table = np.full((len(rows), length), value, np.int64)
        for line, row in zip(table, rows, strict=True):
            line[: len(row)] = row
        return table

    inputs, targets = padded([p.inputs for p in batch], 0), padded([p.targets for p in batch], UNSCORED)
    kept = length - int((targets != UNSCORED).any(0).argmax())  # positions from the first scored one on
    fewer = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=torch.from_numpy(inputs).to(input_device(model)), use_cache=False, **fewer).logits
    logits = logits[:, -kept:].flatten(0, 1)  # (B·kept, vocabulary)
    # over several GPUs the device of the logits is not always that of the inputs
    wanted = torch.from_numpy(targets[:, -kept:].flatten()).to(logits.device)
    step = max(1, _LOSS_BYTES // (4 * logits.shape[1]))
    losses = torch.cat(
        [
            F.cross_entropy(some.float(), aims, ignore_index=UNSCORED, reduction="none")
            for some, aims in zip(torch.split(logits, step), torch.split(wanted, step), strict=True)
        ]
    )
    sums: NDArray[np.float64] = losses.double().view(len(batch), kept).sum(1).cpu().numpy()
    return sums
