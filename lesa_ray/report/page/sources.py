"""RUN… → what there is to show: comparisons, analyses, expansions, training runs.

A RUN is a folder or URL, and what it is follows from the files in it; it may be several things at once, as a trained
checkpoint holds the `expansion.json` of the checkpoint it came from. The file itself may be named too.

A comparison's arms lie elsewhere (the artifact store). The `expansion.json` of one seed of each arm is read from there
if it is still there, for the plan and the fit; where it is not, the page says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lesa_ray.checkpoint.manifest import MANIFEST_FILE, Manifest
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import reaching
from lesa_ray.places import is_of_a_store
from lesa_ray.report.page.rows import thinned
from lesa_ray.report.page.schema import Analysis, Comparison
from lesa_ray.report.page.words import listed
from lesa_ray.training.metrics import metrics_rows

COMPARISON_FILE, ANALYSIS_FILE, METRICS = "comparison.json", "analysis.json", "training/metrics.jsonl"
_RUN_FILE, _RESULT_FILE = "training/run.json", "training/result.json"
_FILES = (COMPARISON_FILE, ANALYSIS_FILE, MANIFEST_FILE, METRICS)

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Expansion:
    """An expanded checkpoint's manifest. `trained`: a training run's OUT, whose plan and fit are its base's."""

    label: str
    url: str
    manifest: Manifest
    trained: bool = False
    arm_of: str | None = None
    """The comparison whose arm it is."""


@dataclass(frozen=True)
class Training:
    """A training run. rows: of metrics.jsonl, thinned. settings: what a person would compare two runs by; config: all.
    result: empty until it has ended."""

    label: str
    url: str
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    result: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class Material:
    """Everything the page is made of. missing: what the page should have had, a sentence each."""

    runs: tuple[str, ...] = ()
    comparisons: list[tuple[str, Comparison]] = field(default_factory=list)
    analyses: list[tuple[str, Analysis]] = field(default_factory=list)
    expansions: list[Expansion] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def gather(runs: Sequence[str]) -> Material:
    """Read all RUNs. Raises: UserError naming the first that is none, or is damaged; MachineError if a store does not
    answer."""
    if not runs:
        raise UserError("RUN: give at least one folder with comparison.json, analysis.json, expansion.json or training")
    material = Material(runs=tuple(runs))
    for run in dict.fromkeys(runs):
        _read_run(run, material)
    for run, comparison in material.comparisons:
        _add_plans(run, comparison, material)
    _tell_apart(material)
    return material


