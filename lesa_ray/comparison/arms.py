"""From the file's arms and grids to single arms with names; and the controls that belong beside them.

An arm is settings alone: nothing is opened here. What a list stands for is decided by where it stands: it multiplies,
and what is inside it is a value as it is.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lesa_ray.comparison.settings import ComparisonConfig
from lesa_ray.comparison.statistics import UNTRAINED
from lesa_ray.config import ExpandConfig, flat
from lesa_ray.errors import UserError
from lesa_ray.expansion.auto import AUTO
from lesa_ray.expansion.plan import BY_IMPORTANCE, POSITIONS
from lesa_ray.expansion.registry import METHODS
from lesa_ray.training.train_settings import INSERTION

BASE = "base"
"""The `method` of an arm that is the base itself, trained on: a control with settings of training of its own."""
_OWN = ("label", "train", "pretrain")
_NOT_AN_ARMS = ("base", "out", "seed")
_TRAINING_OF_ALL = ("steps", "tokens", "epochs", "seed", "eval_every", "eval_rows")
"""Settings of training that would make arms unequal."""
_SIZE = ("factor", "layers", "position", "importance", "new_width")
_EITHER = (("factor", "layers"), ("zero_init", "output_scale"))
"""Settings that stand for one another: an arm's own puts both of the common ones aside."""
_SLUG, _DIGITS = 50, 6
"""Characters of a name in a place, so that a label has room for any seed; of these the digest's, where it is cut."""


@dataclass(frozen=True)
class Arm:
    """One way to grow the base, or to train it on as it is."""

    name: str
    method: str | None
    """None: the base itself, trained on."""
    expand: Mapping[str, Any] = field(default_factory=dict)
    """Its own settings of `expand`, `method` not among them."""
    pretrain: Mapping[str, Any] = field(default_factory=dict)
    """Its own settings of `pretrain`."""
    control: bool = False
    compute_of: str | None = None
    """The arm whose training FLOPs it gets, in place of the comparison's tokens."""

    @property
    def slug(self) -> str:
        """The name as part of a place. What is cut off a long one, or lost of one in other letters than ASCII's, may be
        what tells it from another."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-")
        lost = any(letter.isalnum() and not letter.isascii() for letter in self.name)
        if len(slug) <= _SLUG and not lost:
            return slug
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:_DIGITS]
        return f"{slug[: _SLUG - _DIGITS - 1].rstrip('-')}-{digest}".lstrip("-")


def arms_of(config: ComparisonConfig, where: str) -> tuple[list[Arm], list[Arm]]:
    """The arms that the file names, and the controls that it does not name itself.

    Raises: UserError for an arm that is none, or a name that is there twice."""
    arms = [arm for entry in config.arms for arm in _arms(entry, where)]
    reference = reference_of(config, arms, where)
    wanted = _controls(config, reference)
    named = [replace(arm, control=arm.control or any(_alike(arm, one) for one in wanted)) for arm in arms]
    added = [one for one in wanted if not any(_alike(arm, one) for arm in arms)]
    slugs = {Arm(UNTRAINED, None).slug: UNTRAINED}  # stands beside the arms wherever they are shown
    for arm in (*named, *added):
        if not arm.slug:
            raise UserError(f"{where}: arms: label {arm.name!r}: has no letter or digit")
        if arm.slug in slugs:
            raise UserError(
                f"{where}: arms: {slugs[arm.slug]!r} and {arm.name!r} have one name; give each a `label` of its own"
            )
        slugs[arm.slug] = arm.name
    return named, added


def reference_of(config: ComparisonConfig, arms: Sequence[Arm], where: str) -> Arm:
    """The arm that the others are measured by. Raises: UserError if there is none of that name."""
    grown = [arm for arm in arms if arm.method is not None]
    if not grown:
        raise UserError(f"{where}: arms: none grows the base; name a method")
    if config.reference is None:
        return grown[0]
    found = [arm for arm in grown if arm.name == config.reference]
    if not found:
        names = ", ".join(arm.name for arm in grown)
        raise UserError(
            f"{where}: reference: {config.reference!r} is not the name of an arm that grows the base; there are {names}"
        )
    return found[0]


def expand_settings(config: ComparisonConfig, arm: Arm) -> dict[str, Any]:
    """All settings of `expand` that the file gives an arm, as the command takes them, but its base, seed and OUT."""
    from lesa_ray.fleet.stages import for_method, merged

    assert arm.method is not None
    common = for_method(config.expand, arm.method)
    aside = {name for pair in _EITHER if arm.expand.keys() & set(pair) for name in pair}
    if arm.expand.get("position", common.get("position")) not in BY_IMPORTANCE:
        aside.add("importance")
    kept = {name: value for name, value in common.items() if name not in aside}
    return {**merged(kept, arm.expand), "method": arm.method}


def listed(names: Sequence[str]) -> str:
    """Names of arms in a sentence; they may have commas of their own."""
    return "; ".join(names) or "none"


def _arms(entry: Mapping[str, Any], where: str) -> list[Arm]:
    """The arms of one entry of the file."""
    for name in entry:
        if name in _NOT_AN_ARMS:
            raise UserError(f"{where}: arms.{name}: is given by the comparison itself; leave it out")
        if name not in _OWN and name not in ExpandConfig.model_fields:
            raise UserError(
                f"{where}: arms.{name}: is no setting of `lesa-ray expand`, and not one of {', '.join(_OWN)}"
            )
    label, given = entry.get("label"), entry.get("pretrain")
    if label is not None and not isinstance(label, str):
        raise UserError(f"{where}: arms.label: must be a text, found {label!r}")
    if taken := [name for name in _TRAINING_OF_ALL if isinstance(given, dict) and name in given]:
        raise UserError(f"{where}: arms.pretrain.{taken[0]}: is the same for all arms; leave it out")
    grid = {name: value for name, value in entry.items() if name != "label"}
    if nothing := next(_empty(grid), None):
        raise UserError(f"{where}: arms.{nothing}: is an empty list; name at least one value, or leave it out")
    points = _spread({"method": "lesa", **grid})
    leaves = [flat(point) for point in points]
    varying = [path for path in leaves[0] if len({repr(one.get(path)) for one in leaves}) > 1]
    arms = []
    for point, values in zip(points, leaves, strict=True):
        shown = varying if label else [path for path in values if path != "method"]
        parts = [text for path in shown if (text := _said(path, values.get(path)))]
        name = " ".join([label or str(values.get("method")), *parts])
        method, train, pretrain = point.pop("method"), point.pop("train", None), point.pop("pretrain", None) or {}
        if not isinstance(method, str) or not isinstance(pretrain, dict):
            raise UserError(f"{where}: arms: {name}: method must be a name, and pretrain a mapping")
        if method == AUTO:
            raise UserError(f"{where}: arms: {name}: auto is a choice between the other methods; name those")
        training = pretrain if train is None else {**pretrain, "train": train}
        if method != BASE:
            arms.append(Arm(name, method, point, training))
        elif of_new := [*point, *(setting for setting in training if setting in ("train", *INSERTION))]:
            raise UserError(f"{where}: arms: {name}: {of_new[0]}: the base has no new layers; leave it out")
        else:
            arms.append(Arm(name, None, pretrain=for_base(training), control=True))
    return arms


def _spread(value: Any) -> list[Any]:
    """The values that a value with lists in it stands for."""
    if isinstance(value, dict):
        several = itertools.product(*(_spread(inner) for inner in value.values()))
        return [dict(zip(value, chosen, strict=True)) for chosen in several]
    if isinstance(value, list):
        return [one for item in value for one in (_spread(item) if isinstance(item, dict) else [item])]
    return [value]


def _empty(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the settings that are lists of nothing: an arm for each of their values is none."""
    for name, value in settings.items():
        if value == []:
            yield f"{prefix}{name}"
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                yield from _empty(one, f"{prefix}{name}.")


