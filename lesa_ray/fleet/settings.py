"""What a fleet is: families of checkpoints, the methods and factors to grow them by, and what is done with each; and
what it has in common with whatever else is made of stages on one cluster (`GraphConfig`).

Settings of a stage are those of its command, less what the graph itself knows (where inputs lie and outputs go). A
family may have its own on top: 70 billion parameters want more workers than one and a half.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lesa_ray.config import Settings, Several
from lesa_ray.store.identity import checked_label
from lesa_ray.store.lease import TERM_SECONDS

StageName = Literal["tokenize", "expand", "pretrain", "finetune", "evaluate"]


def _filled(value: object) -> object:
    """`evaluate:` with nothing behind it is a stage without settings of its own."""
    return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value


StageSettings = Annotated[dict[StageName, dict[str, Any]], BeforeValidator(_filled)]
Label = Annotated[str, AfterValidator(partial(checked_label, what="name"))]


class Amount(Settings):
    """What a stage is reckoned to take of the cluster while it runs."""

    cpus: float = Field(default=0.0, ge=0)
    """CPU cores."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs."""


class Family(Settings):
    """A checkpoint to grow, and the text for it."""

    name: Label
    """A label: letters, digits and . _ -; part of every place of the family's results."""
    checkpoint: str
    """A folder, a Hugging Face repo id or an fsspec URL."""
    tokenizer: str | None = None
    """Whose tokens the text becomes; by default the checkpoint's."""
    data: Several = ()
    """What is tokenized: as `lesa-ray tokenize` takes it."""
    stages: StageSettings = Field(default_factory=dict)
    """Settings of stages for this family alone, on top of the fleet's."""
    resources: dict[StageName, Amount] = Field(default_factory=dict)
    """What a stage of this family is reckoned to take, in place of the fleet's."""


class GraphConfig(Settings):
    """Stages that are made on one cluster: where they lie, and how they share it."""

    what: ClassVar[str]
    """What messages call it."""

    name: Label
    """A label; its standing is found by it."""
    store: str
    """The artifact store: a folder or an fsspec URL."""
    resources: dict[StageName, Amount] = Field(default_factory=dict)
    """What a stage of a kind is reckoned to take. By default what its settings ask Ray for."""
    budget: Amount | None = None
    """What all stages together may be reckoned to take. By default what the cluster has at the moment: give the most it
    may grow to where it grows by itself."""
    at_once: int = Field(default=8, ge=1)
    """Most stages at a time; each has a process of about 0.7 GB on one of the machines beside its tasks."""
    retries: int = Field(default=2, ge=0)
    """How often a stage is started again after a fault of the machine."""
    lease: float = Field(default=TERM_SECONDS, ge=1)
    """Seconds after which another process may take up what this one was working on when it died."""


class FleetConfig(GraphConfig):
    """A fleet: every family grown by every method and factor, trained, tuned and measured."""

    what: ClassVar[str] = "fleet"

    families: tuple[Family, ...] = Field(min_length=1)
    """A list of checkpoints to grow, each with its text."""
    methods: Several = Field(default=("lesa",), min_length=1)
    """How to grow them, as `lesa-ray expand --method` takes it."""
    factors: tuple[Annotated[float, Field(gt=1, le=64)], ...] = Field(default=(1.5,), min_length=1)
    """Layers afterwards over layers before; `factor` names a single one."""
    stages: StageSettings = Field(min_length=1)
    """Which stages there are, and their settings. tokenize(family) and expand(family, method, factor) come first, then
    pretrain, finetune and evaluate, each on what the last made."""

    @model_validator(mode="before")
    @classmethod
    def _one_factor(cls, data: object) -> object:
        if isinstance(data, dict) and "factor" in data:
            if "factors" in data:
                raise ValueError("give factor or factors, not both")
            data = {**data, "factors": (data["factor"],)}
            del data["factor"]
        return data

    @model_validator(mode="after")
    def _consistent(self) -> FleetConfig:
        names = [family.name for family in self.families]
        for what, values in (("family", names), ("method", self.methods), ("factor", self.factors)):
            if len(set(values)) < len(values):
                raise ValueError(f"{what} {next(v for v in values if list(values).count(v) > 1)}: is there twice")
        for family in self.families:
            if unknown := sorted(set(family.stages) - set(self.stages)):
                raise ValueError(f"family {family.name}: has settings of {unknown[0]}, which is no stage of the fleet")
            if "tokenize" in self.stages and not family.data:
                raise ValueError(f"family {family.name}: data is missing; the fleet has a stage tokenize")
        if "pretrain" in self.stages and "tokenize" not in self.stages:
            raise ValueError("stages: pretrain needs tokenize")
        return self


def absolute(place: str) -> str:
    """A local path made absolute, since stages run on other machines and in other folders; else as it is."""
    if "://" in place or not (os.path.exists(place) or place.startswith((".", "/", "~")) or "*" in place):
        return place
    return os.path.abspath(os.path.expanduser(place))
