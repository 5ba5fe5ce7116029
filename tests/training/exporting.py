"""Checkpoints to export, and what tests of it share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.training.export import Exported, export, plan_export
from lesa_ray.training.state_files import StateWriter
from tests import families

FACTS = {"data": "a book | two", "steps": 300, "tokens": 1_228_800, "learning_rate": 2e-4, "heldout_loss": 2.5}
NEW = (1, 3)
"""Layers that most tests here train."""


def changed(folder: str, chosen: Callable[[str], bool]) -> dict[str, Tensor]:
    """Trained values, in float32, for the chosen tensors of a checkpoint."""
    found = {name: t for name, t in families.tensors(folder).items() if chosen(name)}
    assert found
    return {name: t.float() * 1.5 + 0.01 for name, t in sorted(found.items())}


def in_new_layers(name: str) -> bool:
    return any(re.search(rf"(layers|h)\.{layer}\.", name) for layer in NEW)


def save_state(url: str, trained: dict[str, Tensor]) -> str:
    """A training checkpoint with these parameters, and the optimizer's state that export must leave alone."""
    state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in trained.items()}
    state |= {f"exp_avg.{name}": torch.full_like(tensor, 7) for name, tensor in trained.items()}
    dcp.save(state, storage_writer=StateWriter(Storage(url)), no_dist=True)
    return url


def run(base: str | None, state: str, out: str, **options: Any) -> Exported:
    return export(plan_export(open_checkpoint(base) if base else None, state, out, **options), FACTS)


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_exported(out: Path, base: str, trained: dict[str, Tensor]) -> None:
    """Frozen tensors are the base's bits, trained ones the trained values in the base's dtype; same files."""
    before, after = families.tensors(base), families.tensors(out)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        expected = trained[name].to(before[name].dtype) if name in trained else before[name]
        assert tensor.dtype == before[name].dtype
        assert torch.equal(bits(tensor), bits(expected)), name
    weights = "*.safetensors*"
    assert {f.name for f in out.glob(weights)} == {f.name for f in Path(base).glob(weights)}
