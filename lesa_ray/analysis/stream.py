"""Hooks on the layers of a model, and the sums they take: what comes in, what is written, what goes out.

Which module writes for attention and which for the feed-forward is told by names, a norm behind it counted in (Gemma 2,
OLMo 2, GLM 4), and then tried on every token: x + a + m must be y to rounding. Where it is not (scaled residuals as
Granite's, attention that adds by itself as Bloom's), their figures are None with the reason, and those of the block
stand. Figures are in float32 from what the model computes in its own type; their sums over tokens in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_ATTENTION = ("self_attn", "attention", "attn", "self_attention", "linear_attn", "mixer")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_BEHIND_ATTENTION = ("post_self_attn_layernorm",)
_BEHIND_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
"""Norms through which a block writes. Beside the first of the latter, `post_attention_layernorm` is one too; elsewhere
that is the norm before the feed-forward."""


@dataclass
class _Sums:
    """Over the tokens of one layer; `error` is what x + a + m and y differ by, over the sum of the norms."""

    tokens: int = 0
    attention: float = 0.0
    mlp: float = 0.0
    block: float = 0.0
    cosine: float = 0.0
    error: float = 0.0


@dataclass
class _Layer:
    """What hooks left of the forward pass of one layer, (batch, tokens, width) each, and what was added up so far."""

    sums: _Sums = field(default_factory=_Sums)
    before: Tensor | None = None
    writes: dict[str, Tensor] = field(default_factory=dict)
    splits: bool = False
    """Whether the modules that write are known."""


class Watch:
    """Hooks on the layers of a model; sums are taken as each layer ends, so that one layer's tensors are held."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.real: Tensor | None = None
        """(batch, tokens): which tokens count; others are padding."""
        self._layers = [_Layer() for _ in layers]
        self._hooks: list[Any] = []
        for module, layer in zip(layers, self._layers, strict=True):
            writers = writers_of(module)
            layer.splits = writers is not None
            for what, writer in (writers or {}).items():
                self._hooks.append(writer.register_forward_hook(self._kept(layer, what)))
            self._hooks.append(module.register_forward_pre_hook(self._entered(layer), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._left(layer)))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def figures(self, tolerance: float) -> dict[str, Any]:
        reason = None
        if not all(layer.splits for layer in self._layers):
            reason = "which modules of a layer write into the stream is not known for this family"
        elif (worst := max(layer.sums.error / max(layer.sums.tokens, 1) for layer in self._layers)) > tolerance:
            reason = (
                "a layer of this family does more than add what its attention and its feed-forward give "
                f"(the sum is off by {worst:.1g} of the norms)"
            )
        return {"unsplit": reason, "layers": [_record(layer.sums, split=reason is None) for layer in self._layers]}

    def _entered(self, layer: _Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer.before = args[0] if args else kwargs["hidden_states"]

        return hook

    def _kept(self, layer: _Layer, what: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            layer.writes[what] = output if isinstance(output, Tensor) else output[0]

        return hook

    def _left(self, layer: _Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            assert layer.before is not None
            assert self.real is not None
            after = output if isinstance(output, Tensor) else output[0]
            shape = layer.before.shape  # some experts write (batch · tokens, width): Llama 4
            real = self.real.to(after.device)  # over several GPUs the stream enters from the one before
            _add(
                layer.sums,
                layer.before.to(after.device)[real],
                after[real],
                {what: write.reshape(shape)[real] for what, write in layer.writes.items()},
            )
            layer.before = None
            layer.writes.clear()

        return hook


def _add(sums: _Sums, before: Tensor, after: Tensor, writes: dict[str, Tensor]) -> None:
    """before, after and each of writes: (tokens, width). Tokens that enter as zeros have no ratio and are left out."""
    lengths = torch.linalg.vector_norm(before.float(), dim=-1)
    some = lengths > 0
    x, y, lengths = before[some].float(), after[some].float(), lengths[some]
    change = y - x
    sums.tokens += len(x)
    sums.block += _total(torch.linalg.vector_norm(change, dim=-1) / lengths)
    sums.cosine += _total(torch.nn.functional.cosine_similarity(x, y, dim=-1))
    if len(writes) < 2:
        return
    a, m = writes["attention"][some].float(), writes["mlp"][some].float()
    norms = [torch.linalg.vector_norm(write, dim=-1) for write in (a, m)]
    sums.attention += _total(norms[0] / lengths)
    sums.mlp += _total(norms[1] / lengths)
    sums.error += _total(torch.linalg.vector_norm(change - a - m, dim=-1) / (lengths + norms[0] + norms[1]))


def _total(values: Tensor) -> float:
    return float(values.double().sum())


def _record(sums: _Sums, *, split: bool) -> dict[str, float | None]:
    def mean(total: float) -> float | None:
        return total / sums.tokens if sums.tokens else None

    return {
        "attention": mean(sums.attention) if split else None,
        "mlp": mean(sums.mlp) if split else None,
        "block": mean(sums.block),
        "cosine": mean(sums.cosine),
    }


def writers_of(layer: nn.Module) -> dict[str, nn.Module] | None:
    """The modules whose outputs a layer adds to the stream, `attention` and `mlp`; None if one is not known."""
    parts = dict(layer.named_children())
    behind_mlp = next((name for name in _BEHIND_MLP if name in parts), None)
    behind_attention = next((name for name in _BEHIND_ATTENTION if name in parts), None)
    if behind_attention is None and behind_mlp == _BEHIND_MLP[0] and "post_attention_layernorm" in parts:
        behind_attention = "post_attention_layernorm"
    attention = behind_attention or next((name for name in _ATTENTION if name in parts), None)
    mlp = behind_mlp or next((name for name in _MLP if name in parts), None)
    return {"attention": parts[attention], "mlp": parts[mlp]} if attention and mlp else None
