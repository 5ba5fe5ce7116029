"""Training by Ray Train on this machine: it learns, it does not depend on the number of workers, and faults lose
nothing: after a kill the curve goes on as if there had been none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray._private.state import actors
from transformers import AutoModelForCausalLM

from lesa_ray import MachineError, UserError
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed import cluster, rounds
from lesa_ray.distributed.room_for_workers import resources_of
from lesa_ray.distributed.tenancy import tenancy
from lesa_ray.distributed.train import pretrain
from lesa_ray.expansion.runner import Silent
from lesa_ray.machines import Machines
from lesa_ray.training import checkpoints, worker
from lesa_ray.training.finish import finish_run
from lesa_ray.training.run import LEASE_DIR, Run, claim, prepare
from lesa_ray.training.train_settings import TrainConfig
from tests.training.blocks import make_blocks
from tests.training.metric_rows import read_metrics
from tests.training.workers import run_workers
from tests.waiting import titles, until

Bases = Callable[[str], str]
Grow = Callable[..., Any]
LESA_RAY = str(Path(sys.executable).parent / "lesa-ray")


def settings(base: str, data: str, out: str, **more: Any) -> dict[str, Any]:
    return {
        "checkpoint": base, "data": data, "out": out, "steps": 60, "batch": 4, "learning_rate": 1e-2, "workers": 2,
        "cpus_per_worker": 1, "checkpoint_every": 10, "eval_every": 20, "log_every": 5, "precision": "fp32", **more,
    }  # fmt: skip


def train(base: str, data: str, out: str, **more: Any) -> Any:
    return pretrain(TrainConfig.model_validate(settings(base, data, out, **more)))


def curve(out: str) -> dict[int, tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of every step."""
    rows = [row for row in read_metrics(out) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "every step once, in order"
    return {row["step"]: (row["loss"], row["gradient_norm"], row["learning_rate"]) for row in rows}


def heldout(out: str) -> dict[int, float]:
    return {row["step"]: row["heldout_loss"] for row in read_metrics(out) if "heldout_loss" in row}


def tensors(folder: str) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_blocks(str(tmp_path_factory.mktemp("data") / "blocks"))


def worker_of(run: Run) -> None:
    worker.train(run, torch.device("cpu"), lambda _: None)


@pytest.fixture(scope="module")
def reference(bases: Bases, data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The undisturbed run of two workers, without Ray."""
    out = str(tmp_path_factory.mktemp("reference") / "out")
    run = prepare(TrainConfig.model_validate(settings(bases("llama"), data, out, train="all")), gpus=False)
    claim(run)
    run_workers(worker_of, 2, run)
    finish_run(run, Silent())
    return out


def kill_a_worker(out: str, after: int, killed: list[int]) -> threading.Thread:
    """Kill a worker of this process's Ray once some step is past."""

    def watch() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            rows = read_metrics(out)
            if rows and rows[-1]["step"] >= after:
                for pid, title in titles().items():
                    if title.startswith(b"ray::RayTrainWorker"):
                        os.kill(pid, signal.SIGKILL)
                        killed.append(rows[-1]["step"])
                        return
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.timeout(750)
def test_what_is_new_learns_and_what_is_old_stays(
    local_ray: None, grow: Grow, bases: Bases, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = grow(bases("llama"), method="llama-pro").out
    monkeypatch.chdir(tmp_path)  # which is not where workers run
    base, data, out = os.path.relpath(base), os.path.relpath(data), "trained"
    result = train(base, data, out)
    assert result.heldout_after < result.heldout_before - 0.2
    new = set(json.loads(Storage(base).read("expansion.json"))["new_layers"])
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        is_new = name.startswith("model.layers.") and int(name.split(".")[2]) in new
        assert torch.equal(tensor, after[name]) is not is_new, name
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    last = checkpoints.find_complete(out)
    assert [record.step for record in last][-2:] == [50, 60]
    again = train(base, data, out)
    assert again.reused
    assert again.heldout_after == result.heldout_after
    with pytest.raises(
        UserError, match=r"holds a run of other inputs or settings \(learning_rate: 0.01 there, 0.1 now\)"
    ):
        train(base, data, out, learning_rate=0.1)


@pytest.mark.timeout(750)
@pytest.mark.parametrize("workers", [1, 4])
def test_the_losses_do_not_depend_on_the_number_of_workers(
    workers: int, reference: str, bases: Bases, data: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    config = settings(bases("llama"), data, out, train="all", workers=workers, micro_batch=1)
    run = prepare(TrainConfig.model_validate(config), gpus=False)
    run_workers(worker_of, workers, run)
    assert np.allclose(list(curve(reference).values()), list(curve(out).values()), rtol=1e-5)
    assert np.allclose(list(heldout(reference).values()), list(heldout(out).values()), rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.timeout(750)
def test_a_killed_worker_changes_nothing(
    local_ray: None, reference: str, bases: Bases, data: str, tmp_path: Path
) -> None:
    out, killed = str(tmp_path / "out"), []
    step = int(np.random.default_rng().integers(12, 50))
    killer = kill_a_worker(out, step, killed)
    train(bases("llama"), data, out, train="all")
    killer.join(timeout=10)
    assert killed, step
    assert killed[0] < 60, step
    assert curve(out) == curve(reference), step
    assert heldout(out) == heldout(reference)
    same = tensors(out)
    assert all(torch.equal(tensor, same[name]) for name, tensor in tensors(reference).items())


@pytest.mark.timeout(840)
def test_a_killed_driver_and_the_command_run_again_with_fewer_workers(
    reference: str, bases: Bases, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = tmp_path / "train.yaml"
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    config.write_text(json.dumps(settings(bases("llama"), data, str(out), train="all")))
    command = [LESA_RAY, "pretrain", "--config", str(config)]
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: checkpoints.find_complete(str(out)), 300)
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=30)
    there = checkpoints.find_complete(str(out))
    assert there
    assert there[-1].step < 60
    assert not (out / "config.json").exists()
    done = subprocess.run(
        [*command, "--workers", "1", "--json"], env=environment, capture_output=True, text=True, timeout=450
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] is True
    whole, first = curve(reference), there[-1].step
    resumed = curve(str(out))
    assert {step: resumed[step] for step in range(1, first + 1)} == {step: whole[step] for step in range(1, first + 1)}
    assert np.allclose(list(resumed.values()), list(whole.values()), rtol=1e-5)


def test_a_half_written_checkpoint_is_not_taken(reference: str, tmp_path: Path) -> None:
    import shutil

    out = str(shutil.copytree(reference, tmp_path / "out"))
    folder = Path(out) / checkpoints.FOLDER
    assert [record.step for record in checkpoints.find_complete(out)][-2:] == [50, 60]
    shard = next((folder / "step-00000060").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert [record.step for record in checkpoints.find_complete(out)][-1] == 50
    (folder / "step-00000050" / checkpoints.COMPLETE_FILE).unlink()
    assert 50 not in [record.step for record in checkpoints.find_complete(out)]
    assert checkpoints.find_complete(out, "another run") == []


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
    local_ray: None, bases: Bases, data: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"step \d+: the (loss|gradient) is (nan|inf); the last checkpoint is kept. Lower"
    ):
        train(
            bases("llama"),
            data,
            out,
            train="all",
            learning_rate=1e30,
            clip=1e30,
            warmup=30,
            checkpoint_every=1,
            log_every=1,
        )
    for record in checkpoints.find_complete(out):
        assert record.step < 30
    assert not Storage(out).exists("config.json")
    assert not [name for name in Storage(out).within("training").folders() if name.startswith("ray-")]


@pytest.mark.timeout(600)
def test_an_interrupt_stops_the_workers_too(local_ray: None, bases: Bases, data: str, tmp_path: Path) -> None:
    """In a notebook the process and its Ray live on; so would workers that nobody stops, at a place that is free."""
    out = str(tmp_path / "out")

    def interrupt() -> None:
        until(lambda: read_metrics(out), 300)
        os.kill(os.getpid(), signal.SIGINT)

    def alive() -> list[str]:
        return [
            one["ActorClassName"]
            for one in actors().values()
            if one["State"] != "DEAD" and one["ActorClassName"].endswith(("RayTrainWorker", "TrainController"))
        ]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's processes ignore it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            train(bases("llama"), data, out, train="all", steps=1000, workers=1)
    finally:
        signal.signal(signal.SIGINT, before)
    until(lambda: not alive())
    until(lambda: cluster.free().most("CPU") == 4)
    step = read_metrics(out)[-1]["step"]
    time.sleep(1)
    assert read_metrics(out)[-1]["step"] == step


@pytest.mark.thorough
@pytest.mark.timeout(1200)
def test_a_run_takes_what_is_free_and_more_when_a_checkpoint_is_complete(
    local_ray: None, reference: str, bases: Bases, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have all four cores, then three, then none; the curve is that of a run that nothing befell."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    monkeypatch.setattr(rounds, "_FREED_SECONDS", 8.0)
    out = str(tmp_path / "out")
    config = TrainConfig.model_validate(settings(bases("llama"), data, out, train="all", workers="1-2", log_every=1))
    heard: list[str] = []

    class Heard(Silent):
        def phase(self, name: str, total: float) -> None:
            heard.append(name)

        def progress(self, done: float, detail: str) -> None:
            if done >= 12 and others:
                ray.kill(others.pop())

    class Busy:
        pass

    others = [ray.remote(num_cpus=count)(Busy).remote() for count in (3, 1)]

    def free_one() -> None:
        until(lambda: any("others use the cluster's machines" in name for name in heard))
        ray.kill(others.pop())

    until(lambda: not cluster.free().most("CPU"))
    freeing = threading.Thread(target=free_one, daemon=True)
    freeing.start()
    pretrain(config, Heard())
    freeing.join(timeout=10)
    told = [name for name in heard if "worker" in name or "is saved" in name]
    assert told[0] == "starting 1 worker"
    grown = next(index for index, name in enumerate(told) if "and there is room for more than 1 workers" in name)
    assert told[grown + 1 :] == ["starting 2 workers"]
    assert np.allclose(list(curve(out).values()), list(curve(reference).values()), rtol=1e-5)


def test_faults_are_counted_from_one_checkpoint_to_the_next() -> None:
    faults = rounds.Faults(3)
    assert [faults.pause(saved) for saved in (0, 0, 0)] == [0, 15, 60]
    assert str(faults) == "3 of 3 since the last checkpoint"
    assert [faults.pause(saved) for saved in (10, 10, 20, 20, 20, 20)] == [0, 15, 0, 15, 60, None]
    assert rounds.Faults(0).pause(0) is None


def test_cores_are_shared_out_among_the_workers() -> None:
    def of(workers: Any, nodes: list[dict[str, float]], **more: Any) -> tuple[int, int]:
        config = TrainConfig.model_validate(settings("c", "d", "o", batch=8, **more) | {"workers": workers, **more})
        resources, room = resources_of(
            config.model_copy(update={"cpus_per_worker": more.get("cpus_per_worker")}), Machines.of(nodes)
        )
        return resources.cpus, room

    assert of(1, [{"CPU": 2}]) == (2, 1)
    assert of(2, [{"CPU": 1}, {"CPU": 5}]) == (2, 2)
    assert of(4, [{"CPU": 3}, {"CPU": 3}]) == (1, 6)
    assert of((1, 2), [{"CPU": 4}]) == (2, 2)
    assert of((1, 4), [{"CPU": 3}]) == (3, 1)
    assert of(4, [{"CPU": 2}]) == (1, 2)
    assert of(2, [{"CPU": 16, "GPU": 2}]) == (1, 2)
    assert of(2, [{"CPU": 16, "GPU": 1}, {"CPU": 64}]) == (1, 1)
    assert of(2, [{"CPU": 16, "GPU": 2}], cpu_offload=True) == (8, 2)
    assert of(2, [{"CPU": 16}], cpus_per_worker=3) == (3, 5)


def test_more_workers_than_there_is_room_for(local_ray: None, bases: Bases, data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"workers 8 of 1 CPU each: the cluster can give 4; ask for fewer"):
        train(bases("llama"), data, str(tmp_path / "out"), train="all", workers=8, batch=8)
    assert not (tmp_path / "out").exists()


def test_two_at_one_place(local_ray: None, bases: Bases, data: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with (
        tenancy(out, LEASE_DIR, Silent()),
        pytest.raises(MachineError, match=f"process {os.getpid()} on .* is at work on it"),
    ):
        train(bases("llama"), data, out, train="all", steps=1, workers=1)
    assert os.listdir(tmp_path / "out" / "training") == ["lease"]


def test_a_store_that_is_not_there(local_ray: None, s3: str, bases: Bases, data: str) -> None:
    with pytest.raises(UserError, match="OUT s3://no-such-bucket/out: cannot be written"):
        train(bases("llama"), data, "s3://no-such-bucket/out", train="all")


def test_wrong_input_says_what_is_wrong_and_leaves_nothing(
    local_ray: None, bases: Bases, data: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    long = make_blocks(str(tmp_path / "long"), seq_len=128, rows=4, heldout=1)
    wide = make_blocks(str(tmp_path / "wide"), vocab=300, rows=4, heldout=1)
    empty = make_blocks(str(tmp_path / "empty"), rows=0, heldout=1)
    llama = bases("llama")
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"rows have 128 tokens, .* was made for 64; tokenize with --seq-len 64", {"data": long}),
        (r"tokens go up to 299, the vocabulary of .* has 128", {"data": wide}),
        (r"there is no row to train on", {"data": empty}),
        (r"holds no finished token blocks", {"data": str(tmp_path / "nothing")}),
        (r"train \*.nothing: matches no parameter", {"train": "*.nothing"}),
        (r"has no expansion.json.*--train all", {"train": ()}),
        (r"batch 5: cannot be divided among 2 workers", {"batch": 5}),
        (r"no such folder", {"checkpoint": str(tmp_path / "gone")}),
        (r"give steps, tokens or epochs", {"tokens": 5}),
        (r"OUT .*: is not empty", {"out": llama}),
    ]
    for message, change in cases:
        given = settings(llama, data, out, train="all") | change
        with pytest.raises((UserError, ValueError), match=message):
            pretrain(TrainConfig.model_validate(given))
        assert not Path(out).exists(), message
