"""A cluster that falls silent while a job is followed: nothing is said, no connection is closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import Queue

import pytest
import ray
from aiohttp import web

from lesa_ray import MachineError
from lesa_ray.distributed import submit

LOG = ["one\n", "two\n", "three\n"]


@contextmanager
def serving(app: web.Application) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    started: Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Queue()

    async def serve() -> None:
        runner, end = web.AppRunner(app, shutdown_timeout=0.1), asyncio.Event()
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        started.put((f"http://127.0.0.1:{runner.addresses[0][1]}", asyncio.get_running_loop(), end))
        await end.wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    url, loop, end = started.get(timeout=30)
    yield url
    loop.call_soon_threadsafe(end.set)
    thread.join(30)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[int], int], str]]:
    """A dashboard with one job, as Ray's client knows it: `cluster(pieces, answers)` is its address.

    pieces: how many of the log each connection sends before it falls silent; with all it closes, and the job is over.
    answers: how often it says how the job is doing, before it falls silent there too."""
    monkeypatch.setattr(submit, "_SILENT_SECONDS", 1.0)
    monkeypatch.setattr(submit, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(submit, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(submit, "_ATTEMPTS", 2)

    def make(pieces: list[int], answers: int) -> web.Application:
        status = "RUNNING"

        async def version(_: web.Request) -> web.Response:
            return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": ""})

        async def info(_: web.Request) -> web.Response:
            nonlocal answers
            answers -= 1
            if answers < 0:
                await asyncio.sleep(60)
            code = 3 if status == "FAILED" else None
            job = {"type": "SUBMISSION", "submission_id": "a-job", "status": status, "entrypoint": "python x.py"}
            return web.json_response(job | {"driver_exit_code": code})

        async def tail(request: web.Request) -> web.WebSocketResponse:
            nonlocal status
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            count = pieces.pop(0) if len(pieces) > 1 else pieces[0]
            for text in LOG[:count]:
                await socket.send_str(text)
            if count < len(LOG):
                await asyncio.sleep(60)
            status = "FAILED"
            return socket

        app = web.Application()
        app.router.add_get("/api/version", version)

        async def unknown(request: web.Request) -> web.Response:
            return web.Response(text=f"Job {request.match_info['job']} does not exist", status=404)

        app.router.add_get("/api/jobs/a-job", info)
        app.router.add_get("/api/jobs/a-job/logs/tail", tail)
        app.router.add_get("/api/jobs/{job}", unknown)
        return app

    with ExitStack() as servers:

        def start(pieces: list[int], answers: int) -> str:
            url = servers.enter_context(serving(make(pieces, answers)))
            monkeypatch.setenv("RAY_API_SERVER_ADDRESS", url)  # Ray's client takes it before what it is given
            return url

        yield start


def follow(url: str) -> int:
    return submit._follow(submit._Client(url), "a-job", url)


@pytest.mark.timeout(180)
def test_a_log_that_stopped_coming_is_asked_for_again(
    cluster: Callable[[list[int], int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert follow(cluster([1, 0, 2, 3], 100)) == 3
    assert capsys.readouterr().out == "".join(LOG)


@pytest.mark.timeout(180)
def test_a_cluster_that_says_nothing_any_more_is_given_up(
    cluster: Callable[[list[int], int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    lost = (
        r"^cluster (http://127\.0\.0\.1:\d+): lost \(.*timed out.*; a-job may go on, `RAY_API_SERVER_ADDRESS=\1 ray job"
    )
    with pytest.raises(MachineError, match=lost):
        follow(cluster([1], 1))
    assert capsys.readouterr().out == LOG[0]


@pytest.mark.timeout(180)
def test_a_connection_that_breaks_is_told_of_and_made_again(
    cluster: Callable[[list[int], int], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, connections = cluster([1, 3], 100), [ConnectionResetError("reset")]
    show = submit._Log.show

    async def breaks(log: submit._Log, client: submit._Client, job: str) -> bool:
        await show(log, client, job)
        if connections:
            raise connections.pop()
        return True

    monkeypatch.setattr(submit._Log, "show", breaks)
    assert follow(url) == 3
    written = capsys.readouterr()
    assert written.out == "".join(LOG)
    assert f"lost the connection to {url}, which a-job does not need; connecting again" in written.err


@pytest.mark.timeout(180)
def test_a_job_that_went_with_the_clusters_head_is_not_waited_for(
    cluster: Callable[[list[int], int], str],
) -> None:
    url = cluster([1], 100)
    with pytest.raises(MachineError, match=r"does not know another-job any more.*; the same command goes on"):
        submit._follow(submit._Client(url), "another-job", url)


@pytest.mark.timeout(180)
def test_who_stops_looking_is_told_how_to_come_back(
    cluster: Callable[[list[int], int], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = cluster([1], 100)

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "_check_versions", lambda *_: None)
    monkeypatch.setattr(submit, "_submitted", lambda *_, **__: "a-job")
    monkeypatch.setattr(submit, "_follow", interrupted)
    assert submit.submit(["python", "x.py"], url) == 130
    told = capsys.readouterr().err
    for verb in ("logs --follow", "stop"):
        assert f"`RAY_API_SERVER_ADDRESS={url} ray job {verb} a-job`" in told
