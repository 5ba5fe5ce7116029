"""A Ray cluster of two nodes beside a real S3 server, and the command line against them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lesa_ray.checkpoint.storage import Storage
from tests import families
from tests.fleet.commands import Put, RayCluster
from tests.training import styles

HOST = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
print("ADDRESS", cluster.address, flush=True)
for line in sys.stdin:
    if line == "kill\\n":  # as if the machine had lost its power
        cluster.remove_node(second, allow_graceful=False)
        second = cluster.add_node(num_cpus=1)
        print("KILLED", flush=True)
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def ray_cluster(s3: str) -> Iterator[RayCluster]:
    """Its files are apart, so that no other test's Ray takes it for its own."""
    scratch = tempfile.mkdtemp(prefix="lrf-", dir="/tmp")  # short: Ray's sockets lie below it
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Processes that have imported torch are kept for the next stage, by default a node keeps one a core; and a node
    # that is lost is missed after some five seconds.
    settings = {"RAY_idle_worker_killing_time_threshold_ms": "600000", "RAY_health_check_period_ms": "1000"}
    environment = {**clean, **settings, "RAY_TMPDIR": scratch}
    host = subprocess.Popen(
        [sys.executable, "-c", HOST], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert host.stdout is not None
    assert host.stdin is not None
    while not (line := host.stdout.readline()).startswith("ADDRESS"):
        assert line, "the cluster's host ended"
    yield RayCluster(line.split()[1], environment, host)
    host.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        host.wait(timeout=60)
    host.kill()
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three families, each with a tokenizer of its own, and text."""
    root = tmp_path_factory.mktemp("models")
    for name, style in (("llama", "llama3"), ("qwen2", "qwen"), ("mistral", "gpt2")):
        families.make(name, root / name, vocab_size=512)
        tokenizer = styles.STYLES[style]()
        tokenizer.chat_template = styles.PLAIN
        tokenizer.save_pretrained(root / name)
    turns = [{"role": "user", "content": "left"}, {"role": "assistant", "content": "right"}]
    (root / "chat.jsonl").write_text(20 * (json.dumps({"messages": turns}) + "\n"))
    (root / "text.txt").write_text("".join(f"The café opens at nine, says line {i}.\n" for i in range(200)))
    return root


@pytest.fixture
def put(s3: str) -> Put:
    """Leave a fleet's file in the bucket: `put(name, content)` is its URL."""

    def write(name: str, content: dict[str, Any]) -> str:
        Storage(f"{s3}/files").write(f"{name}.yaml", yaml.safe_dump(content).encode())
        return f"{s3}/files/{name}.yaml"

    return write
