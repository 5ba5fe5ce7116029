"""A comparison's stages as a graph, with all that is known of its arms before anything runs.

    tokenize ────────────────────┬───────────────────────────────┐
    expand(arm, seed) ──▶ pretrain(arm, seed) ──▶ finetune ──▶ evaluate (tasks), beside the base itself

Every arm's settings are tried on the base's headers, so that a wrong one is found at once. A control that the base
cannot have is left out, and that is said; an arm of the file that it cannot have is an error. Arms that are alike share
their stages: the expansions of a method that draws no random numbers are one for all seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from lesa_ray.comparison.arms import Arm, arms_of, expand_settings, for_base, position_of, reference_of
from lesa_ray.comparison.facts import FactFinder, Facts
from lesa_ray.comparison.settings import ComparisonConfig
from lesa_ray.config import ExpandConfig, validated
from lesa_ray.errors import MachineError, UserError
from lesa_ray.expansion.registry import METHODS
from lesa_ray.fleet.settings import Amount
from lesa_ray.fleet.stages import Options, Source, Stage, StageBuilder, merged
from lesa_ray.store.identity import canonical
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.insertion import ramp_steps
from lesa_ray.training.tokens import open_blocks
from lesa_ray.training.train_settings import TrainConfig

_EVALUATIONS = 20
"""Points of a curve beside its first, where `eval_every` does not say."""
_NAME = 36
"""Characters of the comparison's name in the labels of its stages."""
_ANY_SEED = 0
"""Of expansions that draw nothing: one for every comparison, whatever its seeds."""


@dataclass(frozen=True)
class PlannedRun:
    """An arm with one seed: its stages, by id, in their order."""

    seed: int
    expand: str | None
    pretrain: str
    finetune: str | None
    evaluate: str | None

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(one for one in (self.expand, self.pretrain, self.finetune, self.evaluate) if one is not None)


@dataclass(frozen=True)
class PlannedArm:
    """An arm, what is known of it, and its runs. settings: what differs from the defaults."""

    arm: Arm
    facts: Facts
    position: str | None
    tokens: int
    inserted_tokens: int | None
    """Tokens until all its new layers are in, where they come in gradually; losses until then are the gated model's."""
    settings: dict[str, Any]
    runs: tuple[PlannedRun, ...]


@dataclass(frozen=True)
class Comparison:
    """A comparison before it runs."""

    config: ComparisonConfig
    file: str
    seq_len: int
    base: Facts
    arms: tuple[PlannedArm, ...]
    reference: str
    notes: tuple[str, ...]
    """What was left out, and why."""
    remarks: tuple[str, ...]
    """What one has to know of the plan to read the result."""
    stages: tuple[Stage, ...]
    tokenize: str | None
    """The stage of the data; None where token blocks were given."""
    base_evaluate: str | None
    """The stage of the base's own tasks."""


def build(config: ComparisonConfig, file: str) -> Comparison:
    """Everything about a comparison. Raises: UserError for the first setting that is wrong; MachineError."""
    with ThreadPoolExecutor(8) as pool:
        return _Builder(config, file, StageBuilder(config.what, pool)).comparison()


