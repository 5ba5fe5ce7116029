"""Submissions that end before a job is there: one line that says why, exit code 2 or 1."""

from __future__ import annotations

import json
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from lesa_ray import MachineError, cli
from lesa_ray.distributed import submit as jobs

Submit = Callable[..., tuple[int, str]]
HERE = {"/api/v0/cluster_metadata": {"data": {"pythonVersion": platform.python_version()}}}
OURS = {"/api/version": {"ray_version": ray.__version__}, "/api/v0/cluster_metadata": {"data": {"pythonVersion": "?"}}}


def free_port() -> int:
    """One at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Submit:
    """Run `lesa-ray submit` in this process: its exit code and its last line."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(jobs, "_PAUSE_SECONDS", 0.01)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lesa-ray", "submit", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "Traceback" not in shown.err
        return int(str(end.value.code)), shown.err.strip().splitlines()[-1]

    return run


@pytest.fixture
def dashboard() -> Iterator[Callable[[dict[str, Any], int], str]]:
    """A server that answers as the dashboard of some other cluster: `dashboard(answers, status)` is its address.

    `refusals`: what it says to a job before it takes it; without them none must be submitted."""
    servers = []

    def start(
        answers: dict[str, Any], status: int = 200, refusals: list[tuple[int, str]] | None = None, port: int = 0
    ) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path in answers or (refusals is not None and "/packages/" in self.path)
                self.answer(status if known else 404, json.dumps(answers.get(self.path)))

            def do_POST(self) -> None:
                if refusals is None:
                    pytest.fail("a job was submitted")
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(*(refusals.pop(0) if refusals else (200, '{"submission_id": "a-job", "job_id": "1"}')))

            do_PUT = do_POST

            def answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_another_ray(submit: Submit, dashboard: Callable[..., str]) -> None:
    address = dashboard(OURS | {"/api/version": {"ray_version": "2.7.1"}})
    code, line = submit("--address", address, "--", "python", "-m", "pipelines.expand")
    assert code == 2
    assert line == f"lesa-ray: cluster {address}: runs Ray 2.7.1, here is {ray.__version__}; install ray==2.7.1 here"


def test_another_python(submit: Submit, dashboard: Callable[..., str]) -> None:
    address = dashboard(OURS | {"/api/v0/cluster_metadata": {"data": {"pythonVersion": "3.9.1"}}})
    code, line = submit("--address", address, "--", "python", "-m", "pipelines.expand")
    assert code == 2
    assert f"runs Python 3.9.1, here is {platform.python_version()}" in line


def test_a_cluster_that_asks_for_a_token(submit: Submit, dashboard: Callable[..., str]) -> None:
    code, line = submit("--address", dashboard(OURS, 401), "--", "python", "x.py")
    assert code == 2
    assert "asks for a token; set RAY_AUTH_MODE=token" in line


def test_no_cluster_there_and_no_password_shown(submit: Submit) -> None:
    port = free_port()
    code, line = submit("--address", f"http://user:hidden@127.0.0.1:{port}", "--", "python", "x.py")
    assert code == 1
    assert f"cluster http://127.0.0.1:{port}: no job was started" in line
    assert "hidden" not in line


def test_a_port_that_is_forwarded_a_little_later(
    dashboard: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            dashboard(OURS | HERE, 200, [], port)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    assert jobs.submit(["python", "x.py"], address, wait=False) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("a-job\n", f"lesa-ray: nothing answers at {address} yet; waiting\n")


@pytest.mark.parametrize(
    ("variable", "given", "shown"),
    [
        ("RAY_API_SERVER_ADDRESS", "head:8265", "head:8265"),
        ("--address", "[::1]:8265", "[::1]:8265"),
        ("--address", "me:secret@head:8265", "head:8265"),
    ],
)
def test_an_address_that_is_no_dashboards(
    variable: str, given: str, shown: str, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    if not variable.startswith("-"):
        monkeypatch.setenv(variable, given)
    code, line = submit(*([variable, given] if variable.startswith("-") else []), "--", "python", "x.py")
    assert code == 2
    assert line.startswith(f"lesa-ray: {variable} {shown}: is not the URL of a dashboard")


def test_a_port_of_rays_own_is_asked_for_the_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS as KubeRay's pods have it goes to Ray's client; from elsewhere that is of no use."""

    def client(url: str) -> None:
        raise RuntimeError(f"{url} is not known here")

    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which submit sets
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(jobs, "_Client", client)
    with pytest.raises(MachineError, match=r"^cluster 10.0.0.1:6379: no job .*6379 is not known here.* \(--address\)$"):
        jobs.submit(["python", "x.py"])


def test_a_host_that_does_not_answer_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def client(url: str) -> None:
        times.append(30.0)
        raise ConnectionError(url)

    times = [0.0]
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: times[-1], sleep=pytest.fail))
    monkeypatch.setattr(jobs, "_Client", client)
    with pytest.raises(ConnectionError):
        jobs._connected("http://192.0.2.1:8265")


def test_a_cluster_that_takes_no_jobs_yet_is_waited_for(
    dashboard: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's words, by Ray's client: three refusals, then a job."""
    address = dashboard(OURS | HERE, 200, [(500, "No available agent to submit job, please try again later.")] * 3)
    monkeypatch.setattr(jobs, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    assert jobs.submit(["python", "x.py"], address, wait=False) == 0
    shown = capsys.readouterr()
    assert shown.out == "a-job\n"
    assert shown.err.count("takes no jobs yet") == 1
    address = dashboard(OURS | HERE, 200, [(500, "no room")])
    with pytest.raises(MachineError, match="no room"):
        jobs.submit(["python", "x.py"], address, wait=False)


def test_something_else_is_there(submit: Submit, dashboard: Callable[..., str]) -> None:
    code, line = submit("--address", dashboard({}), "--", "python", "x.py")
    assert code == 1
    assert "no job was started" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND: missing"),
        (["--cpus", "-1", "--", "python", "x.py"], "--cpus -1: must be 0 or more"),
        (["--cpu", "1", "--", "python", "x.py"], "No such option: --cpu"),
    ],
)
def test_wrong_use(arguments: list[str], says: str, submit: Submit) -> None:
    code, line = submit(*arguments)
    assert code == 2
    assert says in line
