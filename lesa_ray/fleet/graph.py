"""A fleet's stages as a graph, each with its place in the store before anything runs.

    tokenize(family) ───────────────────┬──────────────────────────────┐
    expand(family, method, factor) ──▶ pretrain ──▶ finetune ──▶ evaluate, beside the base

What is wrong with a stage's settings is found here, for all stages, before anything runs. What is wrong with a family's
inputs (a checkpoint that is not there) is noted with its stages: the other families do not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lesa_ray.checkpoint.storage import explain
from lesa_ray.config import ExpandConfig, Settings, validated
from lesa_ray.errors import UserError
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.fleet.inputs import checkpoint_identity, data_identity, tokenizer_identity
from lesa_ray.fleet.settings import Amount, Family, FleetConfig, absolute
from lesa_ray.store.identity import Identity, code_version
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.train_settings import OPERATIONAL, FinetuneConfig, TrainConfig

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
_PLACES: dict[str, frozenset[str]] = {"finetune": frozenset({"data", "tokenizer"}), "evaluate": frozenset({"data"})}
"""Settings that say where inputs of the stage's own lie; what lies there counts, not where."""
_DO_NOT_COUNT: dict[str, frozenset[str]] = {
    "tokenize": frozenset(),
    "expand": frozenset({"gpus_per_task", "memory_budget", "variants"}),
    "pretrain": frozenset(OPERATIONAL),
    "finetune": frozenset(OPERATIONAL),
    "evaluate": frozenset({"gpus_per_task", "cpus_per_task", "batch_size"}),
}


@dataclass(frozen=True)
class Ref:
    """The output of another stage, by its id."""

    stage: str


@dataclass(frozen=True)
class Stage:
    """One stage of a fleet. `id` is KIND/LABEL."""

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


def build(config: FleetConfig, where: str) -> list[Stage]:
    """All stages, each after those it needs.

    where: what messages call the fleet's file. Raises: UserError naming the first setting that is wrong."""
    with ThreadPoolExecutor(8) as pool:
        builder = _Builder(config, where, pool)
        for family in config.families:
            builder.add_family(family)
        return builder.finished()


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


