"""The record of a run: whole after a kill, without the steps a resumed run does again, on a disk and on S3."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.comparison.curves import curve, curve_of
from lesa_ray.errors import UserError
from lesa_ray.training import metrics
from lesa_ray.training.metrics import MetricsLog, check_loggers, metrics_rows
from tests.training.metric_rows import read_metrics
from tests.waiting import until

SETTINGS = {"lr": 1e-3, "schedule": {"kind": "cosine"}}


def start(out: str, resume_step: int = 0, loggers: tuple[str, ...] = ()) -> MetricsLog:
    return MetricsLog(out, loggers, resume_step, "run", SETTINGS)


def steps(out: str) -> list[int]:
    return [row["step"] for row in read_metrics(out)]


def board(folder: str | Path) -> dict[int, float]:
    """What TensorBoard shows for the loss: step → value."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


def record(out: str, log: MetricsLog, *at: int, loss: float = 1.0) -> None:
    for step in at:
        log.row(step, {"loss": loss * step})


def test_a_row_is_one_line_with_the_step_first(tmp_path: Path) -> None:
    log = start(str(tmp_path))
    log.row(3, {"loss": torch.tensor(2.5), "tokens": 4096, "grad_norm": float("nan"), "step_s": float("inf")})
    lines = (tmp_path / "training/metrics.jsonl").read_text()  # without flush or close
    assert lines == '{"step": 3, "loss": 2.5, "tokens": 4096, "grad_norm": null, "step_s": null}\n'
    log.close()
    assert board(tmp_path / "training/tensorboard") == {3: 2.5}


