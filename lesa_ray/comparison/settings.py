"""What a comparison is: one base, ways to grow it (arms), the same data and the same number of tokens for all.

Decides
- Settings under `expand` and `pretrain` hold for every arm; an arm has its own on top. What would make arms unequal by
  accident (steps, epochs, seeds, which data) cannot be set for one arm.
- A list in an arm multiplies, wherever it stands: `position: [top, uniform]` with `method: [lesa, copy]` is four arms.
  A setting that is itself a list stands in another list.
- Controls are in every comparison unless they are left out by name. On small models random weights with zero output
  projections did as well as any published start, and a base that is simply trained on as well as most: a comparison
  that does not show them shows little.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from lesa_ray.config import Seed, Settings, Several
from lesa_ray.fleet.settings import GraphConfig


def _nothing_given(value: object) -> object:
    """`tokenize:` with nothing behind it has no settings of its own."""
    return {} if value is None else value


def _one_arm(value: object) -> object:
    """One arm, or one grid of them, may be given as it is."""
    return (value,) if isinstance(value, dict) else value


StageOptions = Annotated[dict[str, Any], BeforeValidator(_nothing_given)]

_OF_THE_COMPARISON = {
    "expand": ("method", "seed"),
    "pretrain": ("steps", "tokens", "epochs", "seed", "eval_every"),
    "finetune": ("seed",),
    "evaluate": ("tasks",),
}
"""Settings of a stage that the comparison itself gives."""


class Controls(Settings):
    """Which controls there are. They follow the reference: its factor and its positions, where they add layers."""

    base_same_tokens: bool = True
    """`base, same tokens`: the base, all of it trained on, on as many tokens as every arm."""
    base_same_compute: bool = True
    """`base, same compute`: the same for as many training FLOPs as the reference takes."""
    random_zero_output: bool = True
    """`random, zero output projections`: new layers of random weights that begin by writing nothing."""
    plain_copies: bool = True
    """`copy`: new layers that are copies of their lower neighbours."""


class ComparisonConfig(GraphConfig):
    """A comparison of ways to grow one base."""

    what: ClassVar[str] = "comparison"

    base: str
    """The checkpoint to grow: a folder, a Hugging Face repo id or an fsspec URL."""
    data: Several = ()
    """Text to train on, as `lesa-ray tokenize` takes it; or:"""
    blocks: str | None = None
    """Token blocks that are there already."""
    tokenizer: str | None = None
    """Whose tokens the text becomes; by default the base's."""
    tokens: int = Field(ge=1)
    """Tokens every arm is trained on (rounded up to whole steps)."""
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1)
    """Each arm is run once for each seed: that of the expansion and of the order of the data."""
    arms: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_one_arm)] = Field(min_length=1)
    """Ways to grow the base. Each: `method`, any other setting of `lesa-ray expand`, `train` (what is trained; by
    default what the method's paper trains), `pretrain` (settings of training that differ), `label` (what it is called;
    by default its method and settings). A list of values is an arm for each. `method: base` is the base itself, trained
    on: a control with a `pretrain` of its own, as the learning rate that suits new layers may not suit it."""
    controls: Controls = Controls()
    """Controls, each of which is there unless it is false."""
    reference: str | None = None
    """The arm (by name) whose final loss the others are measured by, and whose compute the control gets. By default the
    first arm."""
    losses: tuple[float, ...] = ()
    """Held-out losses for which it is told when each run reached them. By default what the best control and
    each method ended at with the same seed."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between measurements of the held-out loss. By default a twentieth of the run."""
    tasks: Several = ()
    """Tasks of lm-evaluation-harness, on the base and on what every run ends with."""
    tokenize: StageOptions = Field(default_factory=dict)
    """Settings of `lesa-ray tokenize`."""
    expand: StageOptions = Field(default_factory=dict)
    """Settings of `lesa-ray expand` for all arms."""
    pretrain: StageOptions = Field(default_factory=dict)
    """Settings of `lesa-ray pretrain` for all arms."""
    finetune: dict[str, Any] | None = None
    """Settings of `lesa-ray finetune`, `data` among them: every run is fine-tuned afterwards. By default none is."""
    evaluate: StageOptions = Field(default_factory=dict)
    """Settings of `lesa-ray evaluate` for the tasks."""

    @model_validator(mode="after")
    def _consistent(self) -> ComparisonConfig:
        if bool(self.data) == (self.blocks is not None):
            raise ValueError("give data (text) or blocks (token blocks), one of the two")
        if self.blocks is not None and (self.tokenize or self.tokenizer):
            raise ValueError("blocks: are tokenized already; leave out tokenize and tokenizer")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is there twice")
        for stage, names in _OF_THE_COMPARISON.items():
            given = getattr(self, stage) or {}
            if taken := [name for name in names if name in given]:
                raise ValueError(f"{stage}.{taken[0]}: is given by the comparison itself; {_INSTEAD[taken[0]]}")
        if self.pretrain.get("eval_rows") in (0, "0"):
            raise ValueError("pretrain.eval_rows: 0 leaves nothing to compare")
        if self.evaluate and not self.tasks:
            raise ValueError("evaluate: is for tasks, and none is named; name `tasks`, or leave it out")
        return self


_INSTEAD = {
    "method": "name it in `arms`",
    "seed": "name `seeds` beside it",
    "steps": "name `tokens` beside it",
    "tokens": "name it beside it",
    "epochs": "name `tokens` beside it",
    "eval_every": "name it beside it",
    "tasks": "name them beside it",
}
