"""What cannot be expanded is refused by what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lesa_ray import ExpandConfig, UserError
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


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "mlp.experts.gate_up_proj",
            r"holds the experts in one 3-D tensor \[3, 8, 4\], which only llama-pro",
        ),
        ("mixer.conv1d.weight", r"mixer.conv1d.weight is a 3-D tensor \[3, 8, 4\], which only llama-pro and solar"),
    ],
)
def test_3d_tensors_are_experts_only_where_they_are_named_so(name: str, says: str, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.{name}": torch.zeros(3, 8, 4) for i in range(2)}
    save_file(tensors | {f"layers.{i}.w.weight": torch.zeros(8, 8) for i in range(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of", "num_hidden_layers": 2}))
    with pytest.raises(UserError, match=says):
        prepare(ExpandConfig(base=str(tmp_path), out=str(tmp_path / "out"), method="avg-deus", zero_init=False))


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
