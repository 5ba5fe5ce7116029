"""What a run will write at OUT: whether a local disk has room for it is told before the work."""

from __future__ import annotations

import math

from lesa_ray.checkpoint.header import FLOAT_BYTES, FORMAT_NAMES
from lesa_ray.checkpoint.room import MARGIN, check_free
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.sizes import size
from lesa_ray.training.checkpoints import held_bytes
from lesa_ray.training.run import Run

_STATE_BYTES = 12
"""Of a trained parameter in a checkpoint: itself and AdamW's two moments, in float32."""


def check_disk(run: Run) -> None:
    """Raises: MachineError if OUT's disk has no room for the run's checkpoints, and then for what is exported.

    What lies in its checkpoints now counts as free: the run replaces or keeps it."""
    config = run.config
    if Storage(config.out).is_local:
        use = f" for checkpoints of {size(_STATE_BYTES * run.trained_parameters)} and the result"
        fewer = "; a smaller --keep takes less" if config.keep > 1 and config.checkpoint_every < run.steps else ""
        check_free(config.out, needed_bytes(run), held=held_bytes(config.out), use=use, hint=fewer)


def needed_bytes(run: Run) -> int:
    """The most that lies at OUT at once: all checkpoints that are kept and the one that is being written, or those that
    are kept and the exported files."""
    config = run.config
    saves = math.ceil(run.steps / config.checkpoint_every)
    best = int(config.eval_rows > 0 and run.blocks.heldout.rows > 0)
    kept = config.keep + best
    state = _STATE_BYTES * run.trained_parameters
    if run.checkpoint is not None:
        result = run.checkpoint.nbytes
    else:
        result = run.parameters * FLOAT_BYTES[FORMAT_NAMES[config.dtype or "bfloat16"]]
    return max(min(saves, kept + 1) * state, min(saves, kept) * state + result) + MARGIN
