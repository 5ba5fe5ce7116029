"""Killed workers, killed drivers, full disks: nothing half-written counts; the same command gives the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from lesa_ray import ExpandConfig, MachineError, UserError, expand
from lesa_ray.checkpoint.mark import LEASE_DIR
from lesa_ray.checkpoint.shards import Shard
from lesa_ray.distributed import ray_runner
from lesa_ray.distributed.ray_runner import RayRunner
from lesa_ray.distributed.tenancy import tenancy
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.runner import InlineRunner, Listener, Silent
from tests.waiting import titles, until

Bases = Callable[[str], str]
LESA_RAY = str(Path(sys.executable).parent / "lesa-ray")
SLOW: dict[str, Any] = {"method": "lesa", "lesa": {"epochs": 60}}  # some seconds a unit


def contents(folder: str) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in Path(folder).iterdir()}


def same(one: str, two: str) -> list[str]:
    a, b = contents(one), contents(two)
    assert a.keys() == b.keys()
    return [name for name in a if a[name] != b[name]]


@pytest.mark.usefixtures("local_ray")
def test_one_process_and_four_workers_give_the_same_bytes(bases: Bases, tmp_path: Path) -> None:
    for method in ("lesa", "opt-deus", "solar", "aligned-lesa"):
        outs = [str(tmp_path / f"{method}-{runner}") for runner in ("inline", "ray")]
        expand(ExpandConfig(base=bases("llama"), out=outs[0], method=method), runner=InlineRunner())
        expand(ExpandConfig(base=bases("llama"), out=outs[1], method=method), runner=RayRunner())
        assert same(*outs) == []


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("method", ["lesa", "solar"])
def test_places_may_be_relative_to_a_folder_that_is_not_the_workers(
    method: str, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bases("llama"), tmp_path / "base")
    shutil.copytree(bases("llama"), tmp_path / "variant")
    monkeypatch.chdir(tmp_path)
    variants = ("variant",) if method == "lesa" else ()
    for out, runner in (("inline", InlineRunner()), ("ray", RayRunner())):
        expand(ExpandConfig(base="base", out=out, method=method, variants=variants), runner=runner)
    assert same("inline", "ray") == []


@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_is_replaced_and_the_result_is_the_same(bases: Bases, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 300
        while not killed and time.monotonic() < deadline:
            for pid, title in titles().items():
                if title.startswith(b"ray::unit mlp.gate_proj"):
                    time.sleep(0.3)
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    disturbed = expand(
        ExpandConfig.model_validate({"base": bases("llama"), "out": str(tmp_path / "a"), **SLOW}), RayRunner()
    )
    killer.join(timeout=180)
    assert killed
    expand(ExpandConfig.model_validate({"base": bases("llama"), "out": str(tmp_path / "b"), **SLOW}), InlineRunner())
    assert same(disturbed.out, str(tmp_path / "b")) == []


@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(360)
def test_a_fault_of_one_unit_costs_nothing_of_those_that_have_begun(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, noted = ray_runner._unit_task, tmp_path / "begun"

    def faulty(expansion: Expansion, unit: Any, share: Any, board: Any, folders: Any) -> Any:
        if unit.name != "mlp.gate_proj.weight":
            return real(expansion, unit, share, board, folders)
        while not (begun := ray.get(board.get.remote())):
            time.sleep(0.02)
        if not noted.exists():  # Ray tries it again
            noted.write_text("\n".join(begun))
        raise MachineError("the disk is full")

    monkeypatch.setattr(ray_runner, "_unit_task", faulty)
    config = ExpandConfig.model_validate({"base": bases("llama"), "out": str(tmp_path / "out"), **SLOW})
    with pytest.raises(MachineError, match="the disk is full; the same command goes on from here"):
        expand(config, RayRunner())
    finished = {f.stem for f in (tmp_path / "out" / ".lesa-ray" / "units").glob("*.json")}
    assert set(noted.read_text().split("\n")) <= finished
    monkeypatch.undo()
    assert expand(config, RayRunner()).resumed


def test_a_killed_driver_and_the_command_run_again(bases: Bases, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [LESA_RAY, "expand", bases("llama"), str(out), "--epochs", "60", "--json"]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    units = out / ".lesa-ray" / "units"
    until(lambda: list(units.glob("*.json")), 300)
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=30)
    done = {f.name for f in units.glob("*.json")}
    assert 0 < len(done) < 7
    assert not (out / "config.json").exists()
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["resumed"] is True
    again = str(tmp_path / "undisturbed")
    expand(ExpandConfig.model_validate({"base": bases("llama"), "out": again, **SLOW}), runner=InlineRunner())
    assert same(str(out), again) == []


class Dies(InlineRunner):
    """Is lost (as by SIGKILL, but in this process) after some units or shards."""

    def __init__(self, units: int, shards: int) -> None:
        super().__init__()
        self.units, self.shards = units, shards

    def run_units(self, expansion: Expansion, units: list[Any], listener: Listener) -> dict[str, Any]:
        records = super().run_units(expansion, units[: self.units], listener)
        if len(records) < len(units):
            raise KeyboardInterrupt
        return records

    def write_shards(self, expansion: Expansion, shards: list[Shard], listener: Listener) -> None:
        super().write_shards(expansion, shards[: self.shards], listener)
        if self.shards < len(shards):
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["lesa", "opt-deus", "solar"])
def test_interrupted_anywhere_it_goes_on_and_does_nothing_twice(method: str, bases: Bases, tmp_path: Path) -> None:
    config = ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), method=method, shard_size="200KB")
    done: list[str] = []

    class Counts(Dies):
        def run_units(self, expansion: Expansion, units: list[Any], listener: Listener) -> dict[str, Any]:
            done.extend(unit.name for unit in units[: self.units])
            return super().run_units(expansion, units, listener)

        def write_shards(self, expansion: Expansion, shards: list[Shard], listener: Listener) -> None:
            done.extend(shard.file for shard in shards[: self.shards])
            super().write_shards(expansion, shards, listener)

    for _ in range(12):
        try:
            result = expand(config, runner=Counts(units=2, shards=2))
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out" / "config.json").exists()
    else:
        pytest.fail("never finished")
    assert result.resumed
    assert len(done) == len(set(done)) > 5
    expand(config.model_copy(update={"out": str(tmp_path / "straight")}), runner=InlineRunner())
    assert same(result.out, str(tmp_path / "straight")) == []


def test_a_budget_that_is_too_small_costs_nothing_that_is_finished(bases: Bases, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = ExpandConfig(base=bases("llama"), out=str(out), method="lesa")
    with pytest.raises(KeyboardInterrupt):
        expand(config, runner=Dies(units=2, shards=0))
    finished = sorted((out / ".lesa-ray" / "units").iterdir())
    assert len(finished) == 4
    for gpus in (0, None):  # refused before anything is started; by the unit itself, which finds no GPU
        tight = config.model_copy(update={"memory_budget": 300_000, "gpus_per_task": gpus})
        with pytest.raises(UserError, match=r"^--memory-budget 300.0 kB: .* needs .*; give that much"):
            expand(tight, runner=InlineRunner())
        assert sorted((out / ".lesa-ray" / "units").iterdir()) == finished
    assert expand(config, runner=InlineRunner()).resumed
    with pytest.raises(UserError, match=r"^--memory-budget 300.0 kB"):
        expand(tight.model_copy(update={"out": str(tmp_path / "new")}), runner=InlineRunner())
    assert not (tmp_path / "new").exists()


def test_who_comes_second_harms_nothing_of_whom_is_at_work(bases: Bases, tmp_path: Path) -> None:
    """As a job that is started again too early, here with too little memory: it would give up, and tidy OUT."""
    out = tmp_path / "out"
    config = ExpandConfig(base=bases("llama"), out=str(out), method="lesa")
    tight = config.model_copy(update={"memory_budget": 300_000})

    class Visited(InlineRunner):
        def run_units(self, expansion: Expansion, units: list[Any], listener: Listener) -> dict[str, Any]:
            with pytest.raises(MachineError, match=rf"OUT .*: process {os.getpid()} on .* is at work on it"):
                expand(tight, runner=InlineRunner())
            return super().run_units(expansion, units, listener)

    assert not expand(config, runner=Visited()).resumed
    assert not (out / ".lesa-ray").exists()
    assert expand(tight, runner=InlineRunner()).reused


def test_one_that_was_killed_before_it_had_marked_out_leaves_a_place_to_begin(bases: Bases, tmp_path: Path) -> None:
    config = ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), method="solar")
    with tenancy(config.out, LEASE_DIR, Silent()):
        pass
    assert (tmp_path / "out/.lesa-ray/lease").exists()
    assert not expand(config).resumed


def test_a_file_of_the_work_that_was_cut_is_made_again(bases: Bases, tmp_path: Path) -> None:
    """As a file system may leave it after a power failure: the name is there, the bytes are not."""
    out = tmp_path / "out"
    config = ExpandConfig.model_validate({"base": bases("llama"), "out": str(out), "method": "avg-deus"})
    with pytest.raises(KeyboardInterrupt):
        expand(config, runner=Dies(units=99, shards=1))
    for cut in (next((out / ".lesa-ray" / "units").glob("slot-*.safetensors")), next(out.glob("model-*.safetensors"))):
        cut.write_bytes(cut.read_bytes()[:-100])
    result = expand(config, runner=InlineRunner())
    assert result.resumed
    undisturbed = config.model_copy(update={"out": str(tmp_path / "undisturbed")})
    expand(undisturbed, runner=InlineRunner())
    assert same(str(out), undisturbed.out) == []


def test_other_settings_do_not_touch_an_unfinished_run(bases: Bases, tmp_path: Path) -> None:
    config = ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        expand(config, runner=Dies(units=3, shards=0))
    with pytest.raises(UserError, match="unfinished expansion of other inputs or settings"):
        expand(config.model_copy(update={"seed": 1}), runner=InlineRunner())
    assert expand(config, runner=InlineRunner()).resumed


def test_a_disk_without_room_is_told_before_anything_is_written(bases: Bases, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(60 * 2**20))
    with pytest.raises(MachineError, match=r"needs .* [GM]B, the disk has .* [GMk]B free"):
        expand(ExpandConfig(base=bases("llama"), out=str(small_disk / "out"), method="solar"))
    assert [f.name for f in small_disk.iterdir()] == ["filler"]


def test_what_killed_tries_left_makes_room_for_the_next(bases: Bases, small_disk: Path) -> None:
    config = ExpandConfig(base=bases("llama"), out=str(small_disk / "out"))
    with pytest.raises(KeyboardInterrupt):
        expand(config, runner=Dies(units=3, shards=0))
    left = [small_disk / "out" / ".model-00001-of-00001.safetensors.x1.tmp"]
    left.append(small_disk / "out" / ".lesa-ray" / "units" / ".mlp.down_proj.weight.safetensors.x2.tmp")
    for file in left:
        file.write_bytes(bytes(25 * 2**20))
    assert expand(config, runner=InlineRunner()).resumed
    assert not any(file.exists() for file in left)


def test_a_disk_that_fills_up_loses_nothing(bases: Bases, small_disk: Path, tmp_path: Path) -> None:
    filler = small_disk / "filler"

    class Fills(InlineRunner):
        """Something else takes the disk's room while the work is going on."""

        def write_shards(self, expansion: Expansion, shards: list[Shard], listener: Listener) -> None:
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(2**12))
            super().write_shards(expansion, shards, listener)

    config = ExpandConfig(base=bases("llama"), out=str(small_disk / "out"))
    with pytest.raises(MachineError, match=r"no space left on the device.*the same command goes on"):
        expand(config, runner=Fills())
    assert not (small_disk / "out" / "config.json").exists()
    filler.unlink()
    result = expand(config, runner=InlineRunner())
    assert result.resumed
    expand(config.model_copy(update={"out": str(tmp_path / "roomy")}), runner=InlineRunner())
    assert same(result.out, str(tmp_path / "roomy")) == []


@pytest.mark.usefixtures("local_ray")
def test_wrong_input_found_by_a_task_leaves_nothing_behind(bases: Bases, tmp_path: Path) -> None:
    import shutil

    from tests.test_cli import poison

    base = Path(shutil.copytree(bases("llama"), tmp_path / "base"))
    poison(base, "model.layers.2.self_attn.v_proj.weight", float("nan"))
    with pytest.raises(UserError, match=r"model.layers.2.self_attn.v_proj.weight holds NaN or Inf"):
        expand(ExpandConfig(base=str(base), out=str(tmp_path / "out")), runner=RayRunner())
    assert not (tmp_path / "out").exists()
