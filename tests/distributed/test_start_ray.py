"""Which Ray is taken, and what of the driver's environment reaches tasks on a running cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from lesa_ray import ExpandConfig, MachineError, UserError, expand
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed import start
from lesa_ray.distributed.address import check_address, started_here
from lesa_ray.distributed.analyze import analyze
from lesa_ray.distributed.evaluate import evaluate
from lesa_ray.distributed.expand import _default_runner
from lesa_ray.distributed.start import start_ray
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.expansion.runner import Silent
from tests.evaluation import tiny

SCRIPT = """
import json, os, sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
try:
    os.environ.update(
        RAY_ADDRESS=cluster.address, AWS_ENDPOINT_URL="http://127.0.0.1:1", AWS_DEFAULT_REGION="there",
        AWS_SECRET_ACCESS_KEY="secret", HF_HUB_OFFLINE="1", **json.loads(sys.argv[1]),
    )
    import ray
    from lesa_ray.distributed.start import start_ray

    assert start_ray() is False
    print("FOUND", json.dumps(ray.get(ray.remote(lambda: dict(os.environ)).remote(), timeout=180)))
    ray.shutdown()
finally:
    cluster.shutdown()
"""


@pytest.fixture
def apart() -> Iterator[str]:
    """Where a Ray leaves its address, so that no other process takes it for its own; short: its sockets lie below."""
    with tempfile.TemporaryDirectory(prefix="lrs-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.timeout(360)
@pytest.mark.parametrize("submitted", [False, True])
def test_a_cluster_learns_where_the_stores_are_and_no_secrets(submitted: bool, apart: str) -> None:
    """submitted: as a job whose own runtime environment names some of it already."""
    job = {"runtime_env": {"env_vars": {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "MINE": "1"}}, "metadata": {}}
    more = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)} if submitted else {}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "HF_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(more)], env={**clean, "RAY_TMPDIR": apart}, capture_output=True,
        text=True, timeout=330, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.split("FOUND", 1)[1].splitlines()[0])
    assert found["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"
    assert (found["AWS_DEFAULT_REGION"], found["HF_HUB_OFFLINE"]) == ("there", "1")
    assert "AWS_SECRET_ACCESS_KEY" not in found
    assert found.get("MINE") == ("1" if submitted else None)


def test_a_token_that_the_user_has_stays_in_use_and_is_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".ray"
    folder.mkdir(mode=0o755)
    (folder / "auth_token").write_text("mine")
    start._own_token()
    assert not os.environ["RAY_AUTH_TOKEN"]
    assert folder.stat().st_mode & 0o077 == 0
    (folder / "auth_token").unlink()
    start._own_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_gpus_that_pytorch_does_not_see_are_not_dealt_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(start.glob, "glob", lambda pattern: [])
    assert start._no_unseen_gpus() == {}
    monkeypatch.setattr(start.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    assert start._no_unseen_gpus() == {"num_gpus": 0}
    assert f"a GPU that PyTorch {torch.__version__} does not see" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert start._no_unseen_gpus() == {}


@pytest.mark.timeout(360)
@pytest.mark.usefixtures("local_ray")
def test_a_ray_embedded_in_another_process_is_left_alone(apart: str, tmp_path: Path) -> None:
    """And it starts without a home folder, with a token that no other user can read, and workers with an environment of
    their own where the interpreter's path has to be quoted."""
    script = (
        "import os, ray; from lesa_ray.distributed.start import start_ray; print('EMBEDDED', start_ray()); "
        "print('TOKEN', os.environ['RAY_AUTH_MODE'], os.environ['RAY_AUTH_TOKEN']); "
        "there = ray.remote(os.getenv).options(runtime_env={'env_vars': {'MINE': 'there'}}).remote('MINE'); "
        "print('WORKER', ray.get(there, timeout=120))"
    )
    (tmp_path / "my [x] é").symlink_to(sys.prefix)
    python = str(tmp_path / "my [x] é" / "bin" / "python")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    no_home = os.path.join(os.devnull, "home")
    done = subprocess.run(
        [python, "-c", script], env={**clean, "RAY_TMPDIR": apart, "HOME": no_home}, capture_output=True, text=True,
        timeout=330, check=False,
    )  # fmt: skip
    assert "EMBEDDED True" in done.stdout, done.stderr[-2000:]
    assert "WORKER there" in done.stdout, done.stderr[-2000:]
    mode, token = done.stdout.split("TOKEN ")[1].split()[:2]
    assert (mode, len(token)) == ("token", 64)
    written = [path for path in Path(apart).rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if token.encode() in path.read_bytes()]


