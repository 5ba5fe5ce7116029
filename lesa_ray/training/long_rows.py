"""The losses of long rows with the logits of one piece of them in memory at a time, whatever family the model is of.

    one call of the model: its layers on whole rows ▸ piece by piece: what comes after the layers ▸ the loss

Decides
- What a family does after its layers (scaled states, a head, a bias, capped logits) is its own: for each piece
  transformers' forward runs again, in which the stack of layers hands out that piece of what it has computed. Nothing
  after the layers reaches from one token to another.
- All of this happens within one call of the model, so that FSDP2's hooks on it, which gather the head's weights and sum
  their gradients over workers, run once.
- A piece's logits are made anew in the backward pass: a third more arithmetic, of the head's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from lesa_ray.training.model import layers_of

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Forward = Callable[..., Any]


def losses_in_pieces(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor, loss: Loss, tokens: int
) -> torch.Tensor:
    """Sum of the losses of rows.

    inputs: each (B, T), as are labels. loss: the sum over all labels (B, t) but a row's first, each predicted by the
    logits (B, t, vocabulary) of the token before. tokens: that a piece has at most, all rows together."""
    whole = model.forward

    def forward(**columns: Any) -> torch.Tensor:
        stack = _Stack()
        with ExitStack() as replaced:
            for module in _around_layers(model):
                replaced.enter_context(_instead(module, stack.computing(module)))
            logits = whole(**columns).logits
        if stack.output is None:
            return loss(logits, labels)
        sums = []
        for part in _parts(labels.shape[1], max(1, tokens // labels.shape[0])):
            own = {name: column[:, part] if name in inputs else column for name, column in columns.items()}
            sums.append(
                checkpoint(
                    _loss_of, part, whole, stack, own, labels[:, part], loss,
                    use_reentrant=False, preserve_rng_state=False,
                )
            )  # fmt: skip
        return torch.stack(sums).sum()

    with _instead(model, forward):
        total: torch.Tensor = model(**inputs, use_cache=False)
    return total


class _Stack:
    """What holds the layers, for one call of the model; and its output, if that has hidden states."""

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.output: ModelOutput | None = None

    def computing(self, module: nn.Module) -> Forward:
        """The forward of a module around the layers that keeps the output and hands out one token of it."""
        compute = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.module is not None:  # this one lies within it
                return compute(*args, **kwargs)
            self.module = module
            output = compute(*args, **kwargs)
            if not isinstance(output, ModelOutput) or "last_hidden_state" not in output:
                return output
            self.output = output
            return self.piece(slice(0, 1))

        return forward

    def piece(self, part: slice) -> ModelOutput:
        assert self.output is not None
        return type(self.output)(**{**self.output, "last_hidden_state": self.output["last_hidden_state"][:, part]})


def _loss_of(
    part: slice, whole: Forward, stack: _Stack, columns: Mapping[str, Any], labels: torch.Tensor, loss: Loss
) -> torch.Tensor:
    assert stack.module is not None
    with _instead(stack.module, lambda *_, **__: stack.piece(part)):
        logits = whole(**columns).logits
    return loss(logits, labels)


def _around_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold the layers, from the outermost within the model."""
    lowest = layers_of(model)[0]
    path = next(name for name, module in model.named_modules() if module is lowest).split(".")
    return (model.get_submodule(".".join(path[:depth])) for depth in range(1, len(path)))


def _parts(length: int, size: int) -> list[slice]:
    """Pieces of a row, as even as can be, that predict at most `size` tokens each. A piece begins with the token that
    the one before ends with, as its first token is not predicted there."""
    predicted = max(1, length - 1)
    size = -(-predicted // -(-predicted // size))
    return [slice(first, min(first + size, predicted) + 1) for first in range(0, predicted, size)]


@contextmanager
def _instead(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Another forward for a module, which its hooks run around."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