def parsed(kind: type[Model], content: object, where: str) -> Model:
    """`content` as a model. Raises: UserError naming the first thing that is not as it should be."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"RUN {where}: {place}: {first['msg']}; make it anew with this version of lesa-ray") from error


def short_name(place: str) -> str:
    """The last part of a path, URL or repo id."""
    return place.rstrip("/").rsplit("/", 1)[-1] or place


def _read_run(run: str, material: Material) -> None:
    folder = run
    for name in _FILES:
        if run.endswith(f"/{name}") or run == name:
            folder = run[: -len(name)].rstrip("/") or "."
    storage = Storage(folder)
    contents = {name: _read(storage, name) for name in _FILES if name != METRICS}
    with reaching(f"RUN {storage.url}", f"{METRICS} cannot be read"):
        trained = storage.exists(METRICS)
    if not trained and all(content is None for content in contents.values()):
        there = "there is no such folder" if storage.is_local and not storage.exists() else "holds none of them"
        raise UserError(f"RUN {run}: {there}; a RUN has {', '.join(_FILES[:-1])} or {METRICS}")
    if (content := contents[COMPARISON_FILE]) is not None:
        where = f"{run}: {COMPARISON_FILE}"
        material.comparisons.append((folder, parsed(Comparison, _json(content, where), where)))
    if (content := contents[ANALYSIS_FILE]) is not None:
        where = f"{run}: {ANALYSIS_FILE}"
        material.analyses.append((folder, parsed(Analysis, _json(content, where), where)))
    if (content := contents[MANIFEST_FILE]) is not None:
        manifest = _manifest(content, f"{run}: {MANIFEST_FILE}")
        material.expansions.append(Expansion(short_name(folder), folder, manifest, trained))
    if trained:
        material.trainings.append(_training(folder, storage))


def _read(storage: Storage, name: str) -> bytes | None:
    with reaching(f"RUN {storage.url}", f"{name} cannot be read"):
        try:
            return storage.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"RUN {where}: is not JSON ({error})") from error


def _manifest(content: bytes, where: str) -> Manifest:
    found = _json(content, where)
    needed = ("base", "method", "layers", "new_layers", "fit")
    if not isinstance(found, dict) or any(name not in found for name in needed) or not found["layers"]:
        raise UserError(f"RUN {where}: is not the manifest of an expansion; expand again with this version of lesa-ray")
    manifest: Manifest = found  # type: ignore[assignment]
    return manifest


def _training(folder: str, storage: Storage) -> Training:
    with reaching(f"RUN {storage.url}", f"{METRICS} cannot be read"):
        rows = thinned(metrics_rows(storage.url))
    run, result = (_object(storage, name) for name in (_RUN_FILE, _RESULT_FILE))
    return Training(short_name(folder), folder, rows, run.get("summary", {}), result, run.get("config", {}))


def _object(storage: Storage, name: str) -> dict[str, Any]:
    content = _read(storage, name)
    try:
        found = json.loads(content) if content is not None else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _add_plans(run: str, comparison: Comparison, material: Material) -> None:
    """The manifest of one seed of each arm of a comparison, where it is still to be had."""
    known = {Storage(one.url).url for one in material.expansions}
    gone = []
    for arm in comparison.arms:
        urls = [trial.expansion for trial in arm.runs if trial.expansion]
        if not urls:
            continue
        manifest = next((found for url in urls if (found := _distant_manifest(url, run)) is not None), None)
        if manifest is None:
            gone.append(arm.name)
        elif Storage(urls[0]).url not in known:
            material.expansions.append(Expansion(arm.name, urls[0], manifest, arm_of=comparison.name))
    if gone:
        material.missing.append(
            f"Plan and fit of {listed(gone)}: the expanded checkpoint is no longer where {comparison.name} made it."
        )


def _distant_manifest(url: str, run: str) -> Manifest | None:
    if not is_of_a_store(url):
        return None
    try:
        content = _read(Storage(url), MANIFEST_FILE)
        return None if content is None else _manifest(content, run)
    except (UserError, MachineError):
        return None


def _tell_apart(material: Material) -> None:
    """Give things of one kind and name the folder above as well, or their comparison, or a number."""
    names = [one.label for one in material.expansions]
    wider = [_wider(one.url) if one.arm_of is None else f"{one.arm_of}: {one.label}" for one in material.expansions]
    material.expansions = [
        replace(one, label=label) for one, label in zip(material.expansions, _distinct(names, wider), strict=True)
    ]
    names, wider = [one.label for one in material.trainings], [_wider(one.url) for one in material.trainings]
    material.trainings = [
        replace(one, label=label) for one, label in zip(material.trainings, _distinct(names, wider), strict=True)
    ]


def _wider(url: str) -> str:
    """The last two parts of a path."""
    return "/".join(url.rstrip("/").rsplit("/", 2)[-2:])


def _distinct(names: list[str], wider: list[str]) -> list[str]:
    """Each name, the wider one where several are alike, with a number where those are too."""
    chosen = [wide if names.count(name) > 1 else name for name, wide in zip(names, wider, strict=True)]
    return [
        name if chosen.count(name) == 1 else f"{name} ({chosen[: at + 1].count(name)})"
        for at, name in enumerate(chosen)
    ]