@pytest.mark.timeout(360)
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGHUP, signal.SIGHUP]], ids=["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_command_as_an_interrupt_does(
    signals: list[int], bases: Callable[[str], str], tmp_path: Path
) -> None:
    """At SIGTERM Ray would print a stack, and abort what takes longer than three seconds to end. Of SIGHUP a terminal
    that goes away brings two."""
    command = [sys.executable, "-m", "lesa_ray.cli", "expand", bases("llama"), str(tmp_path / "out"), "--factor", "1.5"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup a command would rightly go on
    try:
        running = subprocess.Popen(command, env={**clean, "RAY_ADDRESS": "local"}, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGHUP, outside)
    with running:
        assert running.stderr is not None
        said = ""
        while "starting Ray" not in said:
            line = running.stderr.readline()
            assert line, said
            said += line
        for number in signals:
            running.send_signal(number)
        _, rest = running.communicate(timeout=180)
    assert running.returncode == 130, rest
    assert rest.strip().splitlines()[-1] == "lesa-ray: interrupted; the same command goes on from here"
    assert "SIGTERM" not in rest


def test_an_address_that_another_user_wrote_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "ray" / "ray_current_cluster"
    written.parent.mkdir()
    written.write_text("10.0.0.1:6379\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    real = os.fstat
    for writer, taken in ((os.getuid(), True), (0, True), (os.getuid() + 1, False)):

        def status(file: int, writer: int = writer) -> os.stat_result:
            return os.stat_result((*real(file)[:4], writer, *real(file)[5:]))

        monkeypatch.setattr(os, "fstat", status)
        assert started_here() == ("10.0.0.1:6379" if taken else None)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("command", ["analyze", "evaluate", "copies"])
def test_what_ray_start_left_is_taken_for_small_work_too(
    command: str, apart: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.checkpoint(tmp_path / "base", num_hidden_layers=2)
    (tmp_path / "some.txt").write_text("To be, or not to be.")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", apart)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    asked: list[object] = []

    def init(address: str, **settings: Any) -> None:
        asked.append(address)
        raise ConnectionError("gone")

    monkeypatch.setattr(ray, "init", init)
    run: Callable[[], Any] = {
        "analyze": lambda: analyze(AnalyzeConfig(base=base, fit=False, match=False)),
        "evaluate": lambda: evaluate(EvaluateConfig(checkpoints=(base,), data=(str(tmp_path / "some.txt"),))),
        "copies": lambda: _default_runner(False, Storage("memory://out"), Silent()),
    }[command]
    assert run()
    assert not asked
    (Path(apart) / "ray").mkdir()
    with socket.create_server(("", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        (Path(apart) / "ray" / "ray_current_cluster").write_text(address)
        with pytest.raises(MachineError, match=rf"^Ray cluster {re.escape(address)}: cannot be reached .*`ray stop`"):
            run()
    assert asked == [address]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("named", [True, False])
def test_a_cluster_that_is_gone_is_told_of_soon(named: bool, apart: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after Ray's own quarter of an hour. named: by RAY_ADDRESS, not by what `ray start` left, as after a boot."""
    with socket.create_server(("", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: pytest.fail("Ray tries for a quarter of an hour"))
    monkeypatch.setattr(start, "HEAD_SECONDS", 0.2)
    monkeypatch.setenv("RAY_TMPDIR", apart)
    monkeypatch.setenv("RAY_ADDRESS", address if named else "")
    (Path(apart) / "ray").mkdir()
    (Path(apart) / "ray" / "ray_current_cluster").write_text(address)
    hint = "RAY_ADDRESS names it" if named else "run `ray stop`"
    with pytest.raises(MachineError, match=rf"^Ray cluster {re.escape(address)}: cannot be reached .*refused.*{hint}"):
        start_ray()


def test_a_node_that_comes_up_slowly_is_started_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    slow, broken = "The current node timed out during startup. This", "no room"
    for failures, starts in (([slow], 2), ([slow, slow], 2), ([broken], 1)):
        left, started = list(failures), []

        def init(left: list[str] = left, started: list[str] = started, **settings: Any) -> None:
            started.append(settings["address"])
            if left:
                raise Exception(left.pop(0))

        monkeypatch.setattr(ray, "init", init)
        if len(failures) < starts:
            assert start_ray()
        else:
            with pytest.raises(MachineError, match=rf"^Ray does not start on this machine \(.*{failures[-1]}"):
                start_ray()
        assert started == ["local"] * starts


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.0.1:8265", "is a dashboard's; give the cluster's, HOST:6379"),
        ("garbage", "is no address; expected HOST:PORT"),
        ("head:", "is no address"),
        ("", None),
        ("local", None),
        ("auto", None),
        ("10.0.0.1:6379", None),
        ("[::1]:6379", None),
        ("ray://head:10001", None),
    ],
)
def test_what_an_address_may_be(
    address: str, says: str | None, bases: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    if says is None:
        check_address()
        return
    with pytest.raises(UserError, match=f"^RAY_ADDRESS {re.escape(address)}: {says}"):
        expand(ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), method="avg-deus"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_cluster_that_ray_refuses_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray says so with errors of several kinds."""
    monkeypatch.setenv("RAY_ADDRESS", "nosuch://head:1")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(MachineError, match="Ray cluster nosuch://head:1: cannot be reached"):
        start_ray()


def test_a_place_with_a_password_is_not_passed_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in start.PASSED_ON:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_ENDPOINT", "https://bob:hunter2@mirror")
    assert start._passed_on() == {"env_vars": {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}}
    assert start.without_secrets() == {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}  # with a job that is submitted
    assert "HF_ENDPOINT: holds a user or a password" in caplog.text
    assert "hunter2" not in caplog.text
