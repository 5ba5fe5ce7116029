"""Checkpoints of a run by real workers, without Ray: what is kept, what a fault leaves, who may read them."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.training import checkpoints
from lesa_ray.training.trained_state import TrainedState
from tests.training.workers import run_workers

Trained = dict[str, nn.Parameter]


def made(width: int = 5) -> tuple[Trained, torch.optim.AdamW]:
    """This worker's shards of a small model (5 and 7 rows: no number of workers but 1 divides them) and its AdamW."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 5), nn.Linear(5, 7))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    trained = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(list(trained.values()))
    checkpoints.init_optimizer_state(optimizer)
    return trained, optimizer


def fill(trained: Trained, optimizer: torch.optim.AdamW, step: int) -> None:
    """Values that tell which step they are of, the same for any number of workers."""
    for index, tensor in enumerate(checkpoints.state_of(trained, optimizer).values()):
        whole = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1000 * step + index))
        begin = dist.get_rank() * -(-tensor.shape[0] // dist.get_world_size())
        local = tensor.to_local()
        local.copy_(whole[begin : begin + len(local)])


def whole(trained: Trained, optimizer: torch.optim.AdamW) -> dict[str, np.ndarray]:
    return {name: t.full_tensor().numpy() for name, t in checkpoints.state_of(trained, optimizer).items()}


def saver(out: str, keep: int = 2) -> checkpoints.Saver:
    return checkpoints.Saver(out, "identity", keep, dist.new_group(backend="gloo"))


def steps(out: str) -> list[int]:
    return [record.step for record in checkpoints.find_complete(out, "identity")]


def save_all(out: str, losses: list[float | None], keep: int = 2) -> dict[str, np.ndarray]:
    """A checkpoint for each of the losses, step 1 on; the last state."""
    trained, optimizer = made()
    writer = saver(out, keep)
    for step, loss in enumerate(losses, start=1):
        fill(trained, optimizer, step)
        writer.save(step, step * 10, loss, trained, optimizer)
    writer.wait()
    return whole(trained, optimizer)


def load_step(out: str, step: int, then_save: int | None = None) -> dict[str, np.ndarray]:
    trained, optimizer = made()
    record = next(record for record in checkpoints.find_complete(out) if record.step == step)
    checkpoints.load(out, record, trained, optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {step}
    if then_save is not None:
        writer = saver(out)
        writer.save(then_save, 0, None, trained, optimizer)
        writer.wait()
    return whole(trained, optimizer)


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.timeout(180)
def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    folder = tmp_path / "out" / checkpoints.FOLDER
    for step in ("step-00000000", "step-00000003", "step-00000005"):
        (folder / step).mkdir(parents=True)
        for name in ("__5_0.distcp", ".__0_0.distcp.0123abcd.tmp"):
            (folder / step / name).write_bytes(b"of an earlier try with six workers, killed")
    others = {"best-so-far", "step-00000001-copy", "step-1"}
    for name in others:
        (folder / name).mkdir()
    run_workers(save_all, 2, out, [0.5, 0.1, None, 0.4, 0.3])
    assert steps(out) == [2, 4, 5]
    kept = {"step-00000002", "step-00000004", "step-00000005"}
    assert {path.name for path in folder.iterdir()} == kept | others
    assert checkpoints.best_of(checkpoints.find_complete(out)).step == 2
    names = {path.name for path in (folder / "step-00000005").iterdir()}
    assert names == {"__0_0.distcp", "__1_0.distcp", ".metadata", "complete.json"}
    content = json.loads((folder / "step-00000005" / "complete.json").read_text())
    assert content["files"].keys() == names - {"complete.json"}
    assert content["tokens"] == 50


def test_only_whole_checkpoints_of_this_run_count_and_the_later_of_equally_good_ones(tmp_path: Path) -> None:
    def write(step: int, loss: float | None, folder: str = "", **other: Any) -> checkpoints.Record:
        place = tmp_path / checkpoints.FOLDER / (folder or checkpoints.folder_name(step))
        place.mkdir(parents=True)
        (place / "shard").write_bytes(b"four")
        record = checkpoints.Record("identity", step, 0, loss, ["a"], {"shard": 4})
        (place / checkpoints.COMPLETE_FILE).write_text(json.dumps(asdict(record) | other))
        return record

    mine = [write(5, 0.3), write(20_000_000, None), write(100_000_000, 0.3), write(7, 0.4)]
    write(8, 0.1, identity="another run")
    write(9, 0.1, format=2)
    write(10, 0.1, files={"shard": 5})
    write(11, 0.1, files={"shard": 4, "gone": 4})
    write(12, 0.1, folder="step-00000013")
    write(14, 0.1)
    (tmp_path / checkpoints.FOLDER / "step-00000014" / checkpoints.COMPLETE_FILE).write_text("{")
    found = checkpoints.find_complete(str(tmp_path), "identity")
    assert found == sorted(mine, key=lambda record: record.step)
    best = checkpoints.best_of(found)
    assert best is not None
    assert best.step == 100_000_000
    assert checkpoints.best_of([mine[1]]) is None


def save_slowly(out: str, slow_rank: int) -> list[bool]:
    """Two checkpoints while one worker's disk waits for the first look; whether the first was complete after each."""
    looks: list[bool] = []
    if dist.get_rank() == slow_rank:
        fast = Storage.create

        def slow(self: Storage, name: str) -> Any:
            while not looks:
                time.sleep(0.01)
            time.sleep(0.7)  # the other's look
            return fast(self, name)

        Storage.create = slow  # type: ignore[method-assign]
    trained, optimizer = made()
    writer = saver(out)
    fill(trained, optimizer, 1)
    writer.save(1, 0, None, trained, optimizer)
    while not any(looks) and len(looks) < 200:
        fill(trained, optimizer, 99)  # training goes on
        time.sleep(0.02 if dist.get_rank() else 0.1)
        writer.poll()
        dist.barrier()
        looks.append(steps(out) == [1])
    fill(trained, optimizer, 2)
    writer.save(2, 0, None, trained, optimizer)
    fill(trained, optimizer, 3)
    writer.save(3, 0, None, trained, optimizer)  # due while 2 is under way
    fill(trained, optimizer, 99)
    writer.wait()
    return looks


@pytest.mark.timeout(270)
@pytest.mark.parametrize("slow_rank", [0, 1])
def test_training_goes_on_while_a_checkpoint_is_written(slow_rank: int, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    looks = run_workers(save_slowly, 2, out, slow_rank, timeout=180)
    assert looks[0][0] is False, "training waited for the disk"
    assert looks[0][-1] is True, "not complete before the next was due"
    assert steps(out) == [2, 3]
    state = TrainedState(str(tmp_path / "out" / checkpoints.FOLDER / "step-00000002"))
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(2002))  # of step 2, third of its tensors
    assert torch.equal(state.read("1.weight"), values)


@pytest.mark.timeout(270)
def test_any_number_of_workers_reads_what_any_other_wrote(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    written = run_workers(save_all, 2, out, [None])[0]
    assert written["model.0.weight"].std() > 0.5
    assert same(run_workers(load_step, 1, out, 1, 2)[0], written)
    assert same(run_workers(load_step, 3, out, 2)[2], written)
    record = checkpoints.find_complete(out)[0]
    with pytest.raises(UserError, match="holds other parameters than are to be trained now"):
        checkpoints.load(out, record, {}, torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))
    state = TrainedState(str(tmp_path / "out" / checkpoints.FOLDER / "step-00000002"))
    assert np.array_equal(state.read("1.weight").numpy(), written["model.1.weight"])


def fill_the_disk(out: str, free_again: bool) -> str:
    trained, optimizer = made(width=8000)  # each worker's file is some 200 to 300 KB
    writer = saver(out, keep=1)
    fill(trained, optimizer, 1)
    writer.save(1, 0, None, trained, optimizer)
    writer.wait()
    filler = Path(out).parent / "filler"
    if dist.get_rank() == 0:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**12))
            except OSError:
                pass
    dist.barrier()
    fill(trained, optimizer, 2)
    writer.save(2, 0, None, trained, optimizer)
    with pytest.raises(MachineError) as error:
        writer.wait()
    if free_again:
        dist.barrier()
        filler.unlink(missing_ok=True)
        dist.barrier()
        writer.save(2, 0, None, trained, optimizer)
        writer.wait()
    return str(error.value)


@pytest.mark.timeout(270)
@pytest.mark.parametrize("small_disk", ["2m"], indirect=True)
@pytest.mark.parametrize("free_again", [False, True])
def test_a_full_disk_leaves_the_earlier_checkpoint(free_again: bool, small_disk: Path) -> None:
    out = str(small_disk / "out")
    for message in run_workers(fill_the_disk, 2, out, free_again):
        assert "step-00000002: cannot be written (no space left on the device" in message
        assert re.search(r"; the disk has \d+\.\d+ [kMGT]B free", message)
    assert steps(out) == ([2] if free_again else [1])
    (small_disk / "filler").unlink(missing_ok=True)
    assert not list(small_disk.rglob("*.tmp"))