def test_a_resumed_run_cuts_the_rows_after_its_checkpoint(tmp_path: Path) -> None:
    log = start(str(tmp_path))
    record(str(tmp_path), log, 0, 1, 2, 3, 4)
    log.close()
    with open(tmp_path / "training/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    time.sleep(1 - time.time() % 1)  # TensorBoard orders files by the second in their names, then by …9, …10 as text
    log = start(str(tmp_path), resume_step=2)
    record(str(tmp_path), log, 3, loss=10)
    log.close()
    assert steps(str(tmp_path)) == [0, 1, 2, 3]
    assert board(tmp_path / "training/tensorboard") == {0: 0, 1: 1, 2: 2, 3: 30}
    start(str(tmp_path), resume_step=0).close()
    assert steps(str(tmp_path)) == []


def test_a_killed_process_loses_no_row(tmp_path: Path) -> None:
    code = (
        "import os, signal; from tests.training.test_metrics import *\n"
        f"log = start({str(tmp_path)!r}); record('', log, *range(100)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=180, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert steps(str(tmp_path)) == list(range(100))


def test_on_s3(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, scratch = f"{s3}/metrics", tmp_path / "scratch"
    killed = scratch / "lesa-ray-metrics-x"
    killed.mkdir(parents=True)
    (killed / "in-use.lock").touch()
    monkeypatch.setenv("LESA_RAY_SCRATCH", str(scratch))
    log = start(out)
    assert not killed.exists()
    record(out, log, 1, 2)
    log.flush()
    assert steps(out) == []  # 30 s have not passed
    log.flush(now=True)
    assert steps(out) == [1, 2]
    monkeypatch.setattr(metrics, "_PUT_SECONDS", 0.0)
    record(out, log, 3)
    log.flush()
    until(lambda: steps(out) == [1, 2, 3])
    record(out, log, 4)
    log.close()
    assert steps(out) == [1, 2, 3, 4]
    assert list(scratch.iterdir()) == []

    log = start(out, resume_step=2)
    record(out, log, 3, loss=10)
    log.close()
    assert steps(out) == [1, 2, 3]
    remote = Storage(f"{out}/training/tensorboard")
    assert len(remote.list()) == 2
    for name in remote.list():
        (tmp_path / name).write_bytes(remote.read(name))
    assert board(tmp_path) == {1: 1, 2: 2, 3: 30}


@pytest.mark.parametrize("where", ["disk", "S3"])
def test_rows_are_read_piece_by_piece(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path) if where == "disk" else f"{request.getfixturevalue('s3')}/pieces"
    assert list(metrics_rows(out)) == []
    lines = ['{"step": 1, "loss": 2.5}\n', '{"step": 2, "loss": 2.25}\n', '{"step": 3, "lo']
    for text, expected in (("", []), ("".join(lines[:2]), [1, 2]), ("".join(lines), [1, 2]), ('{"step": 7}', [7])):
        Storage(f"{out}/training").write("metrics.jsonl", text.encode())
        for size in (7, max(1, len(text)), 1000):
            monkeypatch.setattr(metrics, "_READ_BYTES", size)
            assert steps(out) == expected


def test_a_long_run_needs_few_rows_and_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(str(tmp_path / "other")).close()  # imports
    monkeypatch.setattr(metrics, "_READ_BYTES", 2**16)
    (tmp_path / "training").mkdir()
    with (tmp_path / "training/metrics.jsonl").open("w") as file:
        for step in range(15_001):
            row = {"step": step, "loss": 2.5, "gradient_norm": 1.0, "learning_rate": 1e-4, "tokens": 4096 * step}
            more = {"tokens_per_second": 1e4 + step, "model_flops_per_second": 1e9} if step % 20 == 0 else {}
            file.write(json.dumps({**row, **more}) + "\n" if step else "")
            if step % 500 == 7:
                file.write(json.dumps({"step": step, "heldout_loss": 3.0 - step / 1e5}) + "\n")
    tracemalloc.start()
    few = list(metrics_rows(str(tmp_path), ("heldout_loss", "tokens_per_second")))
    points = curve_of(str(tmp_path))
    few_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    start(out := str(tmp_path), resume_step=12_000).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(few) == 15_000 // 20 + 2 * 30
    assert max(few_peak, peak) < 4e6  # all rows take 10 MB, the file 1.7
    assert len(points) == 30
    assert steps(out)[-1] == 12_000
    assert curve_of(out) == curve(read_metrics(out)) == [point for point in points if point["step"] <= 12_000]


def test_a_store_that_is_away_does_not_stop_the_steps(
    s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lesa_ray.errors import MachineError

    log = start(f"{s3}/away")
    log.row(1, {"loss": 1.0})
    monkeypatch.setattr(metrics, "_PUT_SECONDS", 0.0)

    def away(*args: object) -> None:
        raise MachineError("the store does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(Storage, "write", away)
        log.flush()
        with pytest.raises(MachineError):
            log.flush(now=True)
        assert "not put this time" in caplog.text
    log.close()
    assert steps(f"{s3}/away") == [1]


def test_a_slow_store_does_not_hold_up_the_steps(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, written = threading.Event(), threading.Event(), []
    log = start(f"{s3}/slow")
    write = Storage.write

    def slow(storage: Storage, name: str, data: bytes) -> None:
        begun.set()
        assert go_on.wait(60)
        write(storage, name, data)
        written.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_PUT_SECONDS", 0.0)
        patch.setattr(Storage, "write", slow)
        for step in range(1, 4):  # one put is under way, and no other begins
            log.row(step, {"loss": 1.0})
            log.flush()
        assert begun.wait(60)
        assert not written
        threading.Timer(0.5, go_on.set).start()
        log.flush(now=True)
    assert steps(f"{s3}/slow") == [1, 2, 3]
    monkeypatch.setattr(metrics, "_PUT_SECONDS", 0.0)
    monkeypatch.setattr(metrics, "_PUT_PACE", 1e-3)
    log.row(4, {"loss": 1.0})
    log.flush()  # what is there takes long at that pace
    assert log._putting is None
    log.close()
    assert steps(f"{s3}/slow") == [1, 2, 3, 4]


def test_a_logger_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="loggers: neptune is not one; there are mlflow, wandb"):
        check_loggers(["neptune"])
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="loggers: wandb is not installed; run `pip install wandb`"):
        MetricsLog(str(tmp_path / "out"), ["wandb"], 0, "run", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_logger_that_fails_gets_no_more_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        run_id = "7"
        rows: list[int] = []  # noqa: RUF012

        def __init__(self, *args: object) -> None: ...

        def row(self, step: int, values: object) -> None:
            self.rows.append(step)
            raise ConnectionError("no route")

    monkeypatch.setattr(metrics, "find_spec", lambda name: object())
    monkeypatch.setattr(metrics, "_Mlflow", Failing)
    with caplog.at_level(logging.WARNING):
        log = start(str(tmp_path), loggers=("mlflow",))
        record(str(tmp_path), log, 1, 2)
        log.close()
    assert Failing.rows == [1]
    assert caplog.text.count("mlflow gets no more rows, training goes on: ConnectionError: no route") == 1
    assert steps(str(tmp_path)) == [1, 2]


def test_mlflow_goes_on_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="an optional client")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    out = str(tmp_path / "out")
    for resume_step, at in ((0, (1, 2, 3)), (2, (3, 4))):
        log = start(out, resume_step, ("mlflow",))
        record(out, log, *at)
        log.close()
    runs = mlflow.search_runs(output_format="list")
    assert len(runs) == 1
    assert runs[0].data.params == {"lr": "0.001", "schedule.kind": "cosine"}
    history = mlflow.MlflowClient().get_metric_history(runs[0].info.run_id, "loss")
    assert {metric.step for metric in history} == {1, 2, 3, 4}


def test_wandb_without_a_key_writes_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="an optional client")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    out = str(tmp_path / "out")
    log = start(out, 0, ("wandb",))
    record(out, log, 1, 2)
    log.close()
    (run,) = Path(out, "training/wandb").glob("offline-run-*/run-*.wandb")
    assert json.loads(Path(out, "training/loggers.json").read_bytes())["wandb"] in run.name
