"""A study: the same comparison on several bases, and what they say together.

Decides
- A base is a checkpoint that is there, or a model that the study pre-trains first, on text of its own.
- Within a base two arms are compared seed by seed (`lesa_ray.comparison.statistics.paired`). Over bases, which may be
  as different as code and prose, a base counts once: an arm is better than another only if it is so on every base, by
  more than the 95 % interval over the seeds. What is less than that is called not told apart.
- The best method is the one with the lowest mean difference to the best control; with it stand all arms, controls too,
  that it does not beat so. Sums of wins would let one base with small noise outvote the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from pydantic import Field, ValidationError, model_validator

from lesa_ray.comparison.arms import arms_of
from lesa_ray.comparison.settings import ComparisonConfig
from lesa_ray.comparison.statistics import finals, paired
from lesa_ray.config import Settings, Several
from lesa_ray.errors import UserError
from lesa_ray.fleet.settings import Label

_OF_THE_STUDY = ("name", "store", "base", "data", "blocks", "tokenizer", "tokenize")
_OF_A_BASE = ("checkpoint", "architecture", "data", "out")


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
        if one.pretrain.get("eval_rows") == 0:
            raise ValueError("compare.pretrain.eval_rows: 0 leaves nothing to compare")
        return self

    def comparison(self, base: StudyBase, checkpoint: str, store: str, blocks: str | None) -> ComparisonConfig:
        """The comparison on one base."""
        data: dict[str, Any] = {"blocks": blocks}
        if blocks is None:
            data = {"data": base.data, "tokenizer": base.tokenizer, "tokenize": self.tokenize}
        given = {**self.compare, "name": f"{self.name}-{base.name}", "store": store, "base": checkpoint, **data}
        return ComparisonConfig.model_validate(given)


@dataclass(frozen=True)
class OnBase:
    """One arm on one base, beside the yardstick; losses in nats a token."""

    before: float | None
    """Held-out loss right after expansion, less the base's own; mean over seeds."""
    difference: float
    """Final held-out loss less the yardstick's; mean over seeds."""
    half: float | None
    """Half of the 95 % interval of `difference`; None with one seed."""
    seeds: int


@dataclass(frozen=True)
class ArmSummary:
    """One arm over all bases."""

    name: str
    control: bool
    difference: float
    """Mean over bases of the differences to the yardstick."""
    bases: dict[str, OnBase]


@dataclass(frozen=True)
class Verdict:
    """What the bases say together."""

    yardstick: str
    """The control with the lowest mean final loss over the bases."""
    arms: tuple[ArmSummary, ...]
    """Those with results on every base, with a seed that the yardstick has, too; the best first."""
    best: str | None
    """The method with the lowest mean difference; None where none has results on every base."""
    alike: tuple[str, ...]
    """Arms, controls among them, that it does not beat on every base by more than the interval over seeds."""
    incomplete: tuple[str, ...]
    """Arms that lack results on some base."""


Finals = dict[str, dict[int, float]]
"""Arm → seed → final held-out loss."""


def verdict(comparisons: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """comparisons: base → the content of its `comparison.json`. Raises: UserError where no control is complete."""
    losses = {base: {arm["name"]: finals(arm) for arm in content["arms"]} for base, content in comparisons.items()}
    names = list(dict.fromkeys(arm["name"] for content in comparisons.values() for arm in content["arms"]))
    controls = {arm["name"] for content in comparisons.values() for arm in content["arms"] if arm["control"]}
    complete = [name for name in names if all(of_base.get(name) for of_base in losses.values())]
    means = {name: fmean(fmean(of_base[name].values()) for of_base in losses.values()) for name in complete}
    there = sorted((name for name in complete if name in controls), key=means.__getitem__)
    if not there:
        raise UserError("no control has results on every base, so there is nothing to measure the arms by")
    yardstick = there[0]
    complete = [n for n in complete if all(of[n].keys() & of[yardstick].keys() for of in losses.values())]
    arms = []
    for name in complete:
        on = {base: _on_base(comparisons[base], of[name], of[yardstick], name) for base, of in losses.items()}
        arms.append(ArmSummary(name, name in controls, fmean(one.difference for one in on.values()), on))
    arms.sort(key=lambda arm: arm.difference)
    best = next((arm.name for arm in arms if not arm.control), None)
    alike = [] if best is None else [n.name for n in arms if n.name != best and not beats(losses, best, n.name)]
    return Verdict(yardstick, tuple(arms), best, tuple(alike), tuple(n for n in names if n not in complete))


def beats(losses: Mapping[str, Finals], one: str, other: str) -> bool:
    """Whether an arm ends below another on every base, by more than the 95 % interval over the seeds."""
    found = [paired(of[one], of[other]) for of in losses.values()]
    return all(difference is not None and difference.clear and difference.mean < 0 for difference in found)


def _on_base(content: Mapping[str, Any], mine: Mapping[int, float], others: Mapping[int, float], name: str) -> OnBase:
    found = paired(mine, others)
    assert found is not None, "they have a seed in common"
    runs = next(arm["runs"] for arm in content["arms"] if arm["name"] == name)
    starts = [run["loss_before"] for run in runs if run["loss_before"] is not None]
    base = content["base"]["loss"]
    before = fmean(starts) - base if starts and base is not None else None
    return OnBase(before, found.mean, found.half, found.n)


def reading(found: Verdict) -> list[str]:
    """What the figures say, a line each."""
    if found.best is None:
        return ["No method has results on every base yet."]
    best = next(arm for arm in found.arms if arm.name == found.best)
    many = len(best.bases)
    lines = [
        f"{best.name} ends lowest of the methods, {best.difference:+.4f} nats from the best control, "
        f"{found.yardstick}, in the mean over {many} {'base' if many == 1 else 'bases'}."
    ]
    names = {arm.name: arm.control for arm in found.arms}
    alike = [name for name in found.alike if not names[name]]
    controls = [name for name in found.alike if names[name]]
    lines.append(f"Methods not told apart from it on every base: {', '.join(alike) or 'none'}.")
    lines.append(f"Controls that it does not beat on every base: {', '.join(controls) or 'none'}.")
    if found.incomplete:
        lines.append(f"Without results on every base: {', '.join(found.incomplete)}.")
    return lines


def to_json(
    config: StudyConfig,
    comparisons: Mapping[str, Mapping[str, Any]],
    places: Mapping[str, str],
    missing: Sequence[str],
) -> dict[str, Any]:
    """Everything, as it is written to results.json. places: base → where its comparison lies; missing: what of it
    failed, a line each."""
    found = verdict(comparisons)
    return {
        "kind": "study",
        "settings": config.model_dump(mode="json"),
        "comparisons": dict(places),
        "machine": next(iter(comparisons.values()))["machine"],
        "verdict": asdict(found),
        "reading": reading(found),
        "missing": list(missing),
    }
