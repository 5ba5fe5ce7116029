"""Which process holds a lease, such that another on the same machine knows at once when it has ended.

A number of a process says little by itself: it is given again, and containers count on their own. Here it goes with
the machine's boot and the namespace that counts, and with when the process began. Known on Linux; elsewhere nothing is
known of any process, and leases of the dead run out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypedDict

HERE: set[str] = set()
"""Owners of the leases that this process has got and not let go."""


class Process(TypedDict):
    """A process of a machine. began: in ticks after the machine's start."""

    machine: str
    number: int
    began: int


def this_process() -> Process | None:
    """The process that asks; None where that cannot be told."""
    try:
        machine, began = _machine(), _began(os.getpid())
    except PermissionError:  # no /proc
        return None
    return None if machine is None or began is None else Process(machine=machine, number=os.getpid(), began=began)


def is_alive(process: Process | None) -> bool | None:
    """Whether a process still runs; None where that cannot be told: it is another machine's, or unknown."""
    if process is None or process["machine"] != _machine():
        return None
    try:
        return _began(process["number"]) == process["began"]
    except PermissionError:
        return None


def holder_is_alive(told: Mapping[str, Any]) -> bool | None:
    """Whether the holder of a lease lives, by what it told of itself; None where that cannot be told from here."""
    process = told.get("process")
    if process is not None and process == this_process():
        return told.get("owner") in HERE
    return is_alive(process)


def _machine() -> str | None:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _began(number: int) -> int | None:
    """When a process began (proc(5), field 22 of stat); None if it has ended, waited for by its parent or not.

    Raises: PermissionError for a process of someone else's that is hidden (proc(5), hidepid)."""
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(number, 0)  # sends nothing
        except ProcessLookupError:
            return None
        raise PermissionError(number) from None
    return None if fields[0] in "ZX" else int(fields[19])
