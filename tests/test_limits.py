"""What a container, or another control group, leaves a process of its machine."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from lesa_ray import limits
from lesa_ray.limits import all_cpus, all_memory, free_memory

V2 = ("memory.max", "memory.current", "memory.stat", "")
V1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_")
MIB = 2**20


@pytest.mark.parametrize("version", [V2, V1], ids=["v2", "v1"])
def test_pages_of_files_are_free_in_a_container(version: tuple[str, str, str, str], tmp_path: Path) -> None:
    limit, used, stat, prefix = version
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text(f"{90 * MIB}\n")
    (tmp_path / used).write_text(f"{85 * MIB}\n")
    assert free_memory(str(tmp_path)) == 5 * MIB  # nothing is said of what is taken
    lines = {"anon": 4, f"{prefix}inactive_file": 50, f"{prefix}active_file": 20, "inactive_anon": 3, "file": 75}
    (tmp_path / stat).write_text("".join(f"{name} {count * MIB}\n" for name, count in lines.items()))
    assert free_memory(str(tmp_path)) == 75 * MIB
    assert all_memory(str(tmp_path)) == 90 * MIB
    (tmp_path / used).write_text(f"{60 * MIB}\n")  # read a moment before the figures
    assert free_memory(str(tmp_path)) <= 90 * MIB
    (tmp_path / used).write_text(f"{165 * MIB}\n")
    assert free_memory(str(tmp_path)) == 0
    (tmp_path / limit).write_text("max\n")
    assert free_memory(str(tmp_path)) > 90 * MIB  # the machine's
    assert all_memory(str(tmp_path)) > 90 * MIB


def test_outside_of_a_container_it_is_what_the_machine_has_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its memory, not what nobody has touched yet."""
    told = "MemTotal: 800 kB\nMemFree: 100 kB\nMemAvailable: 500 kB\nBuffers: 7 kB\n"
    monkeypatch.setattr(limits, "open", lambda *_, **__: io.StringIO(told), raising=False)
    assert free_memory(str(tmp_path), str(tmp_path / "none")) == 500 * 1024
    (tmp_path / "memory.max").write_text(f"{100 * MIB}\n")
    (tmp_path / "memory.current").write_text("0\n")
    assert free_memory(str(tmp_path), str(tmp_path / "none")) == 500 * 1024  # a limit above it gives no more


@pytest.mark.parametrize(("version", "line"), [(V2, "0::"), (V1, "4:cpu,memory:")], ids=["v2", "v1"])
def test_a_limit_of_the_process_own_group_or_of_one_around_it_counts(
    version: tuple[str, str, str, str], line: str, tmp_path: Path
) -> None:
    """As Slurm and systemd set one: the group is not shown as the root, which has no limit."""
    limit, used, _, _ = (name.rsplit("/", 1)[-1] for name in version)
    root = (tmp_path / version[0]).parent

    def group(name: str, most: str, taken: int) -> None:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / limit).write_text(f"{most}\n")
        (root / name / used).write_text(f"{taken * MIB}\n")

    own = tmp_path / "own"
    own.write_text(f"12:pids:/elsewhere\n{line}/slurm/job_7/step_0\n")
    group("elsewhere", f"{MIB}", 0)
    group("slurm", f"{99 * MIB}", 10)
    group("slurm/job_7", f"{50 * MIB}", 8)
    group("slurm/job_7/step_0", "max", 5)
    assert free_memory(str(tmp_path), str(own)) == 42 * MIB
    group("slurm/job_7/step_0", f"{30 * MIB}", 5)
    assert free_memory(str(tmp_path), str(own)) == 25 * MIB
    assert all_memory(str(tmp_path), str(own)) == 30 * MIB
    own.write_text(f"{line}/slurm/../elsewhere\n")  # as if outside of what is shown
    assert free_memory(str(tmp_path), str(own)) > 99 * MIB
    assert free_memory(str(tmp_path), str(tmp_path / "none")) > 99 * MIB


@pytest.mark.parametrize("version", ["v2", "v1"])
def test_time_on_processors_counts_as_whole_ones(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    own = tmp_path / "own"
    own.write_text("0::/pod/main\n" if version == "v2" else "3:cpu,cpuacct:/pod/main\n")

    def give(group: str, quota: int, none: bool = False) -> None:
        folder = tmp_path / ("" if version == "v2" else "cpu") / group
        folder.mkdir(parents=True, exist_ok=True)
        if version == "v2":
            (folder / "cpu.max").write_text(f"{'max' if none else quota} 100000\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{-1 if none else quota}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")

    def found() -> int:
        return all_cpus(str(tmp_path), str(own))

    assert found() == 64
    give("pod/main", 0, none=True)
    assert found() == 64
    give("pod", 850_000)
    assert found() == 8
    give("pod/main", 300_000)
    assert found() == 3
    give("pod/main", 50_000)
    assert found() == 1