class _Builder:
    """Gathers a fleet's stages while the identities of their inputs are found out side by side."""

    def __init__(self, config: FleetConfig, where: str, pool: ThreadPoolExecutor) -> None:
        self._config, self._where, self._pool = config, where, pool
        self._drafts: list[_Draft] = []
        self._external: dict[tuple[Any, ...], Future[Any]] = {}

    def add_family(self, family: Family) -> None:
        config, base = self._config, absolute(family.checkpoint)
        base_input = self._found(checkpoint_identity, base)
        tokenizer = absolute(family.tokenizer or family.checkpoint)
        blocks = None
        if "tokenize" in config.stages:
            more = self._more(family, "tokenize")
            data = tuple(map(absolute, family.data))
            chosen = (more.get("dataset_config"), more.get("dataset_split", "train"))
            found = {
                "data": self._found(data_identity, data, *chosen),
                "tokenizer": self._found(tokenizer_identity, tokenizer),
            }
            blocks = self._add(family, "tokenize", family.name, {"data": data, "tokenizer": tokenizer}, found)
        if "expand" not in config.stages:
            self._add_chain(family, family.name, [(base, base_input)], blocks)
            return
        for method in config.methods:
            for factor in config.factors:
                label = f"{family.name}-{method}-x{factor:g}"
                given: dict[str, Any] = {"base": base, "method": method, "factor": factor}
                variants = tuple(map(absolute, self._more(family, "expand").get("variants") or ()))
                if variants and method == "lesa":
                    given["variants"] = variants
                inputs: dict[str, Any] = {"base": base_input}
                if variants and method == "lesa":
                    inputs["variants"] = [self._found(checkpoint_identity, variant) for variant in variants]
                deeper = self._add(family, "expand", label, given, inputs)
                self._add_chain(family, label, [(base, base_input), (deeper, deeper)], blocks)

    def _add_chain(
        self, family: Family, label: str, checkpoints: list[tuple[str | Ref, Any]], blocks: Ref | None
    ) -> None:
        """What is done with a checkpoint, the last of `checkpoints` (each as it is given, and as an input)."""
        stages = self._config.stages
        given: dict[str, Any]
        inputs: dict[str, Any]
        if "pretrain" in stages:
            assert blocks is not None
            given = {"checkpoint": checkpoints[-1][0], "data": blocks}
            trained = self._add(family, "pretrain", label, given, {"checkpoint": checkpoints[-1][1], "data": blocks})
            checkpoints.append((trained, trained))
        if "finetune" in stages:
            more = self._more(family, "finetune")
            given = {"checkpoint": checkpoints[-1][0]}
            inputs = {"checkpoint": checkpoints[-1][1]}
            if "data" not in more:
                raise UserError(f"{self._where}: stages.finetune.data: missing; give conversations")
            given["data"] = absolute(str(more["data"]))
            chosen = (more.get("dataset_config"), more.get("dataset_split", "train"))
            inputs["data"] = self._found(data_identity, (given["data"],), *chosen)
            if more.get("tokenizer"):
                given["tokenizer"] = absolute(str(more["tokenizer"]))
                inputs["tokenizer"] = self._found(tokenizer_identity, given["tokenizer"])
            tuned = self._add(family, "finetune", label, given, inputs)
            checkpoints.append((tuned, tuned))
        if "evaluate" in stages:
            more = self._more(family, "evaluate")
            given = {"checkpoints": tuple(given for given, _ in checkpoints)}
            inputs = {"checkpoints": [found for _, found in checkpoints]}
            named = more.get("data")
            if named:
                given["data"] = tuple(map(absolute, (named,) if isinstance(named, str) else named))
                inputs["data"] = self._found(data_identity, given["data"])
            elif blocks is not None:
                given["data"] = (blocks,)
                inputs["data"] = blocks
            self._add(family, "evaluate", label, given, inputs)

    def _more(self, family: Family, kind: Any) -> dict[str, Any]:
        """A stage's settings from the file: the fleet's, the family's on top; mappings key by key."""
        more = dict(self._config.stages[kind])
        for name, value in family.stages.get(kind, {}).items():
            before = more.get(name)
            more[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
        return more

    def _add(self, family: Family, kind: Any, label: str, given: Mapping[str, Any], inputs: Mapping[str, Any]) -> Ref:
        """Check a stage's settings. Raises: UserError naming one that is wrong or not the file's to give."""
        where = f"{self._where}: stages.{kind}"
        more = self._more(family, kind)
        if taken := sorted(_KNOWN[kind] & more.keys()):
            raise UserError(f"{where}.{taken[0]}: is given by the fleet itself; leave it out")
        if kind == "expand" and given["method"] != "lesa":
            more.pop("lesa", None)
            more.pop("variants", None)
        all_given = {**more, **given}
        shown = {name: _placeholder(value) for name, value in all_given.items()}
        checked = validated(CONFIGS[kind], {**shown, "out": "out"}, where)
        left_out = (_KNOWN[kind] - {"method", "factor"}) | _DO_NOT_COUNT[kind] | _PLACES.get(kind, frozenset())
        settings = checked.model_dump(mode="json", exclude=set(left_out))
        if kind == "expand" and given["method"] != "lesa":
            del settings["lesa"]
        resources = family.resources.get(kind) or self._config.resources.get(kind)
        self._drafts.append(_Draft(kind, label, all_given, inputs, settings, resources))
        return Ref(f"{kind}/{label}")

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
            identity, problem, wrong = None, None, False
            try:
                inputs = {name: _identified(value, stages) for name, value in draft.inputs.items()}
                identity = Identity(draft.kind, inputs, draft.settings, code_version())
            except _Problem as error:
                problem, wrong = str(error), error.wrong
            needs = tuple(dict.fromkeys(ref.stage for value in draft.given.values() for ref in _refs(value)))
            stage = Stage(draft.kind, draft.label, draft.given, needs, identity, problem, wrong, draft.resources)
            stages[stage.id] = stage
        return list(stages.values())


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
