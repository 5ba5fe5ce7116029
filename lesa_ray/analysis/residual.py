"""What each layer does to the residual stream, measured on tokens: how much its attention, its feed-forward and the
whole of it add, and how far it turns the stream.

For a token at a layer, with x the stream before and y after it, a and m what attention and feed-forward write:

attention, mlp  ‖a‖/‖x‖ and ‖m‖/‖x‖, both over the stream that enters the layer
block           ‖y − x‖/‖x‖
cosine          of x and y; 1 − cosine is the layer's block influence (ShortGPT, arXiv 2403.03853, section 2.2)

each a mean over tokens (`analysis.stream` takes them). The last layer is included, the final norm is not.

The model is loaded as `evaluate` does it: whole on one device, or over the GPUs of `--gpus-per-task`. One that does not
fit there cannot be measured here, and its weights can still be analysed without `--data`. Memory beside it: one batch's
stream and two writes of one layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.analysis.stream import Watch
from lesa_ray.errors import UserError
from lesa_ray.evaluation.checkpoints import (
    Bounds,
    input_device,
    load_model,
    load_tokenizer,
    local_folder,
    read_bounds,
)
from lesa_ray.evaluation.data import TextData, block_rows, open_data, text_rows
from lesa_ray.evaluation.measure import Job, make_job
from lesa_ray.evaluation.perplexity import Row, vocabulary_of
from lesa_ray.evaluation.placement import choose_devices, place
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.gpu import is_full
from lesa_ray.training.model import layers_of

_BATCH_TOKENS = 4096
_ROUNDING = 1e-5
"""Of float32: two additions, and the differences and norms taken here."""


def prepare_residual(config: AnalyzeConfig) -> tuple[Job, Bounds]:
    """Data and window, from headers alone. Raises: UserError."""
    settings = EvaluateConfig(
        checkpoints=(config.base,),
        data=config.data,
        split=config.split,
        text_column=config.text_column,
        window=config.window,
        dtype=config.dtype,
        device=config.device,
        gpus_per_task=config.gpus_per_task,
    )
    bounds = read_bounds(config.base)
    return make_job(settings, open_data(settings), [bounds]), bounds


def measure_residual(
    job: Job, bounds: Bounds, most: int, progress: Callable[[str, float], None] = lambda phase, share: None
) -> dict[str, Any]:
    """The schema's `residual`, from about the first `most` tokens of the data.

    Raises: UserError for a model that cannot be loaded or does not fit, or data that do not suit it.
    """
    name, data = f"checkpoint {bounds.name}", job.data
    assert data is not None
    devices = choose_devices(job.config.device, job.config.gpus_per_task)
    placed = place(bounds, job.config.dtype, 1, 1, devices)  # the pass ends before the logits
    progress("loading the model", 0.0)
    try:
        with local_folder(bounds.name, bounds.url) as (folder, _):
            model = load_model(folder, job.config.dtype, name=name, device=devices[0], placed=placed)
            if isinstance(data, TextData):
                rows = text_rows(data, load_tokenizer(bounds.name, folder), None)
            else:
                rows = block_rows(data, None)
            return {
                "data": data.name,
                "window": job.window,
                **contributions(model, rows, job.window, most, name, progress),
            }
    except RuntimeError as error:
        if not is_full(error):
            raise
        raise UserError(
            f"{name}: does not fit into the GPU's memory; give a shorter --window, --dtype bfloat16, --device cpu or "
            f"--gpus-per-task {len(devices) + 1}, or leave out --data: its weights are analysed without it"
        ) from error


@torch.inference_mode()
def contributions(
    model: PreTrainedModel,
    rows: Iterable[Row],
    window: int,
    most: int,
    name: str,
    progress: Callable[[str, float], None] = lambda phase, share: None,
) -> dict[str, Any]:
    """Figures of all layers over the windows of `rows`, until `most` tokens are read: `tokens`, how many were;
    `layers`, a record each; `unsplit`, why attention and mlp are None, or None.

    Raises: UserError if there is no token, or one that the model does not have.
    """
    watch = Watch(layers_of(model))
    vocabulary, seen = vocabulary_of(model), 0
    try:
        for batch in _batches(_windows(rows, window, most), max(1, _BATCH_TOKENS // window)):
            least, largest = min(int(ids.min()) for ids in batch), max(int(ids.max()) for ids in batch)
            if least < 0 or largest >= vocabulary:
                raise UserError(
                    f"{name}: token ids go from {least} to {largest}, its vocabulary has {vocabulary}: "
                    "were the data encoded with another tokenizer?"
                )
            table = np.zeros((len(batch), max(map(len, batch))), np.int64)  # a causal model does not see what follows
            real = np.zeros(table.shape, np.bool_)
            for line, ids in enumerate(batch):
                table[line, : len(ids)], real[line, : len(ids)] = ids, True
            watch.real = torch.from_numpy(real).to(input_device(model))
            model.base_model(input_ids=torch.from_numpy(table).to(input_device(model)), use_cache=False)
            seen += int(real.sum())
            progress(f"forward pass, {seen:,} tokens", min(seen / most, 1.0))
    finally:
        watch.remove()
    if not seen:
        raise UserError(f"{name}: there is no token in the data")
    return {"tokens": seen, **watch.figures(max(torch.finfo(model.dtype).eps, _ROUNDING))}


def _windows(rows: Iterable[Row], window: int, most: int) -> Iterator[NDArray[np.int64]]:
    """The rows' ids, cut; every window of a row begins with its `lead`, if it has one. In all at most `most` ids."""
    for row in rows:
        for start in range(0, len(row.ids), window):
            ids = row.ids[start : start + min(window, most)].astype(np.int64)
            if row.lead is not None:
                ids[0] = row.lead
            yield ids
            most -= len(ids)
            if most <= 0:
                return


def _batches(windows: Iterator[NDArray[np.int64]], size: int) -> Iterator[list[NDArray[np.int64]]]:
    while batch := list(itertools.islice(windows, size)):
        yield batch
