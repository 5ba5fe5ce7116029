"""Folders that a machine of the cluster does not have are told of before the work that would be lost."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lesa_ray import ExpandConfig, expand
from lesa_ray.checkpoint.mark import MARK_FILE
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed import fleet, ray_runner, rounds, shared
from lesa_ray.distributed.fleet import run_fleet
from lesa_ray.distributed.ray_runner import RayRunner
from lesa_ray.distributed.shared import Landmark, check_landmarks, data_files, landmarks
from lesa_ray.distributed.tokenize import _do
from lesa_ray.distributed.train import pretrain
from lesa_ray.errors import MachineError, UnsharedError, UserError
from lesa_ray.expansion.runner import InlineRunner
from lesa_ray.faults import going_on
from lesa_ray.fleet.graph import build
from lesa_ray.fleet.settings import FleetConfig
from lesa_ray.store.catalog import Store
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.pieces import Job
from lesa_ray.training.sources import find_sources
from lesa_ray.training.train_settings import TrainConfig
from tests.training.blocks import make_blocks

Bases = Callable[[str], str]
ELSEWHERE = Landmark("OUT /data/out", "/data/out/.lesa-ray/run.json", b"{}")


def test_a_machine_knows_a_folder_by_a_file_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_LAG_SECONDS", 0.0)
    file, large = tmp_path / "config.json", tmp_path / "large.jsonl"
    file.write_text("{}")
    large.write_bytes(b"x" * 100_000)
    found = landmarks(
        [("base b", Storage(str(tmp_path)), "config.json"), ("DATA d", Storage(str(tmp_path)), large.name)]
    )
    check_landmarks(found)
    large.write_bytes(b"y")  # only looked for: files of data are large
    check_landmarks(found)
    file.write_text("{ }")
    with pytest.raises(UnsharedError, match=r"^base b: the machine \S+ does not have it, or has another; .*s3://"):
        check_landmarks(found)
    file.write_text("{}")
    large.unlink()
    with pytest.raises(UnsharedError, match=r"^DATA d: "):
        check_landmarks(found)


def test_a_folder_that_is_away_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("{}")

    def read(*_: object) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Storage, "read", read)
    with pytest.raises(MachineError, match=r"^DATA d: .*Stale file handle; the same command") as caught:
        landmarks([("DATA d", Storage(str(tmp_path)), "a.jsonl")])
    assert str(going_on("OUT o", caught.value)) == str(caught.value)


def test_urls_are_the_same_from_everywhere() -> None:
    storage = Storage("memory://folder")
    storage.write("config.json", b"{}")
    assert landmarks([("base b", storage, "config.json")]) == ()


def test_one_file_stands_for_all_behind_a_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("1.txt", "2.txt"):
            (tmp_path / folder / name).write_text("words")
    names = [str(tmp_path / folder) for folder in ("a", "b")]
    found = landmarks(data_files(find_sources(names, None, "train")))
    assert [(one.what, one.path) for one in found] == [(f"DATA {name}", f"{name}/1.txt") for name in names]
    one_by_one = [f"{name}/{file}.txt" for name in names for file in (2, 1)]
    found = landmarks(data_files(find_sources(one_by_one, None, "train")))
    assert sorted(one.path for one in found) == [f"{name}/2.txt" for name in names]


@pytest.mark.parametrize("method", ["lesa", pytest.param("llama-pro", marks=pytest.mark.thorough)])
def test_an_expansion_ends_at_once_and_leaves_nothing(
    method: str, local_ray: None, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", landmarks
    monkeypatch.setattr(ray_runner, "landmarks", lambda places: (*real(places), ELSEWHERE))
    with pytest.raises(UserError, match=r"^OUT /data/out: the machine"):
        expand(ExpandConfig(base=bases("llama"), out=str(out), method=method), runner=RayRunner())
    assert not out.exists()


def test_it_keeps_what_was_finished_before_a_machine_joined_that_lacks_it(bases: Bases, tmp_path: Path) -> None:
    class Joined(InlineRunner):
        def run_units(self, expansion: Any, units: Any, listener: Any) -> dict[str, Any]:
            super().run_units(expansion, units[:1], listener)
            raise UnsharedError("OUT: not there")

    config = ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), method="lesa")
    with pytest.raises(UnsharedError):
        expand(config, runner=Joined())
    assert Storage(config.out).exists(MARK_FILE)
    assert expand(config, runner=InlineRunner()).resumed


@pytest.mark.thorough
def test_training_ends_at_once(local_ray: None, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = landmarks
    monkeypatch.setattr(rounds, "landmarks", lambda places: (*real(places), ELSEWHERE))
    settings = {
        "checkpoint": bases("llama"), "data": make_blocks(str(tmp_path / "blocks")), "out": str(tmp_path / "out"),
        "steps": 2, "batch": 2, "train": ["all"], "workers": 1, "cpus_per_worker": 1, "precision": "fp32",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"^OUT /data/out: the machine"):
        pretrain(TrainConfig.model_validate(settings))


def test_a_piece_of_data_is_not_written_where_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_LAG_SECONDS", 0.0)
    config = TokenizeConfig(data=[str(tmp_path)], tokenizer="t", out=str(tmp_path / "out"), seq_len=8)
    row = {"item": pickle.dumps("piece")}
    told = _do(row, lambda job, item: pytest.fail("works"), Job(config, "digest", 1, 1), (ELSEWHERE,))
    kind, why = pickle.loads(told["result"])
    assert (kind, why[:14]) == ("user", "OUT /data/out:")
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(120)
def test_a_stage_is_not_made_in_a_store_of_another_machine(
    local_ray: None, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = landmarks
    monkeypatch.setattr(
        fleet, "landmarks", lambda places: tuple(replace(one, path="/not/here") for one in real(places))
    )
    store = str(tmp_path / "store")
    config = FleetConfig.model_validate(
        {
            "name": "f", "store": store, "methods": ["llama-pro"], "stages": {"expand": {}},
            "families": [{"name": "llama", "checkpoint": bases("llama")}],
        }
    )  # fmt: skip
    (outcome,) = run_fleet(config, build(config, "file"), lambda key, text: None)
    assert (outcome.how, outcome.why.partition(":")[0]) == ("failed", f"store {store}")
    assert Store(store).finished() == []
    assert not (tmp_path / "store" / "expand").exists()
