"""A small comparison, as planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lesa_ray.comparison.graph import Comparison, PlannedArm, build
from lesa_ray.comparison.settings import ComparisonConfig
from lesa_ray.config import validated


def content(given: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "c",
        "store": str(given / "store"),
        "base": str(given / "base"),
        "blocks": str(given / "blocks"),
        "tokens": 1000,
        "seeds": [0, 1],
        "arms": [{"method": ["lesa", "avg-deus"]}],
        "expand": {"factor": 1.4, "lesa": {"epochs": 1}},
        "pretrain": {"batch": 4},
        **changes,
    }


def made(given: Path, **changes: Any) -> Comparison:
    return build(validated(ComparisonConfig, content(given, **changes), "file"), "file")


def planned(comparison: Comparison) -> dict[str, PlannedArm]:
    return {arm.arm.name: arm for arm in comparison.arms}


def digests(comparison: Comparison) -> dict[str, str]:
    return {stage.id: stage.identity.digest for stage in comparison.stages if stage.identity}