def _said(path: str, value: Any) -> str:
    """A setting in a name."""
    name = path.rsplit(".", 1)[-1].replace("_", "-")
    if value is None:
        return ""
    if path in ("method", "position"):
        return str(value)
    if isinstance(value, bool):
        return name if value else f"no {name}"
    values = value if isinstance(value, list) else [value]
    return f"{name}={','.join(str(one).rstrip('/').rsplit('/', 1)[-1] for one in values)}"


def _controls(config: ComparisonConfig, reference: Arm) -> list[Arm]:
    """The controls that are wanted."""
    chosen, settings = config.controls, expand_settings(config, reference)
    own = {name: reference.expand[name] for name in _SIZE if name in reference.expand}
    position = position_of(reference.method, settings)
    placed = {**own, "position": position} if "position" in settings or position in POSITIONS else own
    base = for_base(reference.pretrain)
    found = []
    if chosen.base_same_tokens:
        found.append(Arm("base, same tokens", None, pretrain=base))
    if chosen.base_same_compute:
        found.append(Arm("base, same compute", None, pretrain=base, compute_of=reference.name))
    if chosen.random_zero_output:
        zero = {**placed, "zero_init": True}
        found.append(Arm("random, zero output projections", "random", zero, reference.pretrain))
    if chosen.plain_copies:
        found.append(Arm("copy", "copy", {**placed, "zero_init": False}, reference.pretrain))
    return [replace(one, control=True) for one in found]


def for_base(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of training for the base itself: there is nothing new in it."""
    return {**{name: value for name, value in settings.items() if name not in INSERTION}, "train": "all"}


def position_of(method: str | None, settings: Mapping[str, Any]) -> str | None:
    """Where an arm's new layers go: as it is set, else as the method was published."""
    published = METHODS[method].position if method in METHODS else None
    return settings.get("position") or published


def _alike(arm: Arm, control: Arm) -> bool:
    """Whether an arm of the file is what a control would be."""
    if arm.method != control.method or dict(arm.pretrain) != dict(control.pretrain):
        return False
    if arm.method is None:
        return arm.compute_of == control.compute_of
    a, b = (
        {**one.expand, "position": position_of(one.method, one.expand), "zero_init": _zeroed(one)}
        for one in (arm, control)
    )
    return a == b


def _zeroed(arm: Arm) -> bool | None:
    published = METHODS[arm.method].zero_init if arm.method in METHODS else None
    given: bool | None = arm.expand.get("zero_init")
    return published if given is None else given
