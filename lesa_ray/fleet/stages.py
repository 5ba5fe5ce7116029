"""Stages of a graph, and how one is put together: each has its place in the store before anything runs.

What is wrong with a stage's settings is found when it is added, before anything runs. What is wrong with an input (a
checkpoint that is not there) is noted with the stages that need it: the others do not wait for it. Inputs are looked at
side by side, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lesa_ray.config import ExpandConfig, Settings, validated
from lesa_ray.errors import UserError
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.expansion.auto import AUTO
from lesa_ray.expansion.method import check_settings
from lesa_ray.expansion.registry import METHODS, get_method
from lesa_ray.faults import explain
from lesa_ray.fleet.inputs import (
    checkpoint_identity,
    data_identity,
    file_identity,
    grown_identity,
    pinned,
    tokenizer_identity,
)
from lesa_ray.fleet.settings import Amount, absolute
from lesa_ray.store.identity import Identity, code_version
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.train_settings import FinetuneConfig, TrainConfig

CONFIGS: dict[str, type[Settings]] = {
    "tokenize": TokenizeConfig,
    "expand": ExpandConfig,
    "pretrain": TrainConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
}
_KNOWN: dict[str, frozenset[str]] = {
    "tokenize": frozenset({"data", "tokenizer", "out"}),
    "expand": frozenset({"base", "out", "method", "factor", "layers"}),
    "pretrain": frozenset({"checkpoint", "architecture", "data", "out", "dtype"}),
    "finetune": frozenset({"checkpoint", "architecture", "out", "dtype"}),
    "evaluate": frozenset({"checkpoints", "out"}),
}
"""What the graph itself gives a stage."""
_COUNT: dict[str, frozenset[str]] = {"expand": frozenset({"method", "factor", "layers"})}
"""Those of them that are no places."""
_PLACES: dict[str, frozenset[str]] = {
    "expand": frozenset({"variants", "importance"}),
    "finetune": frozenset({"data", "tokenizer"}),
    "evaluate": frozenset({"data"}),
}
"""Settings that say where inputs of the stage's own lie; what lies there counts, not where."""
_DO_NOT_COUNT: dict[str, frozenset[str]] = {
    "tokenize": frozenset({"bad_rows"}),
    "expand": frozenset({"gpus_per_task", "memory_budget"}),
    "evaluate": frozenset({"gpus_per_task", "cpus_per_task", "batch_size"}),
}


@dataclass(frozen=True)
class Ref:
    """The output of another stage, by its id."""

    stage: str


@dataclass(frozen=True)
class Stage:
    """One stage of a graph. `id` is KIND/LABEL."""

    kind: str
    label: str
    given: Mapping[str, Any]
    """Settings as the command takes them but `out`; a `Ref` (also in a tuple) where an input is another's output."""
    needs: tuple[str, ...]
    identity: Identity | None
    """None if the identity of an input could not be found out."""
    problem: str | None
    """What is wrong with an input."""
    wrong: bool
    """Whether the problem is the user's to mend, not the machine's."""
    resources: Amount | None

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.label}"

    def settings(self, out: str, places: Mapping[str, str]) -> Settings:
        """The command's settings. places: URLs of the outputs of `needs`, by id."""

        def resolved(value: Any) -> Any:
            if isinstance(value, Ref):
                return places[value.stage]
            return tuple(map(resolved, value)) if isinstance(value, tuple) else value

        given = {name: resolved(value) for name, value in self.given.items()}
        return CONFIGS[self.kind].model_validate({**given, "out": out})


@dataclass(frozen=True)
class Source:
    """An input of a stage: as its command is given it, and what identifies it. Both are a `Ref` to a stage's output."""

    given: Any
    found: Any


@dataclass(frozen=True)
class Options:
    """Settings of a stage that come from a file. where: what messages call them."""

    settings: Mapping[str, Any]
    where: str
    resources: Amount | None = None


class _Problem(Exception):
    """An input without an identity."""

    def __init__(self, message: str, wrong: bool) -> None:
        super().__init__(message)
        self.wrong = wrong


@dataclass(frozen=True)
class _Draft:
    """A stage whose inputs' identities are not known yet: stages by `Ref`, others as they are found out."""

    kind: str
    label: str
    given: Mapping[str, Any]
    inputs: Mapping[str, Any]
    settings: Mapping[str, Any]
    resources: Amount | None


