"""Training with everything on S3 (base, token blocks, OUT), through the command line and an embedded Ray, two workers,
on a real S3 server that goes away for a while, and refuses or cuts off one request in ten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from s3fs import S3FileSystem

from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed.export import export_checkpoint
from lesa_ray.distributed.train import pretrain
from lesa_ray.expansion.runner import Silent
from lesa_ray.training import checkpoints, worker
from lesa_ray.training.finish import finish_run
from lesa_ray.training.run import Run, claim, prepare
from lesa_ray.training.train_settings import TrainConfig
from tests.moody import Moody
from tests.training.blocks import make_blocks
from tests.training.metric_rows import read_metrics
from tests.training.workers import run_workers

Bases = Callable[[str], str]
LESA_RAY = str(Path(sys.executable).parent / "lesa-ray")
STEPS, EVERY = 24, 6


def settings(base: str, data: str, out: str, **more: Any) -> dict[str, Any]:
    return {
        "checkpoint": base, "data": data, "out": out, "train": "all", "steps": STEPS, "batch": 4, "workers": 2,
        "cpus_per_worker": 1, "learning_rate": 1e-2, "precision": "fp32", "checkpoint_every": EVERY,
        "eval_every": 12, "log_every": 3, **more,
    }  # fmt: skip


def command(folder: Path, base: str, data: str, out: str, **more: Any) -> list[str]:
    path = folder / "train.yaml"
    path.write_text(json.dumps(settings(base, data, out, **more)))
    return [LESA_RAY, "pretrain", "--config", str(path), "--json"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "RAY_ADDRESS": "local", **more}


def run(words: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=environment(**more), capture_output=True, text=True, timeout=660, check=False)


def curve(out: str) -> list[dict[str, float]]:
    """What each step gave, without its times."""
    numbers = ("step", "loss", "gradient_norm", "learning_rate", "heldout_loss")
    return [{name: row[name] for name in numbers if name in row} for row in read_metrics(out)]


def tensors(url: str) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(url)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same_as(reference: str, out: str) -> None:
    assert curve(out) == curve(reference)
    expected, found = tensors(reference), tensors(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert [record.step for record in checkpoints.find_complete(out)] == [
        record.step for record in checkpoints.find_complete(reference)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_blocks(str(tmp_path_factory.mktemp("data") / "blocks"))


def worker_of(job: Run) -> None:
    worker.train(job, torch.device("cpu"), lambda _: None)


@pytest.fixture(scope="module")
def reference(bases: Bases, data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same run on local disks, by two workers without Ray."""
    out = str(tmp_path_factory.mktemp("reference") / "out")
    job = prepare(TrainConfig.model_validate(settings(bases("llama"), data, out)), gpus=False)
    claim(job)
    run_workers(worker_of, 2, job)
    finish_run(job, Silent())
    return out


@pytest.fixture(scope="module")
def remote(s3: str, bases: Bases, data: str) -> tuple[str, str]:
    """The base and the token blocks on S3."""
    base, blocks = Storage(f"{s3}/train/base"), Storage(f"{s3}/train/blocks")
    for source, target in ((bases("llama"), base), (data, blocks)):
        for file in Path(source).rglob("*"):
            if file.is_file():
                target.write(str(file.relative_to(source)), file.read_bytes())
    return base.url, blocks.url


@pytest.fixture
def moody(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moody]:
    proxy = Moody(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")  # botocore waits up to 20 s before it asks again
    yield proxy
    proxy.stop()


@pytest.mark.thorough
@pytest.mark.timeout(1440)
def test_a_store_that_goes_away_in_the_middle_comes_back_and_is_moody_ever_after(
    s3: str, reference: str, remote: tuple[str, str], moody: Moody, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone at a checkpoint; then one request in ten fails, refused or cut off, through training and export."""
    out, exported = f"{s3}/train/out", f"{s3}/train/exported"
    # No retry by Ray Train: that no fault of a request is seen above the storage is what is tested.
    words = command(tmp_path, *remote, out, retries=0)
    moody.leaves = lambda request: request.startswith("PUT ") and "/step-00000018/" in request
    stopped = run(words, AWS_ENDPOINT_URL=moody.url)
    assert [record.step for record in checkpoints.find_complete(out)] == [6, 12]
    assert stopped.returncode == 1
    last = stopped.stderr.strip().splitlines()[-1]
    assert last.startswith("lesa-ray: training stopped: ")
    assert "the store does not answer" in last
    assert last.endswith("the same command goes on from the last checkpoint")
    assert not Storage(out).exists("config.json")
    moody.come_back()
    moody.refuses = lambda number: number % 20 == 0
    moody.cuts = lambda number: number % 20 == 10
    done = run(words, AWS_ENDPOINT_URL=moody.url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] is True
    assert min(moody.refused, moody.cut) > 8
    same_as(reference, out)
    there, local = Storage(out), Storage(reference)
    assert there.list().keys() == local.list().keys()
    assert there.folders() == ("training",)
    # A lease whose release was refused stays, and runs out.
    assert set(there.within("training").folders()) - {"lease"} == {"checkpoints", "tensorboard"}
    assert there.within("training").list().keys() == local.within("training").list().keys()
    assert pretrain(TrainConfig.model_validate(settings(*remote, out, retries=0))).reused
    monkeypatch.setenv("AWS_ENDPOINT_URL", moody.url)
    S3FileSystem.clear_instance_cache()
    export_checkpoint(out, exported, "last")
    monkeypatch.undo()
    S3FileSystem.clear_instance_cache()
    assert all(torch.equal(tensor, tensors(exported)[name]) for name, tensor in tensors(out).items())
