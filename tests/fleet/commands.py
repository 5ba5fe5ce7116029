"""A running Ray cluster, and the command line against it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LESA_RAY = str(Path(sys.executable).parent / "lesa-ray")


@dataclass
class RayCluster:
    """Two nodes of a core each, in processes of their own."""

    address: str
    environment: dict[str, str]
    host: subprocess.Popen[str]

    def kill_a_node(self) -> None:
        """Kill the second node's raylet; a new node joins."""
        assert self.host.stdin is not None
        assert self.host.stdout is not None
        self.host.stdin.write("kill\n")
        self.host.stdin.flush()
        while "KILLED" not in (line := self.host.stdout.readline()):
            assert line, "the cluster's host ended"

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """`lesa-ray` with these words, as a driver of the cluster."""
        return subprocess.Popen(
            [LESA_RAY, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**self.environment, "RAY_ADDRESS": self.address, **environment},
        )  # fmt: skip

    def run(self, *words: str, **environment: str) -> tuple[int, Any, str]:
        """The same to its end: exit code, what it printed as JSON, its log."""
        return ended(self.start(*words, **environment))


def ended(process: subprocess.Popen[str], timeout: float = 720) -> tuple[int, Any, str]:
    """Wait for a command: exit code, what it printed as JSON, its log."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert "Traceback" not in err, err
    return process.returncode, json.loads(out) if out else None, err


Put = Callable[[str, dict[str, Any]], str]
"""Leave a fleet's file in the bucket: `put(name, content)` is its URL."""
