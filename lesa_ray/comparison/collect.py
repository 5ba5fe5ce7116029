"""`comparison.json`: what a comparison found, put together from the stages that the store holds.

    STORE/comparison/NAME-HASH12/comparison.json

Decides
- It is not a stage but a view of stages: written anew whenever a run ends, so it is there from the first one on, and an
  arm that is added later joins those that are there. HASH is that of what all arms have in common (base, data, tokens,
  those common settings that count): another budget is another comparison, another number of workers is not.
- A finished run's curve is read once: the file that is there has it from then on, as long as it ends where the run
  does and this version wrote it. What is under way is read anew each time, several at a time.
- A run counts when all its stages are finished. What stopped one is told with it; a curve is shown as far as it came.
- Losses to reach, unless the file names them: what the best trained control and each method ended at, seed by seed.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.comparison.arms import listed
from lesa_ray.comparison.curves import AXES, Axis, Point, curve_of, reached
from lesa_ray.comparison.graph import Comparison, PlannedArm, PlannedRun
from lesa_ray.comparison.statistics import finals, whole
from lesa_ray.config import all_shown
from lesa_ray.fleet.stages import Stage, that_count
from lesa_ray.fleet.state import THREADS, Outcome, Standing, look
from lesa_ray.places import shown
from lesa_ray.store.catalog import Store
from lesa_ray.store.identity import canonical, code_version
from lesa_ray.training.train_settings import TrainConfig

FILE = "comparison.json"
VERSION = 1
_FOLDER = "comparison"
_NO_OUTCOMES: Mapping[str, Outcome] = {}


class Collector:
    """Reads what the store holds of a comparison; finished runs once."""

    def __init__(self, comparison: Comparison, store: Store) -> None:
        self._comparison, self._store = comparison, store
        self._stages = {stage.id: stage for stage in comparison.stages}
        self._complete: dict[str, Standing] = {}
        self._curves: dict[str, list[Point]] = {}
        self._done: dict[tuple[str, int], dict[str, Any]] = {}
        self._given_up = False

    def give_up(self) -> None:
        """End a `collect` of another thread, after the requests that are under way."""
        self._given_up = True

    @property
    def storage(self) -> Storage:
        """Where `comparison.json` lies."""
        return self._store.storage.within(f"{_FOLDER}/{self._comparison.config.name}-{self._digest[:12]}")

    def collect(
        self, machine: Mapping[str, Any] | None = None, outcomes: Mapping[str, Outcome] = _NO_OUTCOMES
    ) -> dict[str, Any]:
        """The content of `comparison.json` as things stand.

        machine: what the runs were made on; by default as the file that is there says. outcomes: what became of stages
        in this process. Raises: MachineError if the store does not answer; CancelledError after `give_up`."""
        comparison, config = self._comparison, self._comparison.config
        earlier = self._earlier()
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda stage: self._look(stage, outcomes), comparison.stages)
            standings = {stage.id: one for stage, one in zip(comparison.stages, found, strict=True)}
            ran = {run.pretrain for arm in comparison.arms for run in arm.runs}
            begun = [standings[stage] for stage in ran if standings[stage].state != "waiting"]
            known = _known_curves(earlier)
            read = pool.map(lambda standing: self._curve(standing, known), begun)
            curves = {standing.id: points for standing, points in zip(begun, read, strict=True)}
        arms = [self._arm(arm, standings, curves) for arm in comparison.arms]
        before = [run["loss_before"] for arm in arms if arm["method"] is None for run in arm["runs"]]
        base_tasks = standings.get(comparison.base_evaluate or "")
        measured = [_chosen(standings[stage.id]) for stage in comparison.stages if stage.kind == "evaluate"]
        return {
            "kind": "comparison",
            "version": VERSION,
            "name": config.name,
            "file": comparison.file,
            "base": {
                "checkpoint": shown(config.base),
                "family": comparison.base.family,
                "parameters": comparison.base.parameters,
                "layers": comparison.base.layers,
                "loss": next((loss for loss in before if loss is not None), None),
                "tasks": None if base_tasks is None else _tasks(base_tasks),
            },
            "data": self._data(standings),
            "tokens": config.tokens,
            "seeds": list(config.seeds),
            "reference": comparison.reference,
            "settings": self._settings,
            "machine": dict(machine) if machine is not None else earlier.get("machine") or {},
            "lesa_ray": code_version(),
            "notes": list(comparison.notes),
            "remarks": list(comparison.remarks),
            "task_metrics": {
                name: {"metric": one["metric"], "higher_is_better": one["higher_is_better"]}
                for tasks in measured
                for name, one in tasks.items()
            },
            "arms": arms,
            "reached": all_reached(arms, config.seeds, config.losses),
        }

    def write(self, content: Mapping[str, Any]) -> str:
        """Leave it in the store; where. Raises: MachineError."""
        data = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        self.storage.write(FILE, data.encode())
        return f"{self.storage.url}/{FILE}"

    def displaced(self) -> str | None:
        """What is said of arms that the file that is there has, and this comparison has not; None if there is none.

        Raises: as `Storage.read`."""
        earlier, named = self._earlier(), {arm.arm.name for arm in self._comparison.arms}
        gone = [arm["name"] for arm in earlier.get("arms", []) if arm["name"] not in named]
        if not gone:
            return None
        file = earlier.get("file")
        return (
            f"{FILE} is written anew without {listed(gone)}"
            f"{'' if file == self._comparison.file else f' of {file}'}; another `name` keeps both"
        )

    @property
    def _settings(self) -> dict[str, Any]:
        """Those of all arms, by kind of stage, as others may see them."""
        config = self._comparison.config
        settings = {"expand": config.expand, "pretrain": config.pretrain, "finetune": config.finetune}
        return {kind: all_shown(one) for kind, one in settings.items()}

    @property
    def _digest(self) -> str:
        """Of what all arms have in common."""
        config = self._comparison.config
        run = next(arm.runs[0] for arm in self._comparison.arms if arm.arm.method is not None)
        expand, pretrain = (self._stages[stage].identity for stage in (run.expand or "", run.pretrain))
        assert expand is not None
        assert pretrain is not None
        common = {
            "base": expand.inputs["base"],
            "data": pretrain.inputs["data"],
            "tokens": config.tokens,
            "settings": {kind: None if one is None else that_count(kind, one) for kind, one in self._settings.items()},
        }
        return hashlib.sha256(canonical(common)).hexdigest()

    def _earlier(self) -> dict[str, Any]:
        """The file that is there; empty if there is none."""
        try:
            content = json.loads(self.storage.read(FILE))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _look(self, stage: Stage, outcomes: Mapping[str, Outcome]) -> Standing:
        if stage.id in self._complete:
            return self._complete[stage.id]
        if self._given_up:
            raise CancelledError
        assert stage.identity is not None
        outcome, standing = outcomes.get(stage.id), look(self._store, stage.identity, stage.label)
        if standing.record is not None:
            self._complete[stage.id] = standing
        elif outcome is not None and outcome.how == "failed" and standing.state == "waiting":
            return Standing(standing.id, standing.place, "failed", outcome.why)
        return standing

    def _curve(self, trained: Standing, known: Mapping[str, list[Point]]) -> list[Point]:
        """A run's measurements. known: of finished runs, by their places."""
        if trained.id in self._curves:
            return self._curves[trained.id]
        if self._given_up:
            raise CancelledError
        place = self._store.folder(trained.place).url
        if trained.record is None:
            return curve_of(place)
        points = known.get(place, [])
        if not points or points[-1]["loss"] != _final(trained):
            points = curve_of(place)
        self._curves[trained.id] = points
        return points

    def _data(self, standings: Mapping[str, Standing]) -> dict[str, Any]:
        """What is known of the token blocks."""
        comparison = self._comparison
        known: dict[str, Any] = {"train_tokens": None, "heldout_rows": None, "digest": None}
        if comparison.config.blocks is not None:
            from lesa_ray.training.tokens import open_blocks

            blocks = open_blocks(comparison.config.blocks)
            known = {
                "train_tokens": blocks.train.tokens, "heldout_rows": blocks.heldout.rows, "digest": blocks.digest
            }  # fmt: skip
        else:
            assert comparison.tokenize is not None
            record = standings[comparison.tokenize].record
            if record is not None:
                known = {name: record["metrics"].get(name) for name in known}
        if known["heldout_rows"] is not None:  # those that the loss is over
            asked = comparison.config.pretrain.get("eval_rows", TrainConfig.model_fields["eval_rows"].default)
            known["heldout_rows"] = min(known["heldout_rows"], int(asked))
        named = [comparison.config.blocks] if comparison.config.blocks else comparison.config.data
        return {**known, "seq_len": comparison.seq_len, "named": ", ".join(map(shown, named))}

    def _arm(
        self, planned: PlannedArm, standings: Mapping[str, Standing], curves: Mapping[str, list[Point]]
    ) -> dict[str, Any]:
        arm, facts = planned.arm, planned.facts
        return {
            "name": arm.name,
            "control": arm.control,
            "method": arm.method,
            "position": planned.position,
            "settings": planned.settings,
            "layers": facts.layers,
            "parameters": facts.parameters,
            "trained_parameters": facts.trained_parameters,
            "flops_per_token": facts.flops_per_token,
            "tokens": planned.tokens,
            "inserted_tokens": planned.inserted_tokens,
            "runs": [self._run(arm.name, run, standings, curves.get(run.pretrain, [])) for run in planned.runs],
        }

    def _run(self, arm: str, run: PlannedRun, standings: Mapping[str, Standing], points: list[Point]) -> dict[str, Any]:
        known = self._done.get((arm, run.seed))
        if known is not None:
            return known
        chain = [standings[stage] for stage in run.stages]
        failed = [one for one in chain if one.state == "failed"]
        complete = all(one.state == "complete" for one in chain)
        trained = standings[run.pretrain]
        tuned = None if run.finetune is None else standings[run.finetune]
        measured = None if run.evaluate is None else standings[run.evaluate]
        content = {
            "seed": run.seed,
            "status": "complete" if complete else "failed" if failed else "missing",
            "problem": f"{failed[0].id}: {failed[0].why}" if failed else None,
            "expansion": None if run.expand is None else self._url(standings[run.expand]),
            "training": self._url(trained),
            "finetuning": None if tuned is None else self._url(tuned),
            "loss_before": points[0]["loss"] if points and points[0]["step"] == 0 else None,
            "curve": points,
            "final_loss": _final(trained),
            "tuned_loss": tuned.record["metrics"].get("heldout_after") if tuned and tuned.record else None,
            "tasks": None if measured is None else _tasks(measured),
        }
        if complete:
            self._done[arm, run.seed] = content
        return content

    def _url(self, standing: Standing) -> str | None:
        """Where a stage's output lies, if it is finished."""
        return self._store.folder(standing.place).url if standing.record is not None else None


