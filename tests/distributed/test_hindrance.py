"""What is said where a Ray does not start."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from lesa_ray.distributed.hindrance import few_processes, hindrance, little_memory

TIMED_OUT = RuntimeError("Timed out waiting for file gcs_server_port")


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.usefixtures("unlimited")
def test_a_folder_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hindrance(TIMED_OUT, str(tmp_path)) == ""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    assert f"; {tmp_path}: the disk is full" in hindrance(TIMED_OUT, str(tmp_path))


@pytest.mark.usefixtures("unlimited")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    said = hindrance(OSError(30, "Read-only file system"), str(tmp_path))
    assert said == f"; {tmp_path}: Ray's session cannot be written there; set RAY_TMPDIR to another folder"


@pytest.mark.usefixtures("unlimited")
def test_shared_memory_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/dev/shm")
    assert hindrance(TIMED_OUT, str(tmp_path)).startswith("; /dev/shm cannot be written")


def test_a_container_too_small_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    assert little_memory() == ""
    monkeypatch.setattr("lesa_ray.distributed.hindrance.free_memory", lambda: 7 * 10**8)
    monkeypatch.setattr("lesa_ray.distributed.hindrance.all_memory", lambda: 10**9)
    assert little_memory().startswith("700.00 MB of memory are free here, of 1.00 GB that the machine")
    monkeypatch.setattr("lesa_ray.distributed.hindrance.free_memory", partial(open, os.devnull + "/meminfo"))
    assert little_memory() == ""


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_AS: 6_000_000 * 1024}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (limits.get(limit, resource.RLIM_INFINITY), 0))
    assert "`ulimit -v`" in hindrance(TIMED_OUT, str(tmp_path))
    limits[resource.RLIMIT_AS], limits[resource.RLIMIT_NPROC] = 2**47, 40
    for error in (TIMED_OUT, BlockingIOError(11, "Resource temporarily unavailable")):  # as fork is refused
        assert "`ulimit -u`" in hindrance(error, str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "`ulimit -u` is 40 here" in few_processes()
    limits[resource.RLIMIT_NPROC] = 2**20
    assert few_processes() == ""
    assert hindrance(TIMED_OUT, str(tmp_path)) == ""


@pytest.mark.timeout(120)
def test_a_path_too_long_for_sockets_is_told_with_a_way_out() -> None:
    with tempfile.TemporaryDirectory(prefix="x" * 120, ignore_cleanup_errors=True) as folder:
        script = "from lesa_ray.distributed.start import start_ray; start_ray()"
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "RAY_TMPDIR": folder, "RAY_ADDRESS": "local"},
            capture_output=True, text=True, timeout=110, check=False,
        )  # fmt: skip
        assert f"{folder}: too long a path for Ray's sockets; set RAY_TMPDIR to a short one" in done.stderr
