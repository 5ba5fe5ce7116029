"""Whether a checkpoint fits the GPUs that it is to be measured on, and which of its layers goes to which of them.

Decides
- It is told from headers and config.json, before a weight is fetched. What is counted is what is certain: the weights
  in the type they are computed with, CUDA's own memory, and the logits of one window, or of as many as `--batch-size`
  says. A forward pass takes more, so what passes here may still find a GPU full, but what is refused could not run.
- Over several GPUs of one process a model goes layer by layer, as accelerate spreads it: each layer whole on one GPU, a
  batch from GPU to GPU, one of them at work at a time. That is for memory and not for speed. Nothing is offloaded to
  main memory or disk: one more GPU is asked for instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lesa_ray.config import DtypeName
from lesa_ray.errors import UserError
from lesa_ray.evaluation.checkpoints import Bounds, choose_device
from lesa_ray.gpu import CONTEXT_BYTES, allowed_memory

DeviceMap = dict[str, int | str] | str
"""Which GPU, by its index, each module goes to; or `auto`, which leaves it to transformers."""
_MOST_GPUS = 16  # of one machine; more are not looked for


def choose_devices(device: str | None, gpus: float | None) -> tuple[str, ...]:
    """`cpu`, `cuda`, or several GPUs of this process: `cuda:0`, `cuda:1` …

    Raises: UserError if there are not as many as asked for, or accelerate is not installed, which several need."""
    if gpus == 0 and device is None:
        return ("cpu",)
    if gpus is None or gpus <= 1 or device == "cpu":
        return (choose_device(device),)
    require_accelerate(gpus)
    if (seen := torch.cuda.device_count()) < gpus:
        raise UserError(f"--gpus-per-task {gpus:g}: PyTorch sees {seen} GPUs here")
    return tuple(f"cuda:{index}" for index in range(int(gpus)))


def require_accelerate(gpus: float | None) -> None:
    """Raises: UserError if several GPUs are asked for, and accelerate, which moves what passes between them, is not
    installed."""
    if gpus is None or gpus <= 1:
        return
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--gpus-per-task {gpus:g}: one model over several GPUs needs accelerate ({error}): "
            "pip install 'lesa-ray[gpus]', on every machine that works"
        ) from error


def place(
    bound: Bounds, dtype: DtypeName | None, window: int, batch_size: int | None, devices: tuple[str, ...]
) -> DeviceMap | None:
    """Where the model's parts go; None if all go to one device.

    window, batch_size: of a forward pass. Raises: UserError if it cannot fit, with the number of GPUs that would do."""
    if devices[0] == "cpu":
        return None
    logits = (batch_size or 1) * window * bound.vocab_size * bound.dtype_of(dtype).itemsize
    totals = [torch.cuda.get_device_properties(one).total_memory for one in devices]
    memory = [min(allowed_memory(one), total - CONTEXT_BYTES) for one, total in zip(devices, totals, strict=True)]
    return plan(bound, dtype, logits, memory)


def plan(bound: Bounds, dtype: DtypeName | None, logits: int, memory: list[int]) -> DeviceMap | None:
    """The same for GPUs of so many bytes each, and so many bytes of logits."""
    room = [max(0, one - logits) for one in memory]
    weights = bound.weights(dtype)
    model = None
    if not weights and not bound.is_quantized:  # a repo id: its config.json says as much
        model = _empty(bound, dtype)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if weights > sum(room):
        raise _too_large(bound, weights, logits, memory)
    if len(room) == 1:
        return None
    if bound.is_quantized:
        return "auto"  # its sizes are the quantizer's to know
    if model is None:
        model = _empty(bound, dtype)
    if not model._no_split_modules:
        raise UserError(
            f"checkpoint {bound.name}: transformers does not know where a {type(model).__name__} may be split, so it "
            "has to fit one GPU; leave out --gpus-per-task"
        )
    found = _spread(model, room)
    if found is None:
        raise _too_large(bound, weights, logits, memory, model)
    return found


def _empty(bound: Bounds, dtype: DtypeName | None) -> Any:
    """The model without its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(bound.config, dtype=bound.dtype_of(dtype), trust_remote_code=False)
    model.tie_weights()
    return model


def _spread(model: Any, room: list[int]) -> dict[str, int | str] | None:
    """The GPU of each module, as even as `room` (bytes of each GPU) allows; None if it does not go in whole."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules)
    for limits in (
        get_balanced_memory(model, dict(enumerate(room)), no_split_module_classes=whole),
        dict(enumerate(room)),  # where they are so full that evenly does not go
    ):
        found = infer_auto_device_map(model, limits, no_split_module_classes=whole)
        if "disk" not in found.values():
            return dict(found)
    return None


def _too_large(bound: Bounds, weights: int, logits: int, memory: list[int], model: Any = None) -> UserError:
    """model: where even the sum of the memory would do, but not the layers whole."""
    room = max(memory) - logits
    count = max(math.ceil(weights / room), len(memory) + 1) if room > 0 else 0
    if model is not None:
        count = next((n for n in range(count, _MOST_GPUS + 1) if _spread(model, [room] * n)), 0)
    one = len(memory) == 1
    has = f"{'given is' if one else 'given are'} {len(memory)} GPU{'' if one else 's'} of {max(memory) / 1e9:.1f} GB"
    more = f"--gpus-per-task {count}, " if count else ""
    return UserError(
        f"checkpoint {bound.name}: its weights take {weights / 1e9:.1f} GB, and logits {logits / 1e9:.1f} GB on a GPU; "
        f"{has}; give {more}a smaller --batch-size or --window, --dtype bfloat16 or --device cpu"
    )
