"""The plan: which layers the result has, in order, and where each comes from.

A layer of the base has the id it had there (0 … L-1). New layers get the ids L, L+1, … in the order in which they can
be made, so a slot refers only to smaller ids. When there are more new layers than gaps, every gap is filled and the
rest are placed, by the same rule, on the sequence grown so far: 3× and more work.

Published positions: LESA fills the last gaps (32 → 48: after layers 15 … 30, `range(15, 31)` in the released code);
LLaMA Pro copies the last layer of each of T-L groups; SOLAR stacks [0, L-m) and [m, L), m = L - T/2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lesa_ray.errors import UserError

POSITIONS = ("top", "middle", "bottom", "ends", "uniform")
BY_IMPORTANCE = ("most-important", "least-important")
"""Positions that follow from figures of the base's layers (`expansion.importance`)."""
_GAPS = re.compile(r"^\d+(-\d+)?(,\d+(-\d+)?)*$")


@dataclass(frozen=True, slots=True)
class Old:
    """A layer of the base, unchanged."""

    id: int


@dataclass(frozen=True, slots=True)
class New:
    """A slot: a new layer between the layers `lower` and `upper` (ids; upper is None above the last layer)."""

    id: int
    lower: int
    upper: int | None


@dataclass(frozen=True)
class Plan:
    """`outputs` are the result's layers, from the embedding to the head."""

    base_layers: int
    outputs: tuple[Old | New, ...]

    @property
    def layers(self) -> int:
        return len(self.outputs)

    @cached_property
    def slots(self) -> tuple[New, ...]:
        """The new layers in the order in which they can be made."""
        return tuple(sorted((o for o in self.outputs if isinstance(o, New)), key=lambda slot: slot.id))

    def origin(self, layer: int) -> int:
        """The base layer from which a layer (by id) descends through its lower neighbours."""
        while layer >= self.base_layers:
            layer = self._lower[layer]
        return layer

    @cached_property
    def _lower(self) -> dict[int, int]:
        return {slot.id: slot.lower for slot in self.slots}

    def raised(self, below: int) -> Plan:
        """The plan of the whole model where this is one for the layers above `below` others, which stay."""
        if below == 0:
            return self
        outputs: list[Old | New] = [Old(layer) for layer in range(below)]
        for output in self.outputs:
            if isinstance(output, Old):
                outputs.append(Old(below + output.id))
            else:
                upper = None if output.upper is None else below + output.upper
                outputs.append(New(below + output.id, below + output.lower, upper))
        return Plan(below + self.base_layers, tuple(outputs))

    @property
    def origins(self) -> list[int]:
        """For each layer of the result, the base layer whose settings in the configuration it takes."""
        return [self.origin(output.id) for output in self.outputs]


def target_layers(base_layers: int, factor: float | None, layers: int | None, position: str | None) -> int:
    """How many layers the result has. Raises: UserError if that is no growth."""
    if layers is None and factor is None and position is not None and position not in (*POSITIONS, *BY_IMPORTANCE):
        return base_layers + len(parse_gaps(position, base_layers))
    if layers is None:
        factor = 1.5 if factor is None else factor
        if not factor > 1:
            raise UserError(f"--factor {factor:g}: must be greater than 1")
        if factor > 64:
            raise UserError(f"--factor {factor:g}: more than 64 times the base's {base_layers} layers")
        layers = int(base_layers * factor + 0.5)
        if layers <= base_layers:
            raise UserError(
                f"--factor {factor:g}: adds no layer to {base_layers}; use --layers {base_layers + 1} or more"
            )
    if layers <= base_layers:
        raise UserError(f"--layers {layers}: the base has {base_layers} already; give more")
    if layers > 64 * base_layers:
        raise UserError(f"--layers {layers}: more than 64 times the base's {base_layers} layers")
    return layers


def parse_gaps(position: str, base_layers: int) -> list[int]:
    """Gaps named by the layer below each: `15-30` or `1,5,9`. Raises: UserError."""
    if not _GAPS.match(position):
        words = ", ".join((*POSITIONS, *BY_IMPORTANCE))
        raise UserError(f"--position {position}: unknown; use {words}, or gaps such as 15-30 or 1,5,9")
    gaps: list[int] = []
    for part in position.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise UserError(f"--position {position}: the range {part} runs backwards")
        if int(last or first) > base_layers - 2:
            raise UserError(
                f"--position {position}: gap {last or first} is out of range; a gap i lies between layers i and i+1, "
                f"so with {base_layers} layers they run from 0 to {base_layers - 2}"
            )
        gaps.extend(range(int(first), int(last or first) + 1))
    if len(set(gaps)) != len(gaps):
        raise UserError(f"--position {position}: names a gap twice; each can take one layer in a round")
    return sorted(gaps)


