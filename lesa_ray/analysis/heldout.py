"""How well a weight type's layers can be predicted from their neighbours: LESA's own fit, with no layer to make.

The same fit as an expansion's (`lesa.fit`), with the same yardsticks: R² of 0 is predicting zero, and a negative one is
worse than that. Nothing is composed or written. It costs what a unit of `lesa-ray expand` costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lesa_ray.config import LesaSettings
from lesa_ray.lesa.fit import Fit, fit_each
from lesa_ray.lesa.streams import Load


def held_out_fit(
    loads: Sequence[Load],
    layers: int,
    settings: LesaSettings,
    seed: int,
    *,
    device: str = "cpu",
    scratch_dir: str | None = None,
    memory_budget: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Scores {"loss", "r2", "cosine"} of `predictor`, `mean`, `zero` and (unless skipped) `ridge` on the layers held
    out; on those trained on where there are too few to hold any out, which `on` tells. `triples`: how many.

    loads: layer → matrix (d1, d2) of each member (the experts of a kind). Raises: UserError.
    """

    def store(member: int, slot: int, weight: Tensor) -> None:
        raise AssertionError("no layer is made")

    (report,) = fit_each(
        [Fit(loads, store, seed)],
        layers,
        (),
        settings,
        device=device,
        scratch_dir=scratch_dir,
        memory_budget=memory_budget,
        progress=progress,
    )
    scores = report.held_out or report.trained
    return {
        **{name: asdict(one) for name, one in scores.items()},
        "on": "held-out layers" if report.held_out else "training layers",
        "triples": report.triples_held_out or report.triples_scored,
    }
