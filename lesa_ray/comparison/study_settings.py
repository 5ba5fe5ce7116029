"""What a study is: the same comparison on several bases.

A base is a checkpoint that is there, or a model that the study pre-trains first, on text of its own. What the bases say
together is `lesa_ray.comparison.verdict`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError, model_validator

from lesa_ray.comparison.arms import arms_of
from lesa_ray.comparison.settings import ComparisonConfig
from lesa_ray.config import Settings, Several
from lesa_ray.errors import UserError
from lesa_ray.fleet.settings import Label

_OF_THE_STUDY = ("name", "store", "base", "data", "blocks", "tokenizer", "tokenize")
_OF_A_BASE = ("checkpoint", "architecture", "data", "out")
BASE_SEED = 10_000
"""Of bases' own training where the study names none. It does not follow from the seeds of the arms: with one more of
those the bases are the same."""


class StudyBase(Settings):
    """One base of a study, and the text on which it is grown."""

    name: Label
    """A label; the base's comparison is called after it."""
    checkpoint: str | None = None
    """A checkpoint that is there: a folder, a Hugging Face repo id or an fsspec URL. Or:"""
    architecture: dict[str, Any] | None = None
    """The content of a config.json, whose model is pre-trained first; without `vocab_size`, that of the data."""
    corpus: Several = ()
    """Text that every machine has: code, prose or packages (`pipelines.corpus`), with a tokenizer of its own. Or:"""
    data: Several = ()
    """Text as `lesa-ray tokenize` takes it."""
    tokenizer: str | None = None
    """Whose tokens `data` becomes; by default the checkpoint's."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Settings of its pre-training, on top of the study's."""

    @model_validator(mode="after")
    def _sound(self) -> StudyBase:
        if (self.checkpoint is None) == (self.architecture is None):
            raise ValueError(f"{self.name}: give checkpoint or architecture, one of the two")
        if bool(self.corpus) == bool(self.data):
            raise ValueError(f"{self.name}: give corpus or data, one of the two")
        if self.checkpoint is not None and (self.corpus or self.train):
            raise ValueError(f"{self.name}: corpus and train are for a base that is pre-trained here; name its data")
        if self.corpus and self.tokenizer is not None:
            raise ValueError(f"{self.name}: tokenizer: a corpus has one of its own; leave it out")
        if self.architecture is not None and self.data and self.tokenizer is None:
            raise ValueError(f"{self.name}: tokenizer: a model that is pre-trained here has none of its own; name one")
        return self


class StudyConfig(Settings):
    """Bases, how those are made that are not there yet, and what is compared on each."""

    name: Label
    """A label."""
    out: str
    """Folder for bases and their data, results.json, and the artifact store unless `store` names another."""
    store: str | None = None
    """The artifact store of the comparisons: a folder or an fsspec URL."""
    bases: tuple[StudyBase, ...] = Field(min_length=1)
    tokenize: dict[str, Any] = Field(default_factory=dict)
    """Settings of `lesa-ray tokenize`."""
    vocab_size: int = Field(default=4096, ge=300)
    """Entries of the vocabulary of a `corpus`."""
    train: dict[str, Any] = Field(default_factory=dict)
    """How bases are pre-trained: settings of `lesa-ray pretrain`."""
    compare: dict[str, Any]
    """What is compared on every base: settings of `lesa-ray compare`."""

    @model_validator(mode="after")
    def _sound(self) -> StudyConfig:
        names = [base.name for base in self.bases]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"bases: {twice[0]} is there twice")
        if own := [name for name in _OF_THE_STUDY if name in self.compare]:
            raise ValueError(f"compare.{own[0]}: the study gives it")
        for what, given in (("train", self.train), *((f"bases.{b.name}.train", b.train) for b in self.bases)):
            if own := [name for name in _OF_A_BASE if name in given]:
                raise ValueError(f"{what}.{own[0]}: the study gives it")
        for base in self.bases:
            try:
                one = self.comparison(base, "b", "s", "b")
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in ("compare", *first["loc"]))
                raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        try:
            arms = [arm for found in arms_of(one, "compare") for arm in found]
        except UserError as error:
            raise ValueError(str(error)) from None
        if not any(arm.control for arm in arms):
            raise ValueError("compare.controls: none is left, and arms are measured by the best of them")
        for name in ("train", "vocab_size"):
            if name in self.model_fields_set and all(base.architecture is None for base in self.bases):
                raise ValueError(f"{name}: is for bases that are pre-trained here, and none is; leave it out")
        for base in self.bases:
            seed = self.seed_of(base)
            if base.architecture is not None and seed in one.seeds:
                raise ValueError(
                    f"train.seed {seed}: is among compare.seeds, so runs would begin with the rows that the base began "
                    "with; give another"
                )
        return self

    def seed_of(self, base: StudyBase) -> Any:
        """Of a base's own training, an order of the rows that none of the arms has."""
        return {"seed": BASE_SEED, **self.train, **base.train}["seed"]

    def comparison(self, base: StudyBase, checkpoint: str, store: str, blocks: str | None) -> ComparisonConfig:
        """The comparison on one base."""
        data: dict[str, Any] = {"blocks": blocks}
        if blocks is None:
            data = {"data": base.data, "tokenizer": base.tokenizer, "tokenize": self.tokenize}
        given = {**self.compare, "name": f"{self.name}-{base.name}", "store": store, "base": checkpoint, **data}
        return ComparisonConfig.model_validate(given)
