"""The record of a training run: a row of numbers a step, as JSON Lines and for TensorBoard, beside the checkpoints.

Decides
- `OUT/training/metrics.jsonl` and `OUT/training/tensorboard/` are always written. A row is with the operating system
  when `row` returns, so a killed process loses none.
- Object stores cannot append. There both are written to a scratch folder and put whole beside the training, every 30 s
  at first, then the more seldom the larger they are (a second for each MB), when `flush(now=True)` is called (before a
  checkpoint counts, so that no row before it can be lost) and at the end. A row takes some 150 bytes and TensorBoard
  some 200: after 100,000 steps each put moves 37 MB.
- A resumed run cuts the rows after the step it goes on from, and tells TensorBoard to hide them.
- MLflow and Weights & Biases get the same rows through their own clients, one run of theirs for one of ours, however
  often it was resumed. They are guests: where they cannot be reached training goes on, with one warning.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import IO, Any, Protocol

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.config import flat
from lesa_ray.errors import UserError
from lesa_ray.faults import explain, is_fault
from lesa_ray.scratch import held_folder

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
_RUNS_FILE = "loggers.json"
"""Which runs of MLflow and Weights & Biases are this one's, so that a resumed run goes on in them."""
_SCRATCH = "lesa-ray-metrics-"
_PUT_SECONDS = 30.0
_PUT_PACE = 10**6
"""Bytes a second that puts take of the network at most, on average."""
_READ_BYTES = 4 * 2**20
_PACKAGES = {"mlflow": "mlflow", "wandb": "wandb"}

log = logging.getLogger(__name__)


def check_loggers(loggers: Sequence[str]) -> None:
    """Raises: UserError if one of the loggers is not known, or its client is not installed."""
    for name in loggers:
        if name not in _PACKAGES:
            raise UserError(f"loggers: {name} is not one; there are {', '.join(_PACKAGES)} (TensorBoard is always on)")
        if find_spec(_PACKAGES[name]) is None:
            raise UserError(f"loggers: {name} is not installed; run `pip install {_PACKAGES[name]}` on every node")


