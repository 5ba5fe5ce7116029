"""What cannot be expanded is refused by what it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lesa_ray import ExpandConfig
from lesa_ray.expansion import layout
from lesa_ray.expansion.methods.lesa import Lesa
from lesa_ray.expansion.prepare import prepare
from tests import families


@pytest.mark.parametrize("method", ["avg-deus", "mean-aligned"])
def test_a_slot_is_filled_after_the_new_ones_it_lies_between(
    method: str, bases: Callable[[str], str], tmp_path: Path
) -> None:
    """In a cluster nothing else keeps their order."""
    old = families.LAYERS
    laid_out = prepare(ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), method=method, layers=4 * old))
    found = {unit.name: set(unit.after) for unit in laid_out.units if unit.name != "vectors"}
    assert found == {
        f"slot-{slot.id}": {f"slot-{near}" for near in (slot.lower, slot.upper) if near is not None and near >= old}
        for slot in laid_out.job.plan.slots
    }
    assert any(len(after) == 2 for after in found.values())


def test_the_fingerprint_is_of_all_that_the_bytes_depend_on_and_of_no_place(
    bases: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is unfinished in OUT is gone on with where it is the same: else it would be put together of two models."""
    base = Path(shutil.copytree(bases("llama"), tmp_path / "base"))
    tuned = Path(families.make("llama", tmp_path / "tuned", seed=1))

    def fingerprint(**settings: object) -> str:
        given = {"base": str(base), "out": str(tmp_path / "out"), "variants": [str(tuned)], **settings}
        return prepare(ExpandConfig.model_validate(given)).fingerprint

    first = fingerprint()
    elsewhere = str(shutil.copytree(base, tmp_path / "elsewhere"))
    assert fingerprint(base=elsewhere, out=str(tmp_path / "o"), gpus_per_task=0, memory_budget="1GB") == first
    settings = [{"seed": 1}, {"cpus_per_task": 2}, {"dtype": "bfloat16"}, {"shard_size": "1MB"}, {"variants": []}]
    seen = [first, *(fingerprint(**one) for one in settings)]
    for changed in (*base.glob("*.safetensors"), *tuned.glob("*.safetensors"), base / "config.json"):
        content = changed.read_bytes()
        changed.write_bytes(content + b"\n" if changed.suffix == ".json" else content[:-1] + bytes([content[-1] ^ 1]))
        seen.append(fingerprint())
        changed.write_bytes(content)
    with monkeypatch.context() as another:
        another.setattr(layout, "__version__", "9.8.7")
        seen.append(fingerprint())
    with monkeypatch.context() as another:  # as a small budget makes it choose another way to decompose
        another.setattr(Lesa, "choices", lambda self, job: {"mlp.up_proj.weight": "other"})
        seen.append(fingerprint())
    assert fingerprint() == first
    assert len(set(seen)) == len(seen) > 9
