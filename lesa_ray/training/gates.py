"""The gates of new layers in a model that is trained (`lesa_ray.training.insertion`): hooks on the layers' outputs.

Decides
- A gate is a tensor that is written to between steps, so nothing is compiled anew when it moves, and no device is
  waited for.
- `torch.lerp` gives its ends in their own bits at 0 and at 1: then the model is the base's and the ordinary one,
  exactly, gradients included.
- Hooks are put on before layers are compiled (they are part of the graph) and before FSDP2's own, which so see the
  output behind the gate. transformers checkpoints activations inside of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lesa_ray.training.insertion import Insertion

_GATE = "insertion_gate"


class Gates:
    """All at 0 until they are set."""

    def __init__(self, layers: Sequence[nn.Module], insertion: Insertion, device: torch.device) -> None:
        """layers: all decoder layers, from the bottom, neither compiled nor sharded yet. device: that computes."""
        self.insertion = insertion
        self._gates = [torch.zeros((), device=device) for _ in insertion.layers]
        for index, gate in zip(insertion.layers, self._gates, strict=True):
            setattr(layers[index], _GATE, gate)  # neither parameter nor buffer: it belongs to no checkpoint
            layers[index].register_forward_hook(_behind_gate, with_kwargs=True)

    def set(self, done: int) -> None:
        """As they are in step number `done`, counted from 1."""
        for gate, value in zip(self._gates, self.insertion.gates(done), strict=True):
            gate.fill_(value)

    def are_open(self, done: int) -> bool:
        """Whether the model is the ordinary one from step number `done` on."""
        return done >= self.insertion.steps


def _behind_gate(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """x + g · (layer(x) − x), where a layer's output is, or begins with, the residual stream (B, T, d)."""
    x: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    gate: torch.Tensor = getattr(layer, _GATE).to(x.dtype)
    if isinstance(output, tuple):
        return (torch.lerp(x, output[0], gate), *output[1:])
    return torch.lerp(x, output, gate)
