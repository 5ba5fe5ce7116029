"""Fine-tunes of the base, from whose layers the predictor learns too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lesa_ray import ExpandConfig, MachineError, expand
from lesa_ray.config import LesaSettings
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.method import Unit
from lesa_ray.expansion.runner import InlineRunner, Listener
from tests import families

Bases = Callable[[str], str]


def test_variants_join_the_training_rows(bases: Bases, grow: Callable[..., Any], tmp_path: Path) -> None:
    """Llama and its fine-tunes (paper, section 4.4): three checkpoints give three times the triples."""
    others = [families.make("llama", tmp_path / f"tuned-{seed}", seed=seed) for seed in (1, 2)]
    reports = {
        name: grow(bases("llama"), variants=variants, lesa={"epochs": 1}).manifest
        for name, variants in {"alone": [], "joined": others}.items()
    }
    alone, joined = (reports[name]["fit"]["mlp.up_proj.weight"] for name in ("alone", "joined"))
    triples = families.LAYERS - 2
    assert alone["triples_trained"] + alone["triples_held_out"] == triples
    assert joined["triples_trained"] + joined["triples_held_out"] == 3 * triples
    assert set(reports["joined"]["identity"]["variants"]) == set(others)
    assert reports["joined"]["fingerprint"] != reports["alone"]["fingerprint"]


def test_a_variant_that_cannot_be_reached_any_more_loses_nothing(bases: Bases, tmp_path: Path) -> None:
    """It was looked at before; that it is gone from a machine later is that machine's fault."""
    tuned, out = Path(families.make("llama", tmp_path / "tuned", seed=1)), tmp_path / "out"

    class AwayAfterAUnit(InlineRunner):
        def run_units(self, expansion: Expansion, units: list[Unit], listener: Listener) -> dict[str, Any]:
            super().run_units(expansion, units[:1], listener)
            tuned.rename(tmp_path / "away")
            return super().run_units(expansion, units[1:], listener)

    config = ExpandConfig(base=bases("llama"), out=str(out), variants=(str(tuned),), lesa=LesaSettings(epochs=1))
    with pytest.raises(MachineError):
        expand(config, AwayAfterAUnit())
    assert len(list((out / ".lesa-ray" / "units").glob("*.json"))) == 1
    (tmp_path / "away").rename(tuned)
    assert expand(config, InlineRunner()).resumed