def _known_curves(content: Mapping[str, Any]) -> dict[str, list[Point]]:
    """The curves of finished runs that a `comparison.json` of this version has, by the places of the runs."""
    if (content.get("version"), content.get("lesa_ray")) != (VERSION, code_version()):
        return {}
    return {run["training"]: run["curve"] for arm in content["arms"] for run in arm["runs"] if run["training"]}


def _final(trained: Standing) -> float | None:
    """The held-out loss that a run ended at; None where it has not, or that is no finite number."""
    value = None if trained.record is None else trained.record["metrics"].get("heldout_after")
    return value if value is not None and math.isfinite(value) else None


def all_reached(
    arms: Sequence[Mapping[str, Any]], seeds: Sequence[int], losses: Sequence[float]
) -> list[dict[str, Any]]:
    """When each run came down to each level: one of `losses`, or, where those are none, what the run with the same seed
    of the best trained control, and of each method, ended at. A mean over seeds would be no level for a run: one whose
    data is harder ends above it, whatever the method.

    Lists are over `seeds`; None: no level, no result, or never there. `loss` is the mean of the levels. Seconds and
    FLOPs are as `arms` has tokens."""
    ended = {arm["name"]: found for arm in arms if (found := finals(arm))}
    levels: list[tuple[str | None, Mapping[int, float]]] = [(None, dict.fromkeys(seeds, loss)) for loss in losses]
    if not losses:
        every = whole(ended)  # a control that lost seeds is not the best for it
        controls = [arm["name"] for arm in arms if arm["control"] and arm["name"] in every]
        best = sorted(controls, key=lambda name: statistics.fmean(ended[name].values()))[:1]
        methods = [arm["name"] for arm in arms if not arm["control"] and arm["name"] in ended]
        levels = [(name, ended[name]) for name in (*best, *methods)]
    entries = []
    for of, level in levels:
        along = {axis: {arm["name"]: [_reached(arm, run, level, axis) for run in arm["runs"]] for arm in arms}
                 for axis in AXES}  # fmt: skip
        entries.append(
            {
                "loss": statistics.fmean(level.values()),
                "of": of,
                "levels": [level.get(seed) for seed in seeds],
                "arms": along["tokens"],
                "seconds": along["seconds"],
                "flops": along["flops"],
            }
        )
    return entries


def _reached(arm: Mapping[str, Any], run: Mapping[str, Any], levels: Mapping[int, float], axis: Axis) -> float | None:
    if run["final_loss"] is None or run["seed"] not in levels:
        return None
    return reached(arm, run, levels[run["seed"]], axis)


def _tasks(standing: Standing) -> dict[str, float] | None:
    """The value of each task."""
    return None if standing.record is None else {name: one["value"] for name, one in _chosen(standing).items()}


def _chosen(standing: Standing) -> dict[str, dict[str, Any]]:
    """Of each task the metric that counts, its value, and its direction as lm-evaluation-harness says. It is the first,
    or `acc_norm` where there is one, as in published tables."""
    if standing.record is None:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name, task in (standing.record["metrics"]["checkpoints"][-1].get("tasks") or {}).items():
        metrics = task["metrics"]
        metric = "acc_norm" if "acc_norm" in metrics else next(iter(metrics), None)
        if metric is not None and metrics[metric]["value"] is not None:
            better = metrics[metric].get("higher_is_better")
            found[name] = {"metric": metric, "value": metrics[metric]["value"], "higher_is_better": better}
    return found
