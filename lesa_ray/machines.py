"""What the machines of a cluster have, and how many of something fit: arithmetic on Ray's resources, without Ray.

A bundle is what a task or a worker asks for on one machine: `{"CPU": 4, "GPU": 1}`, memory in bytes. Three machines of
one GPU have room for three bundles of one GPU and for none of two, so nothing here adds GPUs up over machines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

GROW_SECONDS = 900.0
"""How long a cluster may take for a machine that it was asked for: an instance, its image and the set-up take minutes,
with GPUs five to fifteen."""
SHARE_OF_MEMORY = 0.9
"""Of a machine's memory that one task may ask Ray for; the rest is for what is not reckoned with."""


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"{gpus:g}: above 1 a whole number (Ray gives parts of one GPU, or whole ones)")
    return gpus


Gpus = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)]
"""A number of GPUs as Ray gives them: a part of one, or whole ones."""


def _at_most_one(gpus: float) -> float:
    if gpus > 1:
        raise ValueError(f"{gpus:g}: it computes on one GPU; give 1, or a part of one")
    return gpus


OneGpu = Annotated[float, Field(ge=0), AfterValidator(_at_most_one)]
"""The GPU of what computes on one, or a part of it."""


@dataclass(frozen=True)
class Machines:
    """The resources of each machine of a cluster."""

    nodes: tuple[Mapping[str, float], ...]

    @staticmethod
    def of(nodes: Iterable[Mapping[str, float]]) -> Machines:
        return Machines(tuple(nodes))

    def most(self, kind: str) -> float:
        """Of the machine that has the most."""
        return max((node.get(kind, 0.0) for node in self.nodes), default=0.0)

    def total(self, kind: str) -> float:
        return sum(node.get(kind, 0.0) for node in self.nodes)

    def room(self, bundle: Mapping[str, float]) -> int:
        """How many of the bundle fit when nothing else runs."""
        return sum(_room(node, bundle) for node in self.nodes)

    def hold(self, bundle: Mapping[str, float]) -> bool:
        """Whether one of them has room for the bundle, which may be nothing."""
        return not any(bundle.values()) or self.room(bundle) > 0

    def having(self, bundle: Mapping[str, float]) -> Machines:
        """Those with room for the bundle."""
        return Machines(tuple(node for node in self.nodes if _room(node, bundle)))

    def gpus_each(self, asked: float | None, device: str | None = None) -> float:
        """GPUs of a task or worker: as asked for, else one where there are some; `device` leaves no choice."""
        if asked is not None or device == "cpu":
            return asked or 0.0
        return float(device == "cuda" or self.most("GPU") >= 1)


def _room(node: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    # A tenth goes ten times into 1, which 1 // 0.1 denies; Ray itself counts in ten-thousandths.
    each = [math.floor(node.get(kind, 0.0) / amount + 1e-6) for kind, amount in bundle.items() if amount]
    return min(each, default=0)


def told(bundle: Mapping[str, float]) -> str:
    """A bundle as a person reads it: `1 GPU and 4 CPUs`."""
    parts = []
    for kind in ("GPU", "CPU"):
        amount = bundle.get(kind, 0.0)
        if amount or kind == "CPU":
            parts.append(f"{amount:g} {kind}{'s' if amount != 1 else ''}")
    if bundle.get("memory"):
        parts.append(f"{bundle['memory'] / 1e9:.1f} GB of memory")
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def lacking(bundle: Mapping[str, float]) -> str:
    """What is said where no machine has room for a bundle, as those that had were lost."""
    return f"no machine of the cluster has {told(bundle)} now"
