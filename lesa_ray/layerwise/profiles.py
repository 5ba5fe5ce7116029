"""Profiles: how wide the layers of a model are from the bottom to the top.

Layer i has β_i · d_model FFN neurons and α_i · d_model / d_head query heads. A profile gives β and α at two or three
knots and is linear between them:

    isotropic   all layers alike
    vanilla     narrow at the bottom, wide at the top (OpenELM, arXiv 2404.14619, section 2.1)
    framed      vanilla, but the first and the last layer are whole: β 4, α 1
    reverse     framed, wide at the bottom
    crown       framed, widest in the middle

The last three are from "Crown, Frame, Reverse" (arXiv 2509.06518; code: github.com/baroian/OLMo-custom), as are the
values: those of the code's configs/*.yaml, which are its 18-layer models. OpenELM's own are β 0.5 → 4, α 0.5 → 1.

Decides
- Three knots at an even depth: the middle one is held over both middle layers, ⌈L/2⌉−1 and ⌈L/2⌉, as the code does.
- Rounding is CoreNet's, which OpenELM and that code share: to the nearest multiple, the next one where that loses a
  tenth or more, never below one multiple. With two knots β and α are rounded to two decimals first, as there; it is
  what makes the published parameter counts come out.
- In the paper's text KV heads are fixed and query heads a multiple of them. In its code there is one KV head for every
  three query heads, and the published counts are the code's: `Preset` has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lesa_ray.config import Recipe

ProfileName = Literal["vanilla", "framed", "reverse", "crown", "isotropic"]


@dataclass(frozen=True)
class Profile:
    """Multipliers at the knots, from the bottom to the top; one value: the same for all layers."""

    beta: tuple[float, ...]
    """FFN neurons over d_model."""
    alpha: tuple[float, ...]
    """Query heads over d_model / d_head."""
    framed: bool = False
    """Whether the first and the last layer are whole (`FRAME_BETA`, `FRAME_ALPHA`) whatever the knots say."""


FRAME_BETA, FRAME_ALPHA = 4.0, 1.0  # layer_freeze in the code's model.py

PROFILES: dict[ProfileName, Profile] = {
    "vanilla": Profile((1.0, 4.0), (0.5, 1.0)),  # LWS18L.yaml
    "framed": Profile((0.5, 4.0), (0.5, 1.0), framed=True),  # LWS_freeze.yaml
    "reverse": Profile((4.0, 0.5), (1.0, 0.5), framed=True),  # ReverseLWS.yaml
    "crown": Profile((0.5, 3.8, 0.5), (0.5, 1.0, 0.5), framed=True),  # autoencoder.yaml
    "isotropic": Profile((2.5,), (0.75,)),  # base18L.yaml
}


@dataclass(frozen=True)
class Preset:
    """One of the paper's models. d_model 768, heads of 64, 50,304 tokens, untied, in all of them."""

    profile: Profile
    layers: int
    d_model: int = 768
    head_dim: int = 64
    vocab_size: int = 50_304
    kv_heads: int = 4
    """The paper's text."""
    queries_per_kv: int = 3
    """Its code: n_heads // n_kv_heads, 12 // 4."""
    multiple: int = 256
    """Of FFN widths (dim_devisor)."""

    def heads(self, recipe: Recipe) -> tuple[list[int], list[int]]:
        """Query and KV heads of each layer, by the paper's text or by its code."""
        alpha = multipliers(self.profile.alpha, self.layers, FRAME_ALPHA if self.profile.framed else None)
        step = self.kv_heads if recipe == "paper" else self.queries_per_kv
        heads = query_heads(alpha, self.d_model, self.head_dim, step)
        if recipe == "paper":
            return heads, [self.kv_heads] * self.layers
        return heads, [count // self.queries_per_kv for count in heads]

    def widths(self) -> list[int]:
        """FFN width of each layer."""
        beta = multipliers(self.profile.beta, self.layers, FRAME_BETA if self.profile.framed else None)
        return [make_divisible(value * self.d_model, self.multiple) for value in beta]


PRESETS: dict[str, Preset] = {
    "isotropic-12": Preset(Profile((4.0,), (1.0,)), 12),  # base12L.yaml
    **{f"{name}-18": Preset(profile, 18) for name, profile in PROFILES.items()},
}
"""By name. Parameters as published, which are those of the code: 181.1, and with 18 layers vanilla 179.7, framed and
reverse 179.3, crown 181.9, isotropic 183.5 million (its norms of queries and keys, at most 0.02 million, left out)."""


def multipliers(knots: Sequence[float], layers: int, frame: float | None = None) -> list[float]:
    """The multiplier of each layer by linear interpolation between knots; one, two or three of them.

    frame: what the first and the last layer get instead."""
    if len(knots) == 1:
        values = [float(knots[0])] * layers
    elif len(knots) == 2:
        start, end = knots
        step = (end - start) / max(layers - 1, 1)
        values = [round(start + step * index, 2) for index in range(layers)]
    else:
        start, middle, end = knots
        below, above = (layers + 1) // 2 - 1, layers // 2  # the same layer at an odd depth
        rise, fall = (middle - start) / max(below, 1), (end - middle) / max(layers - 1 - above, 1)
        values = [start + rise * i if i <= below else middle + fall * max(i - above, 0) for i in range(layers)]
    if frame is not None:
        values[0] = values[-1] = frame
    return values


def make_divisible(value: float, multiple: int) -> int:
    """The nearest multiple; the next one where that is a tenth or more below `value`; at least one multiple.

    CoreNet's `make_divisible` in the words of the paper's code (olmo_core/nn/transformer/model.py)."""
    if value < multiple:
        return multiple
    rounded = int(value + multiple / 2) // multiple * multiple
    return rounded + multiple if rounded <= 0.9 * value else rounded


def query_heads(alpha: Sequence[float], d_model: int, head_dim: int, step: int) -> list[int]:
    """Query heads of each layer, multiples of `step`."""
    return [make_divisible(d_model * value, step * head_dim) // head_dim for value in alpha]
