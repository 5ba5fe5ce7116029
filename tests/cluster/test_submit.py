"""A command submitted from another folder to a real cluster of one machine: its log, its exit code, and no secrets."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from lesa_ray import ExpandConfig, expand
from lesa_ray.expansion.runner import InlineRunner
from lesa_ray.store.catalog import Store
from tests.comparison.test_compare_runs import settings_of
from tests.waiting import until

BIN = Path(sys.executable).parent
SECRET = "sesame-4711-open"


def free_ports(count: int) -> list[int]:
    """Below 10,000, where Ray's own workers take theirs."""
    found: list[int] = []
    for port in range(7300 + os.getpid() % 1000, 10_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            break
    return found


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, Path, str]]:
    """The URL of a cluster's dashboard, the folder with its logs, the URL of its node's metrics; in its own place, as
    other Rays may run here."""
    gcs, dashboard, client, agent, metrics = free_ports(5)
    with tempfile.TemporaryDirectory(prefix="lr-", ignore_cleanup_errors=True) as folder:  # short: it names sockets
        environment = {
            **os.environ, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_metrics_report_interval_ms": "500",
        }  # fmt: skip
        environment.pop("RAY_ADDRESS", None)
        command = [
            str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2", f"--port={gcs}",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
        ]  # fmt: skip
        server = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and server.poll() is None:
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", agent)):
                        break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{dashboard}", Path(folder), f"http://127.0.0.1:{metrics}/metrics"
        finally:
            server.send_signal(signal.SIGTERM)  # `ray start --block` ends what it started
            try:
                server.wait(timeout=180)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.timeout(600)
def test_a_job_from_another_folder(
    head: tuple[str, Path, str], bases: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, logs, metrics = head
    monkeypatch.chdir(tmp_path)
    base, out = bases("llama"), tmp_path / "out"
    (tmp_path / "good.yaml").write_text(f"base: {base}\nout: {out}\nmethod: avg-deus\n")
    (tmp_path / "wrong.yaml").write_text(f"base: {tmp_path}/nothing\nout: {tmp_path}/none\n")
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "AWS_SECRET_ACCESS_KEY": SECRET, "HF_TOKEN": SECRET}

    def submit(config: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "lesa-ray"), "submit", "--address", url, "--", "python", "-m", "pipelines.expand"]
        return subprocess.run(
            [*command, "--config", config], env=environment, capture_output=True, text=True, timeout=270, check=False
        )

    done = submit("good.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{out}: " in done.stdout
    assert re.search(rf"^\d\d:\d\d:\d\d expand {out}: writing the checkpoint$", done.stdout, re.MULTILINE)

    def counted(name: str) -> object:
        with urllib.request.urlopen(metrics, timeout=30) as answer:
            told = answer.read().decode()
        return re.search(rf'^ray_lesa_ray_{name}_total{{.*run="{out}".*stage="expand".*}} [1-9]', told, re.MULTILINE)

    for name in ("tasks", "bytes"):  # a node serves them a little after they were counted
        until(partial(counted, name))
    expand(ExpandConfig(base=base, out=str(tmp_path / "here"), method="avg-deus"), runner=InlineRunner())
    for file in (tmp_path / "here").glob("model*"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    wrong = submit("wrong.yaml")
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr
    assert "nothing: no such folder" in wrong.stdout
    assert not (tmp_path / "none").exists()
    written = b"".join(path.read_bytes() for path in logs.rglob("*") if path.is_file() and path.stat().st_size < 2**24)
    assert b"pipelines.expand" in written
    assert SECRET.encode() not in written + (done.stdout + done.stderr).encode()


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_comparisons_fleets_and_benchmarks_are_jobs_too(
    head: tuple[str, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _, _ = head
    monkeypatch.chdir(tmp_path)
    comparison = settings_of(tmp_path)
    fleet = {
        "name": "few", "store": comparison["store"], "families": [{"name": "llama", "checkpoint": comparison["base"]}],
        "methods": ["solar"], "factor": 1.4, "stages": {"expand": {}},
    }  # fmt: skip
    for name, settings in (("comparison", comparison), ("fleet", fleet)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))

    def submit(*words: str, code: int = 0) -> str:
        command = [str(BIN / "lesa-ray"), "submit", "--address", url, "--", "python", "-m", *words]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    assert re.search(r"llama-pro +7 .* 1 of 1", submit("pipelines.compare", "comparison.yaml"))
    assert Store(comparison["store"]).finished()
    assert "expand/llama-solar-x1.4: made in" in submit("pipelines.fleet", "fleet.yaml")
    assert "405B" in submit("pipelines.benchmark.simulate")
    assert "OUT here: lies in the folder that Ray unpacked" in submit("pipelines.expand", "base", "here", code=2)
