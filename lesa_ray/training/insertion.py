"""New layers inserted gradually: each one's contribution goes through a gate that opens while training goes on.

    out = x + g · (layer(x) − x),   g = 0 before the first step, 1 from the last step of the ramp on

With all gates at 0 the model computes what the base does, whatever method filled the new layers; at 1 it is the
ordinary model. So a method that starts far from the base (copies, means, predictions) begins where one with zero output
projections does, and its layers come in as they were made.

Decides
- A gate is a pure function of the step: linear, all layers `together`, or one after another from the `bottom` or the
  `top`, each over an equal share of the ramp. So nothing of it is saved, and a resumed run goes on in the same bits.
- Step number k (from 1) of a ramp of n trains with gate k/n, so no step is spent on a gate of 0. A measurement after
  step k has the gate of step k; before the first step it has 0, and gives the base's own loss.
- What is measured during the ramp is the gated model: rows of metrics say how far layers are in (`inserted`). A
  checkpoint of that time is never the best and is not exported: gates are no part of it, and cannot be multiplied into
  the weights, as a layer's MLP reads what its attention has added.
- It costs one pass over each new layer's output, forward and backward; a layer behind a gate of 0 costs what it always
  does. Weight decay acts on a layer that is not yet in, alone.

Karras et al. 2018 (arXiv 1710.10196, section 2) fade the new layers of a GAN in like this; Yao et al. 2023 (Masked
Structural Growth, arXiv 2305.02869) grow language models under masks that go from 0 to 1. Residual branches that begin
at zero under a learnt factor are SkipInit (arXiv 2002.10444) and ReZero (arXiv 2003.04887).
"""

from __future__ import annotations

from dataclasses import dataclass

from lesa_ray.checkpoint.manifest import Manifest
from lesa_ray.errors import UserError
from lesa_ray.training.train_settings import InsertOrder, TrainConfig


@dataclass(frozen=True)
class Insertion:
    """When new layers come in."""

    layers: tuple[int, ...]
    """The new layers, from the bottom."""
    steps: int
    """Optimizer steps of the ramp."""
    order: InsertOrder

    def gates(self, done: int) -> tuple[float, ...]:
        """The gate of each of `layers` (0 … 1) in step number `done`, counted from 1; 0: before the first."""
        count = len(self.layers)
        if done >= self.steps:
            return (1.0,) * count
        if self.order == "together":
            return (done / self.steps,) * count
        rising = tuple(min(max(done * count / self.steps - place, 0.0), 1.0) for place in range(count))
        return rising if self.order == "bottom" else rising[::-1]

    def share(self, done: int) -> float:
        """Mean of the gates."""
        gates = self.gates(done)
        return sum(gates) / len(gates)

    def __str__(self) -> str:
        how = "together" if self.order == "together" else f"one after another from the {self.order}"
        return f"over the first {self.steps:,} steps, {how}"


def plan_insertion(config: TrainConfig, manifest: Manifest | None, steps: int, where: str) -> Insertion | None:
    """How the settings insert layers; None if they are in at once.

    steps: of the whole run. where: what messages call the model. Raises: UserError if none is known to be new."""
    if not config.insert_over:
        return None
    new = () if manifest is None else tuple(sorted(manifest["new_layers"]))
    if not new:
        why = "has no new layer" if manifest else "has no expansion.json that says which layers are new"
        raise UserError(f"insert_over {config.insert_over:g}: {where} {why}; leave insert_over out")
    return Insertion(new, ramp_steps(config, steps), config.insert_order)


def ramp_steps(config: TrainConfig, steps: int) -> int:
    """Steps until all layers are in, of a run of `steps` steps; 0 if they are in at once."""
    return max(1, round(config.insert_over * steps)) if config.insert_over else 0
