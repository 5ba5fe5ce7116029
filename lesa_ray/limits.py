"""What this process may take of its machine: memory and processors, as its control groups bound them (a container, a
Kubernetes pod, a job of Slurm's, a service of systemd's)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

GROUPS, OWN = "/sys/fs/cgroup", "/proc/self/cgroup"
"""Where the kernel shows control groups, and where it says which are this process's."""
_MEMORY = (
    ("", "memory.max", "memory.current", ("inactive_file", "active_file")),  # version 2
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)
"""Of both versions: the controller, which in version 1 has a tree of its own, the files of a group with its limit and
with what is taken of it, and the figures that say how much of that are pages of files."""


def free_memory(groups: str = GROUPS, own: str = OWN) -> int:
    """Bytes that this process can still take without swapping: the machine's, or what its control group, or one that
    holds it, has left of a limit.

    Pages of files do not count as taken, neither by the kernel in what a machine has available nor here: they make
    room when memory is asked for, and after a unit has read its layers from a disk they fill what a container has.
    Ray's watch over memory counts likewise."""
    with open("/proc/meminfo", encoding="ascii") as info:
        free = next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable:"))
    for controller, limit_file, used_file, of_files in _MEMORY:
        for folder in _own_groups(groups, own, controller):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
                free = min(free, limit - max(used - _sum_of(folder / "memory.stat", of_files), 0))
    return max(free, 0)


def all_memory(groups: str = GROUPS, own: str = OWN) -> int:
    """Bytes that there are for this process and others within its limits: the machine's, or the least limit."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for controller, limit_file, *_ in _MEMORY:
        for folder in _own_groups(groups, own, controller):
            with contextlib.suppress(OSError, ValueError):
                found = min(found, int((folder / limit_file).read_text()))
    return found


def all_cpus(groups: str = GROUPS, own: str = OWN) -> int:
    """Processors that this process may use: those it is bound to, or whole ones of the time that it is given, 1 or
    more, as Ray counts them."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _own_groups(groups, own, ""):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            found = min(found, quota // period)
    for folder in _own_groups(groups, own, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            found = min(found, quota // period) if quota > 0 else found
    return max(found, 1)


def _own_groups(groups: str, own: str, controller: str) -> Iterator[Path]:
    """Folders of this process's group of a controller and of those around it, up to the root."""
    group = _own_group(own, controller)
    return (Path(groups, controller, at) for at in (group, *group.parents))


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