class _Builder:
    def __init__(self, config: ComparisonConfig, file: str, stages: StageBuilder) -> None:
        self._config, self._file, self._stages = config, file, stages
        self._where = f"comparison {file}"
        self._expanded: dict[bytes, Source] = {}
        self._base = stages.checkpoint(config.base)
        self._blocks, self._seq_len = self._data()

    def comparison(self) -> Comparison:
        config = self._config
        named, controls = arms_of(config, self._where)
        reference = reference_of(config, named, self._where)
        finder = FactFinder(self._base.given, self._seq_len)
        facts = {arm.name: self._facts(finder, arm) for arm in named}
        kept, notes = list(named), []
        for control in controls:
            try:
                facts[control.name] = self._facts(finder, control)
                kept.append(control)
            except UserError as error:
                notes.append(f"control {control.name}: left out: {str(error).removeprefix(f'{self._where}: ')}")
        planned = [self._plan(arm, facts) for arm in kept]
        base_tasks = None
        if config.tasks:
            base_tasks = self._stages.evaluate(self._label("base"), self._evaluation(), [self._base], None)
        stages = tuple(self._stages.finished())
        for stage in stages:
            if stage.problem is not None:
                raise (UserError if stage.wrong else MachineError)(f"{self._where}: {stage.problem}")
        tokenize = None if config.blocks is not None else _id(self._blocks)
        return Comparison(
            config, self._file, self._seq_len, finder.of_base(("all",)), tuple(planned), reference.name, tuple(notes),
            tuple(_remarks(planned)), stages, tokenize, _id(base_tasks),
        )  # fmt: skip

    def _data(self) -> tuple[Source, int]:
        """The token blocks, and the tokens of their rows."""
        config = self._config
        if config.blocks is not None:
            blocks = self._stages.blocks(config.blocks)
            return blocks, open_blocks(blocks.given).seq_len
        tokenizer = config.tokenizer or config.base
        source = self._stages.tokenize(self._label("data"), self._options("tokenize"), config.data, tokenizer)
        return source, int(config.tokenize.get("seq_len", TokenizeConfig.model_fields["seq_len"].default))

    def _facts(self, finder: FactFinder, arm: Arm) -> Facts:
        """Raises: UserError if the base cannot be grown or trained so."""
        training = self._train_config(arm, 1)
        if arm.method is None:
            return finder.of_base(training.train)
        where = f"{self._where}: arm {arm.name}"
        given = {**expand_settings(self._config, arm), "base": self._base.given, "out": "out"}
        return finder.of_expansion(validated(ExpandConfig, given, where), training, where)

    def _plan(self, arm: Arm, facts: Mapping[str, Facts]) -> PlannedArm:
        config, own = self._config, facts[arm.name]
        training = self._train_config(arm, 1)
        a_step = training.batch * self._seq_len
        steps = -(-config.tokens // a_step)
        if arm.compute_of is not None:
            steps = max(1, round(steps * facts[arm.compute_of].flops_per_token / own.flops_per_token))
        tokens = steps * a_step  # so that arms of equal length are the same, whatever their length follows from
        runs = tuple(self._run(arm, seed, tokens) for seed in config.seeds)
        position = None
        settings: dict[str, Any] = {}
        if arm.method is not None:
            grown = expand_settings(config, arm)
            position = position_of(arm.method, grown)
            given = validated(ExpandConfig, {**grown, "base": "base", "out": "out"}, self._where)
            settings = given.model_dump(
                mode="json", exclude={"base", "out", "method", "position", "seed"}, exclude_defaults=True
            )
        if arm.pretrain:
            settings["pretrain"] = dict(arm.pretrain)
        if arm.compute_of is not None:
            settings |= {"compute_of": arm.compute_of}
        inserted = ramp_steps(training, steps) * a_step or None
        return PlannedArm(arm, own, position, tokens, inserted, settings, runs)

    def _run(self, arm: Arm, seed: int, tokens: int) -> PlannedRun:
        config, last = self._config, self._base
        label = self._label(arm.slug, seed)
        expand = finetune = evaluate = None
        if arm.method is not None:
            last = expand = self._expand(arm, seed)
        train = self._train_config(arm, tokens)
        steps = -(-tokens // (train.batch * self._seq_len))
        every = config.eval_every or max(1, steps // _EVALUATIONS)
        more = Options(self._training(arm), f"{self._where}: pretrain", self._amount("pretrain"))
        last = pretrain = self._stages.pretrain(
            label, more, last, self._blocks, tokens=tokens, seed=seed, eval_every=every
        )
        if config.finetune is not None:
            options = self._options("finetune")
            if arm.method is None:  # there is nothing new in it
                options = replace(options, settings=for_base(options.settings))
            last = finetune = self._stages.finetune(label, options, last, seed=seed)
        if config.tasks:
            evaluate = self._stages.evaluate(label, self._evaluation(), [last], None)
        return PlannedRun(seed, _id(expand), pretrain.given.stage, _id(finetune), _id(evaluate))

    def _expand(self, arm: Arm, seed: int) -> Source:
        """The expansion of an arm, one for all arms and seeds that have the same."""
        assert arm.method is not None
        settings = expand_settings(self._config, arm)
        draws = METHODS[arm.method].draws or settings.get("new_width") is not None  # what is added is drawn at random
        settings["seed"] = seed if draws else _ANY_SEED
        key = canonical(settings)
        if key not in self._expanded:
            given = {name: settings.pop(name) for name in ("method", "factor", "layers", "seed") if name in settings}
            label = self._label(arm.slug, seed if draws else None)
            options = Options(settings, f"{self._where}: arm {arm.name}", self._amount("expand"))
            self._expanded[key] = self._stages.expand(label, options, self._base, **given)
        return self._expanded[key]

    def _train_config(self, arm: Arm, tokens: int) -> TrainConfig:
        """An arm's settings of training. Raises: UserError."""
        given = {**self._training(arm), "checkpoint": "checkpoint", "data": "data", "out": "out", "tokens": tokens}
        return validated(TrainConfig, given, f"{self._where}: arm {arm.name}: pretrain")

    def _training(self, arm: Arm) -> dict[str, Any]:
        """All settings of `pretrain` that the file gives an arm."""
        settings = merged(self._config.pretrain, arm.pretrain)
        return for_base(settings) if arm.method is None else settings

    def _evaluation(self) -> Options:
        options = self._options("evaluate")
        return Options({**options.settings, "tasks": self._config.tasks}, options.where, options.resources)

    def _options(self, kind: Any) -> Options:
        return Options(getattr(self._config, kind) or {}, f"{self._where}: {kind}", self._amount(kind))

    def _label(self, what: str, seed: int | None = None) -> str:
        return f"{self._config.name[:_NAME]}-{what}" + ("" if seed is None else f"-s{seed}")

    def _amount(self, kind: Any) -> Amount | None:
        return self._config.resources.get(kind)


def _remarks(arms: Sequence[PlannedArm]) -> Iterator[str]:
    """What one has to know of the plan to read the result."""
    by_name = {one.arm.name: one for one in arms}
    for one in arms:
        reference = by_name.get(one.arm.compute_of or "")
        twins = [a for a in arms if a is not one and a.arm.method is None and a.tokens == one.tokens]
        twin = next((a for a in twins if dict(a.arm.pretrain) == dict(one.arm.pretrain)), None)
        if reference is not None and twin is not None:
            equal = reference.tokens * reference.facts.flops_per_token / one.facts.flops_per_token
            yield (
                f"“{twin.arm.name}” and “{one.arm.name}” are the same runs here: {reference.tokens:,} tokens of "
                f"{reference.arm.name} take the FLOPs of {equal:,.0f} of the base, which is as many whole steps"
            )
    spent = {one.arm.name: one.tokens for one in arms if one.arm.compute_of is None}
    usual = statistics.mode(spent.values())
    for name, tokens in spent.items():
        if tokens != usual:
            yield f"{name}: is trained on {tokens:,} tokens, whole steps of its own batch; most others on {usual:,}"
    for one in arms:
        if one.inserted_tokens is not None:
            yield (
                f"{one.arm.name}: its new layers come in over the first {one.inserted_tokens:,} tokens; until then its "
                "loss is that of the model with gates, at first the base's own"
            )


def _id(source: Source | None) -> str | None:
    return None if source is None else source.given.stage