class StageBuilder:
    """Gathers stages, each after those it needs, while the identities of their inputs are found out.

    Every method that adds a stage raises UserError naming a setting that is wrong or not the file's to give."""

    def __init__(self, by: str, pool: ThreadPoolExecutor) -> None:
        """by: what messages call the graph (a fleet, a comparison). pool: looks at inputs."""
        self._by, self._pool = by, pool
        self._drafts: list[_Draft] = []
        self._external: dict[tuple[Any, ...], Future[Any]] = {}

    def checkpoint(self, name: str) -> Source:
        """A checkpoint that is there already."""
        place = absolute(name)
        return Source(place, self._found(checkpoint_identity, place))

    def blocks(self, name: str) -> Source:
        """Token blocks that are there already."""
        place = absolute(name)
        return Source(place, self._found(data_identity, (place,)))

    def tokenize(self, label: str, options: Options, data: Sequence[str], tokenizer: str) -> Source:
        """Text → token blocks."""
        given = {"data": tuple(map(absolute, data)), "tokenizer": absolute(tokenizer)}
        checked = self._checked("tokenize", options, given)
        assert isinstance(checked, TokenizeConfig)
        found = {
            "data": self._found(data_identity, given["data"], checked.dataset_config, checked.dataset_split),
            "tokenizer": self._found(tokenizer_identity, given["tokenizer"]),
        }
        return self._add("tokenize", checked, label, options, given, found)

    def expand(self, label: str, options: Options, base: Source, **given: Any) -> Source:
        """A base → a deeper checkpoint. given: method, factor, layers, seed."""
        given["base"] = base.given
        checked = self._checked("expand", options, given)
        assert isinstance(checked, ExpandConfig)
        if checked.method != AUTO:
            try:
                check_settings(checked, get_method(checked.method))
            except UserError as error:
                raise UserError(f"{options.where}: {error}") from error
        inputs = {"base": base.found}
        if checked.variants:
            given["variants"] = tuple(map(absolute, checked.variants))
            inputs["variants"] = [self._found(checkpoint_identity, variant) for variant in given["variants"]]
        if checked.importance is not None:
            given["importance"] = absolute(checked.importance)
            inputs["importance"] = self._found(file_identity, given["importance"])
        return self._add("expand", checked, label, options, given, inputs)

    def pretrain(self, label: str, options: Options, checkpoint: Source, blocks: Source, **given: Any) -> Source:
        """A checkpoint → the same, trained on."""
        given |= {"checkpoint": checkpoint.given, "data": blocks.given}
        checked = self._checked("pretrain", options, given)
        inputs = {"checkpoint": self._to_train(checked, checkpoint), "data": blocks.found}
        return self._add("pretrain", checked, label, options, given, inputs)

    def finetune(self, label: str, options: Options, checkpoint: Source, **given: Any) -> Source:
        """A checkpoint → the same, fine-tuned on conversations, which the options name."""
        if "data" not in options.settings:
            raise UserError(f"{options.where}.data: missing; give conversations")
        given["checkpoint"] = checkpoint.given
        checked = self._checked("finetune", options, given)
        assert isinstance(checked, FinetuneConfig)
        given["data"] = absolute(checked.data)
        inputs = {
            "checkpoint": self._to_train(checked, checkpoint),
            "data": self._found(data_identity, (given["data"],), checked.dataset_config, checked.dataset_split),
        }
        if checked.tokenizer is not None:
            given["tokenizer"] = absolute(checked.tokenizer)
            inputs["tokenizer"] = self._found(tokenizer_identity, given["tokenizer"])
        return self._add("finetune", checked, label, options, given, inputs)

    def evaluate(self, label: str, options: Options, checkpoints: Sequence[Source], blocks: Source | None) -> Source:
        """Measure checkpoints, on the options' own data if they name some, else on the blocks."""
        given: dict[str, Any] = {"checkpoints": tuple(one.given for one in checkpoints)}
        inputs: dict[str, Any] = {"checkpoints": [one.found for one in checkpoints]}
        own = bool(options.settings.get("data"))
        if blocks is not None and not own:
            given["data"], inputs["data"] = (blocks.given,), blocks.found
        checked = self._checked("evaluate", options, given)
        assert isinstance(checked, EvaluateConfig)
        if own:
            given["data"] = tuple(map(absolute, checked.data))
            inputs["data"] = self._found(data_identity, given["data"])
        return self._add("evaluate", checked, label, options, given, inputs)

    def _to_train(self, config: Settings, checkpoint: Source) -> Any:
        """What identifies a checkpoint that is trained. One that is there already must say which layers are new, where
        that is what is asked for."""
        assert isinstance(config, TrainConfig)
        if isinstance(checkpoint.given, Ref) or not config.needs_manifest:
            return checkpoint.found
        return self._found(grown_identity, checkpoint.given, checkpoint.found)  # which was asked for before

    def _checked(self, kind: str, options: Options, given: Mapping[str, Any]) -> Settings:
        """A stage's settings, as far as they can be known before it is known where inputs will lie."""
        if taken := sorted(_KNOWN[kind] & options.settings.keys()):
            raise UserError(f"{options.where}.{taken[0]}: is given by the {self._by} itself; leave it out")
        shown = {name: _placeholder(value) for name, value in {**options.settings, **given}.items()}
        return validated(CONFIGS[kind], {**shown, "out": "out"}, options.where)

    def _add(
        self,
        kind: str,
        checked: Settings,
        label: str,
        options: Options,
        given: Mapping[str, Any],
        inputs: Mapping[str, Any],
    ) -> Source:
        all_given = {**options.settings, **given}
        not_counted = _not_counted(kind, checked) | _PLACES.get(kind, frozenset())
        left_out = (_KNOWN[kind] - _COUNT.get(kind, frozenset())) | not_counted
        settings = checked.model_dump(mode="json", exclude=set(left_out))
        if isinstance(checked, ExpandConfig) and not uses_lesa(checked.method):
            del settings["lesa"]
        self._drafts.append(_Draft(kind, label, all_given, inputs, settings, options.resources))
        ref = Ref(f"{kind}/{label}")
        return Source(ref, ref)

    def _found(self, identify: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """What `identify(*arguments)` gives, asked once."""
        key = (identify.__name__, *arguments)
        if key not in self._external:
            self._external[key] = self._pool.submit(identify, *arguments)
        return self._external[key]

    def finished(self) -> list[Stage]:
        """The stages with their identities."""
        stages: dict[str, Stage] = {}
        for draft in self._drafts:
            identity, problem, wrong, given = None, None, False, draft.given
            try:
                inputs = {name: _identified(value, stages) for name, value in draft.inputs.items()}
                identity = Identity(draft.kind, inputs, draft.settings, code_version())
                if isinstance(inputs.get("data"), list):
                    given = {**given, "data": pinned(given["data"], inputs["data"])}
            except _Problem as error:
                problem, wrong = str(error), error.wrong
            needs = tuple(dict.fromkeys(ref.stage for value in draft.given.values() for ref in _refs(value)))
            stage = Stage(draft.kind, draft.label, given, needs, identity, problem, wrong, draft.resources)
            stages[stage.id] = stage
        return list(stages.values())


def merged(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings on top of one another, the last on top; mappings key by key."""
    more: dict[str, Any] = {}
    for one in settings:
        for name, value in one.items():
            before = more.get(name)
            more[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return more


def that_count(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a file's settings for a kind of stage that change what is made."""
    left_out = _not_counted(kind, CONFIGS[kind].model_construct(**settings))
    return {name: value for name, value in settings.items() if name not in left_out}


def for_method(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Settings of `expand` that are meant for several methods, as one of them takes them."""
    kept = uses_lesa(method)
    return {name: value for name, value in settings.items() if kept or name not in ("lesa", "variants")}


def uses_lesa(method: str) -> bool:
    """Whether the settings of LESA count for a method."""
    return method in METHODS and METHODS[method].predicts


def _not_counted(kind: str, settings: Settings) -> Set[str]:
    return settings.not_counted if isinstance(settings, TrainConfig) else _DO_NOT_COUNT[kind]


def _identified(value: Any, stages: Mapping[str, Stage]) -> Any:
    """What identifies an input. Raises: _Problem."""
    if isinstance(value, list):
        return [_identified(one, stages) for one in value]
    if isinstance(value, Ref):
        stage = stages[value.stage]
        if stage.identity is None:
            raise _Problem(stage.problem or "", stage.wrong)
        return {"stage": stage.identity.digest}
    try:
        return value.result()
    except Exception as error:  # each backend has its own classes for what it refuses
        raise _Problem(explain(error), isinstance(error, UserError)) from error


def _refs(value: Any) -> Iterator[Ref]:
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, Ref):
            yield one


def _placeholder(value: Any) -> Any:
    """A setting as it can be checked before it is known where inputs will lie."""
    if isinstance(value, tuple):
        return tuple(map(_placeholder, value))
    return value.stage if isinstance(value, Ref) else value
