"""Waiting for what other processes and threads do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def until(holds: Callable[[], object], seconds: float = 120) -> float:
    """Wait for something; how long that took."""
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() - begin < seconds, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - begin


def titles() -> dict[int, bytes]:
    """The command lines of the processes below this one, which Ray sets to what they do."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(entry.parent.name)] = int(fields[1])
    own, found = os.getpid(), {}
    for pid in parents:
        above = pid
        while above in parents and above != own:
            above = parents[above]
        if above == own:
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
    return found
