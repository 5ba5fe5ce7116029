"""Model FLOPs of an optimizer step, with frozen layers counted rightly, and the peaks of GPUs to compare them with.

Model FLOPs are what the mathematics of the step needs, not what the machine happened to do: activation checkpointing
computes some of it twice, and that counts once, so MFU falls where it is used (PaLM, arXiv 2204.02311, appendix B).

What is counted, for each token
- A matrix W of N elements: forward 2·N; gradient of its input 2·N if backward goes on below it; gradient of W itself
  2·N if W is trained. All three make the well-known 6·N; a layer below the lowest trained one costs its 2·N only.
- Attention: forward 2·T·heads·(d_qk + d_v), twice that in backward where backward passes. T is the whole sequence
  although a causal mask hides half of it: PaLM's convention, kept so that figures compare with published ones. It
  favours long sequences. A sliding window or chunk of w counts min(T, w); packed examples count as one sequence.
- Of a mixture of experts those that a token is sent to. Of an embedding nothing: it is looked up.

Left out: norms, activations, softmax, rotary embeddings, linear-attention recurrences, the optimizer (all small), and
recomputation. The lowest trained layer counts whole: where only some of its matrices are trained, backward stops
inside it, and up to one layer's input gradients are counted too many.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

import torch

from lesa_ray.checkpoint.names import layer_of
from lesa_ray.checkpoint.settings import CHOSEN_KEYS, EXPERT_KEYS

_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.|$)")

# Dense bfloat16 with float32 accumulation, FLOP/s, from NVIDIA's data sheets and architecture papers (most print twice
# that, "with sparsity"). Each row: the words that a device's name must hold; the first row that fits counts.
_PEAKS: tuple[tuple[frozenset[str], float], ...] = tuple(
    (frozenset(words.split()), peak)
    for words, peak in (
        ("gb300", 2.5e15),
        ("gb200", 2.5e15),
        ("b300", 2.25e15),
        ("b200", 2.25e15),
        ("b100", 1.75e15),
        ("h200 nvl", 835e12),
        ("h200", 989e12),
        ("gh200", 989e12),
        ("h100 nvl", 835e12),
        ("h100 pcie", 756e12),
        ("h100", 989e12),
        ("h800 pcie", 756e12),
        ("h800", 989e12),
        ("h20", 148e12),
        ("a100", 312e12),
        ("a800", 312e12),
        ("a40", 149.7e12),
        ("a30", 165e12),
        ("a10g", 70e12),
        ("a10", 125e12),
        ("l40s", 362e12),
        ("l40", 181e12),
        ("l4", 121e12),
        ("rtx a6000", 154.8e12),
        ("rtx 6000 ada", 364.2e12),
        ("rtx 5090", 209.5e12),
        ("rtx 4090", 165.2e12),
        ("rtx 3090", 71e12),
    )
)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A weight that tokens are multiplied with. `elements`: those one token meets. `layer`: None outside the stack."""

    layer: int | None
    elements: float
    trained: bool
    is_head: bool


