"""From a profile and a budget to the sizes of every layer.

Decides
- One number is solved for: the scale of β. Widths only grow with it, so it is found by bisection on the whole range in
  which any width changes. α stays as the profile has it, since query heads come in steps of the KV heads, too coarse
  to meet a budget with; so does the frame of a framed profile, which is absolute.
- The total must come within half a per cent. The coarser the multiple of the widths, the less can be met, least of all
  where all layers are alike and step together; so unless a multiple is given it is the largest power of two, 256 at
  most, that meets the budget (below 8 for toys alone).
"""

from __future__ import annotations

from dataclasses import dataclass

from lesa_ray.errors import UserError
from lesa_ray.layerwise.profiles import FRAME_ALPHA, FRAME_BETA, Profile, make_divisible, multipliers, query_heads

TOLERANCE = 0.005
MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
_BISECTIONS = 60
"""Halvings of the scale's range: below the spacing of float64."""


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, layer by layer. Without biases, as Llama."""

    d_model: int
    head_dim: int
    vocab_size: int
    tied: bool
    widths: tuple[int, ...]
    """FFN neurons."""
    heads: tuple[int, ...]
    """Query heads."""
    kv_heads: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.widths)

    @property
    def embedding_parameters(self) -> int:
        """Embedding, head where it is not tied, and the last norm."""
        return (1 if self.tied else 2) * self.vocab_size * self.d_model + self.d_model

    def ffn_parameters(self, layer: int) -> int:
        """Gate, up and down projection."""
        return 3 * self.d_model * self.widths[layer]

    def attention_parameters(self, layer: int) -> int:
        """Query, key, value and output projection."""
        return 2 * self.d_model * self.head_dim * (self.heads[layer] + self.kv_heads[layer])

    def layer_parameters(self, layer: int) -> int:
        """With the two norms."""
        return self.ffn_parameters(layer) + self.attention_parameters(layer) + 2 * self.d_model

    @property
    def attention_share(self) -> float:
        """Of the parameters of all layers, norms left out."""
        attention, ffn = (sum(map(of, range(self.layers))) for of in (self.attention_parameters, self.ffn_parameters))
        return attention / (attention + ffn)

    @property
    def parameters(self) -> int:
        return self.embedding_parameters + sum(self.layer_parameters(layer) for layer in range(self.layers))


@dataclass(frozen=True)
class Frame:
    """What is decided before the scale: everything but the FFN widths."""

    profile: Profile
    layers: int
    d_model: int
    head_dim: int
    kv_heads: int
    vocab_size: int
    tied: bool

    def sizes(self, scale: float, multiple: int) -> Sizes:
        """The model at a scale of β."""
        beta = multipliers(self.profile.beta, self.layers)
        scaled = [value * scale for value in beta]
        if self.profile.framed:
            scaled[0] = scaled[-1] = FRAME_BETA
        alpha = multipliers(self.profile.alpha, self.layers, FRAME_ALPHA if self.profile.framed else None)
        return Sizes(
            d_model=self.d_model,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            tied=self.tied,
            widths=tuple(make_divisible(value * self.d_model, multiple) for value in scaled),
            heads=tuple(query_heads(alpha, self.d_model, self.head_dim, self.kv_heads)),
            kv_heads=(self.kv_heads,) * self.layers,
        )


@dataclass(frozen=True)
class Solved:
    """The sizes that meet the budget, and how."""

    sizes: Sizes
    scale: float
    """Of β; 1: the profile's own."""
    multiple: int
    """Of FFN widths."""


def check_frame(frame: Frame) -> None:
    """Raises: UserError for sizes that make no model."""
    profile = frame.profile
    for name, knots, whole in (("beta", profile.beta, FRAME_BETA), ("alpha", profile.alpha, FRAME_ALPHA)):
        if not 1 <= len(knots) <= 3:
            raise UserError(f"{name} {_list(knots)}: give one value, two (bottom, top) or three (bottom, middle, top)")
        what = "widths" if name == "beta" else "numbers of heads"
        if min(knots) <= 0:
            raise UserError(f"{name} {_list(knots)}: gives layers {what} of zero or below; give values above 0")
        if len(knots) == 3 and frame.layers < 3:
            raise UserError(f"{name} {_list(knots)}: three knots need three layers, there are {frame.layers}")
        if min(multipliers(knots, frame.layers, whole if profile.framed else None)) == 0:
            raise UserError(
                f"{name} {_list(knots)}: is rounded to two decimals and gives layers {what} of zero; give larger values"
            )
    if profile.framed and frame.layers < 3:
        raise UserError(f"layers {frame.layers}: a framed profile needs three, its first and last are fixed")
    if frame.d_model % frame.head_dim:
        raise UserError(
            f"d_model {frame.d_model}: is no whole number of heads of {frame.head_dim} (head_dim); change one of them"
        )
    if frame.head_dim % 2:
        raise UserError(f"head_dim {frame.head_dim}: rotary embeddings need an even one")
    full = frame.d_model // frame.head_dim
    if full % frame.kv_heads:
        raise UserError(
            f"kv_heads {frame.kv_heads}: do not divide the {full} heads of a whole layer (d_model {frame.d_model} / "
            f"head_dim {frame.head_dim}); give one of {', '.join(str(n) for n in range(1, full + 1) if full % n == 0)}"
        )


def solve(frame: Frame, parameters: int | None, multiple: int | None) -> Solved:
    """Sizes of about so many parameters; None: the profile's own.

    Raises: UserError if the sizes make no model, or none meets the budget within `TOLERANCE`."""
    check_frame(frame)
    if parameters is None:
        step = multiple or MULTIPLES[0]
        return Solved(frame.sizes(1.0, step), 1.0, step)
    found = [_nearest(frame, parameters, step) for step in ((multiple,) if multiple else MULTIPLES)]
    for solved in found:
        if abs(solved.sizes.parameters - parameters) <= TOLERANCE * parameters:
            return solved
    best = min(found, key=lambda solved: abs(solved.sizes.parameters - parameters))
    least = frame.sizes(0.0, best.multiple)
    if least.parameters > parameters:
        fixed = least.parameters - sum(least.ffn_parameters(layer) for layer in range(least.layers))
        raise UserError(
            f"params {parameters:,}: too few for {frame.layers} layers of d_model {frame.d_model} and a vocabulary of "
            f"{frame.vocab_size:,}: {fixed:,} without any FFN, {least.parameters:,} at the least; give more, or fewer "
            "layers, a smaller d_model or vocabulary"
        )
    raise UserError(
        f"params {parameters:,}: the nearest with widths that are multiples of {best.multiple} has "
        f"{best.sizes.parameters:,}, {100 * (best.sizes.parameters / parameters - 1):+.1f} %, more than "
        f"{100 * TOLERANCE:g} % off; give a smaller multiple, or other params"
    )


def _nearest(frame: Frame, parameters: int, multiple: int) -> Solved:
    """Of the models at any scale the one nearest to the budget; of two as near the smaller."""
    low, high = 0.0, 1.0
    while frame.sizes(high, multiple).parameters < parameters:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if frame.sizes(middle, multiple).parameters < parameters:
            low = middle
        else:
            high = middle
    below, above = (Solved(frame.sizes(scale, multiple), scale, multiple) for scale in (low, high))
    nearer_below = parameters - below.sizes.parameters <= above.sizes.parameters - parameters
    return below if nearer_below else above


def _list(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
