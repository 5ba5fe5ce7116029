"""From a head without a CPU to a finished checkpoint, on Ray's own autoscaler and its make-believe machines.

Ray's `fake_multi_node` provider starts a raylet on this machine for each machine that the autoscaler orders, with the
resources that the machine would have: all is real but the GPUs, so units compute on CPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HEAD = "f" * 51 + "00000"
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
NOTHING_TO_DO = (
    "setup_commands", "initialization_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip
BIN = Path(sys.executable).parent
NO_MORE_GPUS = """
import sys
from lesa_ray.distributed.start import start_ray
from lesa_ray.distributed.room_for_workers import wait_for_room
from lesa_ray.errors import MachineError
from lesa_ray.expansion.runner import Silent
from lesa_ray.training.train_settings import TrainConfig

start_ray()
for workers, wait in ((2, 120), (3, 2)):
    config = TrainConfig(checkpoint="c", data="d", out="o", workers=workers, batch=6, gpus_per_worker=1, wait=wait)
    try:
        print("GIVEN", wait_for_room(config, Silent()))
    except MachineError as error:
        print("FAULT", error)
"""


@pytest.fixture(params=["v1", "v2"])
def growing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process on the head of a cluster that may have two machines with a GPU, and has none.

    v1: the autoscaler of `ray up`; v2: KubeRay's, as `cluster/` sets it."""
    scratch = tempfile.mkdtemp(prefix="lrg-", dir="/tmp")  # short: Ray's sockets lie below it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    provider = {"type": "external", "module": PROVIDER, "gcs_address": address, "disable_node_updaters": True}
    nodes = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    config = {
        "cluster_name": "growing", "max_workers": 2, "upscaling_speed": 1.0, "idle_timeout_minutes": 5,
        "provider": provider | ({"launch_multiple": True, "head_node_id": HEAD} if request.param == "v2" else {}),
        "available_node_types": nodes, "head_node_type": "ray.head.default", "auth": {}, "file_mounts": {},
        **{name: [] for name in NOTHING_TO_DO},
    }  # fmt: skip
    (tmp_path / "cluster.json").write_text(json.dumps(config))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**clean, "RAY_TMPDIR": scratch, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    second = {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    started = environment | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    started |= {"RAY_enable_autoscaler_v2": str(int(request.param == "v2"))} | (second if request.param == "v2" else {})
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=0", "--include-dashboard=false",
        "--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}",
        f"--autoscaling-config={tmp_path / 'cluster.json'}",
    ]  # fmt: skip
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=started, stdout=log, stderr=log)
    try:
        for _ in range(60):
            if "Ray runtime started" in (tmp_path / "head.log").read_text():
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(timeout=1)
        yield environment | {"RAY_ADDRESS": address}
    finally:
        head.terminate()  # takes its raylets along
        try:
            head.wait(timeout=180)
        finally:
            head.kill()
            _end_rest(scratch)
            shutil.rmtree(scratch, ignore_errors=True)


def _end_rest(scratch: str) -> None:
    """End what the make-believe machines leave behind: processes with this cluster's folder in their command."""
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and f"{scratch}/".encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_machines_come_for_units_and_for_workers(
    growing: dict[str, str], bases: Callable[[str], str], tmp_path: Path
) -> None:
    """The workers come first: v1 does not know make-believe machines again when they have come, holds them for yet to
    come, and orders none beside them."""
    done = subprocess.run(
        [sys.executable, "-c", NO_MORE_GPUS], env=growing, capture_output=True, text=True, timeout=540, check=False
    )
    given, fault = [line for line in done.stdout.splitlines() if line.startswith(("GIVEN", "FAULT"))]
    assert given == "GIVEN Resources(fewest=2, most=2, cpus=1, gpus=1.0)"
    assert "workers 3 of 1 GPU and 1 CPU each: the cluster can give 2 after 2 s of waiting" in fault
    command = [BIN / "lesa-ray", "expand", bases("llama"), tmp_path / "out", "--method", "lesa", "--gpus-per-task", "1"]
    done = subprocess.run(command, env=growing, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "config.json").exists()