def choose_gaps(position: str, count: int, gaps: int) -> list[int]:
    """`count` of the gaps 0 … gaps-1, ascending; count ≤ gaps.

    top: the last ones; bottom: the first; middle: centred; ends: half at either end, the odd one on top; uniform:
    spread."""
    if position == "top":
        return list(range(gaps - count, gaps))
    if position == "bottom":
        return list(range(count))
    if position == "middle":
        start = (gaps - count) // 2
        return list(range(start, start + count))
    if position == "ends":
        return [*range(count // 2), *range(gaps - (count - count // 2), gaps)]
    assert position == "uniform", position
    return [(2 * index + 1) * gaps // (2 * count) for index in range(count)]


def gaps_by_importance(position: str, influence: Sequence[float], count: int) -> str:
    """The gaps above the `count` layers of largest (`most-important`) or smallest influence, as `parse_gaps` reads
    them; of equal ones the lower. The last layer has no gap above it.

    influence: one value for each layer of the base. Raises: UserError if there are not so many gaps.
    """
    gaps = len(influence) - 1
    if count > gaps:
        raise UserError(
            f"--position {position}: chooses among the {gaps} gaps of the base, {count} layers are to be added; "
            "give fewer, or another position"
        )
    sign = -1 if position == "most-important" else 1
    chosen = sorted(range(gaps), key=lambda gap: (sign * influence[gap], gap))[:count]
    return ",".join(map(str, sorted(chosen)))


def between(base_layers: int, layers: int, position: str) -> Plan:
    """New layers in the gaps that `position` names, in rounds if there are more of them than gaps.

    Raises: UserError if the position names gaps and not as many as layers are to be added, or there is no gap at all.
    """
    if base_layers < 2:
        raise UserError(f"the base has {base_layers} layer; a new layer needs two to lie between")
    outputs: list[Old | New] = [Old(i) for i in range(base_layers)]
    named = None if position in POSITIONS else parse_gaps(position, base_layers)
    if named is not None and len(named) != layers - base_layers:
        raise UserError(
            f"--position: names {len(named)} gaps, and {layers - base_layers} layers are to be added; leave out "
            "--factor and --layers to fill just these"
        )
    while len(outputs) < layers:
        gaps = len(outputs) - 1
        count = min(layers - len(outputs), gaps)
        chosen = set(named if named is not None else choose_gaps(position, count, gaps))
        grown: list[Old | New] = []
        next_id = max(output.id for output in outputs) + 1
        for index, output in enumerate(outputs):
            grown.append(output)
            if index in chosen:
                grown.append(New(next_id, output.id, outputs[index + 1].id))
                next_id += 1
        outputs = grown
    return Plan(base_layers, tuple(outputs))


def after_groups(base_layers: int, layers: int) -> Plan:
    """LLaMA Pro: layers split into as many groups as layers are added, a new one after each group's last layer.

    Where L is divisible by T-L these are the released script's positions, (i+1) mod (L/(T-L)) = 0; elsewhere the groups
    differ by one layer, and with more groups than layers a layer is followed by several.
    """
    added = layers - base_layers
    ends = [-(-(group + 1) * base_layers // added) - 1 for group in range(added)]
    outputs: list[Old | New] = []
    next_id = base_layers
    for index in range(base_layers):
        outputs.append(Old(index))
        for _ in range(ends.count(index)):
            outputs.append(New(next_id, index, index + 1 if index + 1 < base_layers else None))
            next_id += 1
    return Plan(base_layers, tuple(outputs))


def stacked(base_layers: int, layers: int) -> Plan:
    """SOLAR: the first ⌈T/2⌉ layers, then the last ⌊T/2⌋. Layers that come a second time are new layers, copies.

    Raises: UserError if that is more than twice the base.
    """
    if layers > 2 * base_layers:
        raise UserError(
            f"solar: {layers} layers are more than twice the base's {base_layers}; two stacks cannot give them"
        )
    first, second = (layers + 1) // 2, layers // 2
    outputs: list[Old | New] = [Old(i) for i in range(first)]
    next_id = base_layers
    for index in range(base_layers - second, base_layers):
        if index < first:
            outputs.append(New(next_id, index, None))
            next_id += 1
        else:
            outputs.append(Old(index))
    return Plan(base_layers, tuple(outputs))
