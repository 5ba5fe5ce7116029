"""The memory that a unit may take, where it puts what does not fit, and giving back what it no longer needs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from pathlib import Path, PurePosixPath

UNIT_SHARE = 0.8
"""Of the free memory that one unit takes by default; the rest is for its worker's own and for the page cache."""
INTERPRETER_BYTES = 600 * 2**20
"""A process with torch imported, beside what a unit takes."""
SCRATCH_VARIABLE = "LESA_RAY_SCRATCH"
_CONTROL_GROUPS = (
    ("", "memory.max", "memory.current", ("inactive_file", "active_file")),  # version 2
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)
"""Of both versions: the controller, which in version 1 has a tree of its own, the files of a group with its limit and
with what is taken of it, and the figures that say how much of that are pages of files."""
_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 4 * 2**20


def free_memory(groups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Bytes that this process can still take without swapping: the machine's, or what its control group, or one that
    holds it, has left of a limit (a container, a Kubernetes pod, a job of Slurm's, a service of systemd's).

    Pages of files do not count as taken, neither by the kernel in what a machine has available nor here: they make
    room when memory is asked for, and after a unit has read its layers from a disk they fill what a container has.
    Ray's watch over memory counts likewise. groups: where the kernel shows control groups; own: where it says which are
    this process's."""
    with open("/proc/meminfo", encoding="ascii") as info:
        free = next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable:"))
    for controller, limit_file, used_file, of_files in _CONTROL_GROUPS:
        group = _own_group(own, controller)
        for folder in (Path(groups, controller, at) for at in (group, *group.parents)):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
                free = min(free, limit - max(used - _sum_of(folder / "memory.stat", of_files), 0))
    return max(free, 0)


def _own_group(own: str, controller: str) -> PurePosixPath:
    """This process's group below the root of a controller's tree, or the root itself.

    A container may see its own group as the root and still be told of the host's path to it, which is not there."""
    with contextlib.suppress(OSError):
        for line in Path(own).read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controller in controllers.split(",") and ".." not in group.split("/"):  # above what is shown here
                return PurePosixPath(group.lstrip("/"))
    return PurePosixPath()


def _sum_of(stat_file: Path, names: tuple[str, ...]) -> int:
    """Some of the figures that a control group gives of its memory; 0 where it gives none."""
    with contextlib.suppress(OSError):
        lines = (line.split() for line in stat_file.read_text().splitlines())
        return sum(int(line[1]) for line in lines if line[0] in names)
    return 0


def default_budget() -> int | None:
    """The host memory of a unit that was given none; None where the system does not say what is free."""
    try:
        return int(UNIT_SHARE * free_memory())
    except (OSError, StopIteration):
        return None


def scratch_dir() -> str:
    """The folder on this machine's own disk for what fits in no memory: LESA_RAY_SCRATCH, else that for temporary
    files. Each machine has its own; it is no part of a run's settings."""
    return os.environ.get(SCRATCH_VARIABLE, tempfile.gettempdir())


def return_freed_memory() -> None:
    """Let glibc give tensors of 4 MiB or more back to the system when they are freed.

    By itself it moves that bound up to 32 MiB as such blocks are freed, and then keeps them, by thread: a unit whose
    layers take 6 MB stayed 100 MB larger than what it held (measured). Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _LARGE)
