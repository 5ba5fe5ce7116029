"""Training checkpoints that cannot be exported: damaged, foreign, or made to run code."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from lesa_ray.errors import MachineError, UserError
from lesa_ray.training.state_files import StateReader
from tests import families
from tests.training.exporting import changed, in_new_layers, run, save_state


def test_a_tensor_that_is_not_a_number_leaves_nothing(tmp_path: Path) -> None:
    base = families.make("llama", tmp_path / "base", dtype=torch.float16)
    trained = changed(base, in_new_layers)
    name = "model.layers.3.mlp.up_proj.weight"
    trained[name][0, 0] = 1e5  # a number, but none of float16's
    state = save_state(str(tmp_path / "state"), trained)
    (tmp_path / "out/training").mkdir(parents=True)
    (tmp_path / "out/training/metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=rf"{name} holds NaN or Inf in float16"):
        run(base, state, str(tmp_path / "out"))
    assert [str(f.relative_to(tmp_path)) for f in (tmp_path / "out").rglob("*.*")] == ["out/training/metrics.jsonl"]


def test_states_that_cannot_be_exported(tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"nowhere: there is no \.metadata in it"):
        run(base, str(tmp_path / "nowhere"), out)
    foreign = save_state(str(tmp_path / "foreign"), {"model.layers.9.mlp.up_proj.weight": torch.ones(96, 64)})
    with pytest.raises(
        UserError, match=r"trained model\.layers\.9\.mlp\.up_proj\.weight, which checkpoint .* not have"
    ):
        run(base, foreign, out)
    wide = save_state(str(tmp_path / "wide"), {"model.layers.1.mlp.up_proj.weight": torch.ones(97, 64)})
    with pytest.raises(UserError, match=r"is \[97, 64\], .* is \[96, 64\]"):
        run(base, wide, out)
    none = save_state(str(tmp_path / "none"), {})
    with pytest.raises(UserError, match="holds no trained parameter"):
        run(base, none, out)
    part = save_state(str(tmp_path / "part"), changed(base, in_new_layers))
    config = json.loads((tmp_path / "base/config.json").read_text())
    with pytest.raises(UserError, match=r"lacks model\.embed_tokens\.weight, so it cannot be exported without a base"):
        run(None, part, out, config=config)
    whole = families.tensors(base)
    more = save_state(str(tmp_path / "more"), {**whole, "model.layers.9.mlp.up_proj.weight": torch.ones(96, 64)})
    with pytest.raises(UserError, match=r"holds model\.layers\.9\.mlp\.up_proj.*has no place for"):
        run(None, more, out, config=config)
    with pytest.raises(UserError, match="configuration is needed"):
        run(None, part, out)
    assert not (tmp_path / "out").exists()


def test_a_damaged_state(tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    state = tmp_path / "state"
    save_state(str(state), changed(base, in_new_layers))
    (file,) = state.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with pytest.raises(UserError, match=r"training checkpoint .*state: is damaged"):
        run(base, str(state), str(tmp_path / "out"))
    file.unlink()
    with pytest.raises(UserError, match="is damaged"):
        run(base, str(state), str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.*"))


@pytest.mark.parametrize("fault", [PermissionError("not yours"), OSError("input/output error"), TypeError("of s3fs")])
def test_what_may_be_better_next_time_is_no_damage(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    state = save_state(str(tmp_path / "state"), changed(base, in_new_layers))

    def failing(*_: object) -> None:
        raise fault

    monkeypatch.setattr(StateReader, "read_data", failing)
    with pytest.raises(MachineError, match=r"training checkpoint .*state: cannot be read"):
        run(base, state, str(tmp_path / "out"))


def test_a_part_of_a_tensor_that_no_worker_wrote_is_no_weight(tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    name = "model.layers.1.mlp.up_proj.weight"
    trained = changed(base, lambda one: one == name)
    half = {name: trained[name][: len(trained[name]) // 2].clone()}
    state = save_state(str(tmp_path / "state"), half)
    file = tmp_path / "state/.metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata[f"model.{name}"].size = trained[name].shape
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=rf"{name} holds NaN"):
        run(base, state, str(tmp_path / "out"))


class Runs:
    """A pickle of it makes a folder where it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.place),)


def test_what_a_state_says_is_not_run(tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    state = tmp_path / "state"
    save_state(str(state), changed(base, in_new_layers))
    file = state / ".metadata"
    whole = file.read_bytes()

    def refused(content: object, said: str) -> None:
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=rf"training checkpoint .*state: is damaged \(.*{said}"):
            run(base, str(state), str(tmp_path / "out"))
        assert {path.name for path in tmp_path.iterdir()} == {"base", "state"}

    refused(Runs(tmp_path / "made"), r"it holds posix\.mkdir, which no checkpoint of tensors does")
    metadata = pickle.loads(whole)
    metadata.storage_meta.save_id = Runs(tmp_path / "made")
    refused(metadata, r"posix\.mkdir")
    metadata = pickle.loads(whole)
    metadata.state_dict_metadata["model.lm_head.weight"] = BytesStorageMetadata()  # PyTorch unpickles what it reads
    refused(metadata, "BytesStorageMetadata")
    metadata = pickle.loads(whole)
    next(iter(metadata.storage_data.values())).relative_path = "../other/__0_0.distcp"
    refused(metadata, "names a file outside of the checkpoint")
    refused({"a": "mapping"}, "is not the metadata of a checkpoint")
    file.write_bytes(b"\x80\x04}R.")
    with pytest.raises(UserError, match="is damaged"):
        run(base, str(state), str(tmp_path / "out"))