def metrics_rows(out: str, having: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a run, in order, a piece of the file in memory at a time. A line cut short by a kill is left out.

    having: only rows with one of these numbers, each after the last row before it that says how many tokens went by if
    it does not say so itself. Others are not parsed: they are most of a long run's."""
    wanted, tokens, before = [_key(name) for name in having], _key("tokens"), b""
    for line in _lines(Storage(f"{out}/training")):
        if not wanted:
            yield from _parsed(line)
        elif any(key in line for key in wanted):
            if tokens not in line:
                yield from _parsed(before)
            yield from _parsed(line)
            before = b""
        elif tokens in line:
            before = line


def _key(name: str) -> bytes:
    return f'"{name}":'.encode()


def _lines(storage: Storage) -> Iterator[bytes]:
    start, rest = 0, b""
    while True:
        try:
            data = storage.read(METRICS_FILE, start, start + _READ_BYTES)
        except FileNotFoundError:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
        if len(data) < _READ_BYTES:
            break
        start += len(data)
    yield rest


def _parsed(line: bytes) -> Iterator[dict[str, Any]]:
    """The row of a line, if it is one."""
    try:
        row = json.loads(line)
    except ValueError:
        return
    if isinstance(row, dict) and isinstance(row.get("step"), int):
        yield row


class MetricsLog:
    """Takes rows of numbers; used by one process (rank 0)."""

    def __init__(
        self, out: str, loggers: Sequence[str], resume_step: int, run_name: str, settings: Mapping[str, Any]
    ) -> None:
        """resume_step: the step the run goes on from; rows after it are cut (0: all rows, the run starts over).

        Raises: UserError as `check_loggers`; MachineError if the store does not answer.
        """
        check_loggers(loggers)
        from torch.utils.tensorboard import SummaryWriter

        self._storage = Storage(f"{out}/training")
        self._scratch = ExitStack()
        folder = self._storage.root if self._storage.is_local else self._scratch.enter_context(held_folder(_SCRATCH))
        self._folder = folder
        again = self._storage.exists(TENSORBOARD_DIR)
        with Storage(folder).create(METRICS_FILE) as kept:
            for row in metrics_rows(out):
                again = True
                if resume_step > 0 and row["step"] <= resume_step:
                    kept.write(_line(row))
        self._file: IO[bytes] = open(f"{folder}/{METRICS_FILE}", "ab", buffering=0)  # noqa: SIM115
        first = resume_step + 1 if resume_step else 0
        make_writer: Any = SummaryWriter  # torch has no types for it
        self._board = make_writer(f"{folder}/{TENSORBOARD_DIR}", purge_step=first if again else None)
        self._put_sizes: dict[str, int] = {}
        self._put_at = time.monotonic()
        self._putting: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1)
        self._guests = self._invite(loggers, run_name, settings, resume_step)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row. Values that are not finite are written as null."""
        numbers = {name: _number(value) for name, value in values.items()}
        self._file.write(_line({"step": step, **numbers}))
        finite = {name: value for name, value in numbers.items() if value is not None}
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)
        for guest in self._guests:
            guest.row(step, finite)

    def flush(self, now: bool = False) -> None:
        """Bring rows to the disk; to an object store if `now`, or begin to, if the last time is long enough ago.

        Raises: MachineError, only if `now`: otherwise what could not be put goes with the next time.
        """
        os.fsync(self._file.fileno())
        self._board.flush()
        if self._storage.is_local:
            return
        if now:
            self._settle()
            self._put()
        elif time.monotonic() - self._put_at >= max(_PUT_SECONDS, sum(self._put_sizes.values()) / _PUT_PACE):
            if self._putting is not None and not self._putting.done():
                return
            self._settle()
            self._putting = self._pool.submit(self._put)
        else:
            return
        self._put_at = time.monotonic()

    def _settle(self) -> None:
        """Wait for what is on its way. Raises: what is a defect."""
        putting, self._putting = self._putting, None
        try:
            if putting is not None:
                putting.result()
        except Exception as error:
            if not is_fault(error):
                raise
            log.warning("metrics: not put this time: %s", explain(error))

    def close(self) -> None:
        """Flush and let go of everything. Raises: MachineError if the store does not answer."""
        try:
            self.flush(now=True)
        finally:
            self._file.close()
            self._board.close()
            for guest in self._guests:
                guest.close()
            self._pool.shutdown()
            self._scratch.close()

    def _put(self) -> None:
        """Put the files that have grown."""
        scratch = Storage(self._folder)
        boards = [f"{TENSORBOARD_DIR}/{name}" for name in Storage(f"{self._folder}/{TENSORBOARD_DIR}").list()]
        for name in (METRICS_FILE, *boards):
            data = scratch.read(name)
            if self._put_sizes.get(name) != len(data):
                self._storage.write(name, data)
                self._put_sizes[name] = len(data)

    def _invite(
        self, loggers: Sequence[str], run_name: str, settings: Mapping[str, Any], resume_step: int
    ) -> list[_Guest]:
        """Open the runs at MLflow and Weights & Biases, those of an interrupted run again."""
        if not loggers:
            return []
        known: dict[str, str] = {}
        if resume_step and self._storage.exists(_RUNS_FILE):
            known = json.loads(self._storage.read(_RUNS_FILE))
        clients: dict[str, Callable[[], _Client]] = {
            "mlflow": lambda: _Mlflow(run_name, settings, known.get("mlflow")),
            "wandb": lambda: _Wandb(run_name, settings, known.get("wandb"), self._folder),
        }
        guests = [_Guest(name, clients[name]) for name in loggers]
        runs = {**known, **{guest.name: guest.run_id for guest in guests if guest.run_id}}
        self._storage.write(_RUNS_FILE, (json.dumps(runs) + "\n").encode())
        return guests


class _Client(Protocol):
    """What MLflow's and Weights & Biases' clients have in common here."""

    run_id: str

    def row(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _Guest:
    """A client whose failures are not the training's: the first one is warned of, then it gets no more rows."""

    def __init__(self, name: str, make: Callable[[], _Client]) -> None:
        self.name = name
        self._client: _Client | None = None
        self._try(lambda: setattr(self, "_client", make()))
        self.run_id = self._client.run_id if self._client else None

    def row(self, step: int, values: Mapping[str, float]) -> None:
        client = self._client
        if client is not None:
            self._try(lambda: client.row(step, values))

    def close(self) -> None:
        client = self._client
        if client is not None:
            self._try(client.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a client's network raises
            self._client = None
            log.warning("%s gets no more rows, training goes on: %s", self.name, explain(error))


class _Mlflow:
    """Where to: MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME, as MLflow reads them itself."""

    def __init__(self, run_name: str, settings: Mapping[str, Any], run_id: str | None) -> None:
        self._mlflow: Any = import_module("mlflow")
        run = self._mlflow.start_run(run_id=run_id, run_name=None if run_id else run_name)
        self.run_id: str = run.info.run_id
        if run_id is None:
            self._mlflow.log_params(flat(settings))

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step, run_id=self.run_id, synchronous=False)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


class _Wandb:
    """Where to: WANDB_MODE, WANDB_PROJECT and the like, as the client reads them itself; without a key it writes
    below OUT/training (or a scratch folder) for `wandb sync`."""

    def __init__(self, run_name: str, settings: Mapping[str, Any], run_id: str | None, folder: str) -> None:
        client: Any = import_module("wandb")
        online = os.environ.get("WANDB_API_KEY") or client.api.api_key
        self._run: Any = client.init(
            project=os.environ.get("WANDB_PROJECT", "lesa-ray"),
            id=run_id,
            resume="allow" if run_id else None,
            name=run_name,
            config=dict(settings),
            dir=folder,
            mode=os.environ.get("WANDB_MODE") or ("online" if online else "offline"),
        )
        self.run_id: str = self._run.id
        # Its own step only grows; a resumed run goes back to its last checkpoint.
        self._run.define_metric("*", step_metric="step")

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def _number(value: float) -> float | int | None:
    if isinstance(value, int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