def step_flops(model: torch.nn.Module, *, tokens: int, seq_len: int, lowest_layer: int | None) -> float:
    """Model FLOPs of one optimizer step on `tokens` tokens in sequences of `seq_len`, over all workers.

    model: a transformers causal LM, on any device (meta too), sharded or not; what is trained is read off
    `requires_grad`. lowest_layer: the lowest layer whose input gradients are computed, the number of layers where none
    are; None, or one above what `requires_grad` makes of it: as that says (everything, where embeddings are trained).
    """
    config = _text_config(model)
    matrices, layers = _matrices(model, config)
    first, into_head = _reach(model, layers)
    if lowest_layer is not None:
        first = min(first, lowest_layer)
        into_head = into_head or lowest_layer < layers
    total = 0.0
    for matrix in matrices:
        if matrix.is_head:
            passes = into_head
        elif matrix.layer is None:
            passes = first < layers
        else:
            passes = matrix.layer >= first
        total += 2 * matrix.elements * (1 + passes + matrix.trained)
    for layer in range(layers):
        total += _attention(config, layer, seq_len) * (3 if layer >= first else 1)
    return total * tokens


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak in FLOP/s of one GPU for bfloat16 or float16 matrix products (accumulated in float32).

    device_name: as `torch.cuda.get_device_name` says. None where no data sheet is known (CPUs, slices of a GPU, other
    makers) and for other types, so that no MFU is reported rather than a wrong one.
    """
    words = frozenset(re.split(r"[^a-z0-9]+", device_name.lower()))
    if dtype not in (torch.bfloat16, torch.float16) or "mig" in words or "nvidia" not in words or "laptop" in words:
        return None
    return next((peak for needed, peak in _PEAKS if needed <= words), None)


def _text_config(model: torch.nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _matrices(model: torch.nn.Module, config: Any) -> tuple[list[_Matrix], int]:
    """The weights that take part in matrix products, a tied head included, and the number of layers."""
    head = _head(model)
    found = []
    layers = 0
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{path}.{name}" if path else name
            layer = layer_of(full)
            layers = max(layers, (layer if layer is not None else -1) + 1)
            if parameter.ndim < 2 or name.endswith("bias") or isinstance(module, torch.nn.Embedding):
                continue
            elements = float(parameter.numel())  # of a DTensor: the global shape's
            is_conv = isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d)
            if _EXPERTS.search(full) or (parameter.ndim == 3 and not is_conv):
                elements *= _active_share(config, parameter, full)
            found.append(_Matrix(layer, elements, parameter.requires_grad, module is head))
    return found, layers


def _reach(model: torch.nn.Module, layers: int) -> tuple[int, bool]:
    """How far down backward goes, by `requires_grad`: the lowest layer it passes (`layers`: none), and whether it goes
    through the head into what lies below."""
    head = _head(model)
    first, into_head = layers, False
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.requires_grad or module is head:  # a tied head is met again as the embedding
                continue
            into_head = True
            layer = layer_of(f"{path}.{name}")
            if layer is not None:
                first = min(first, layer)
            elif isinstance(module, torch.nn.Embedding) or "embed" in path:
                first = 0
    return first, into_head


def _head(model: torch.nn.Module) -> torch.nn.Module | None:
    find: Any = getattr(model, "get_output_embeddings", None)
    head: torch.nn.Module | None = find() if find else None
    return head


def _active_share(config: Any, parameter: torch.nn.Parameter, name: str) -> float:
    """The share of a layer's experts that one token is sent to."""
    top_k = next((value for key in CHOSEN_KEYS if isinstance(value := getattr(config, key, None), int)), None)
    experts = next((value for key in EXPERT_KEYS if isinstance(value := getattr(config, key, None), int)), None)
    if parameter.ndim == 3:
        experts = parameter.shape[0]
    if not top_k or not experts:
        logging.getLogger(__name__).warning("FLOPs: %s: all experts counted, the configuration has no top-k", name)
        return 1.0
    return min(1.0, top_k / experts)


def _attention(config: Any, layer: int, seq_len: int) -> float:
    """Forward FLOPs for each token of one layer's scores and weighted sum; 0 for a layer without softmax attention."""
    own = getattr(config, "num_attention_heads_per_layer", None)
    heads: int | None = own[layer] if own else getattr(config, "num_attention_heads", None)
    if not heads:
        return 0.0
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds and layer < len(kinds) else None
    window = None
    if kind is None or "sliding" in kind:
        window = getattr(config, "sliding_window", None)
    elif "chunked" in kind:
        window = getattr(config, "attention_chunk_size", None)
    elif "attention" not in kind or "linear" in kind:
        return 0.0
    keys: int = min(seq_len, window) if window else seq_len
    size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    query: int = getattr(config, "qk_head_dim", None) or size
    value: int = getattr(config, "v_head_dim", None) or size
    return 2.0 * keys * heads * (query + value)
