"""What an expansion is predicted to need, for people."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from lesa_ray.expansion.cluster_spec import ClusterSpec
from lesa_ray.expansion.estimate import Estimate
from lesa_ray.report import terminal
from lesa_ray.report.terminal import duration
from lesa_ray.sizes import size

_ROWS = 24  # experts make hundreds of units; the largest are shown
_PLACES = {"device": "GPU", "memory": "memory", "scratch": "scratch file"}


def show_estimate(need: Estimate) -> None:
    """Print what each unit needs, and all of them."""
    units = unit_table(need)
    if units is not None:
        terminal.console.print(units)
    terminal.console.print(totals(need))


def cluster_line(cluster: ClusterSpec) -> str:
    """A cluster in one line."""
    gpus = f", {cluster.gpus_per_node} × {cluster.gpu}" if cluster.gpu else ""
    total = f", {size(cluster.storage_total)}/s in all" if cluster.storage_total else ""
    return (
        f"{cluster.nodes} node(s) of {cluster.cpus_per_node} CPUs, {size(cluster.memory_per_node)} memory{gpus}; "
        f"storage {size(cluster.storage_per_node)}/s a node{total}"
    )


def unit_table(need: Estimate) -> Table | None:
    """The units in the order in which they start: route, seconds by phase, memory, where they run. None if none."""
    if not need.units:
        return None
    names = list(dict.fromkeys(phase for unit in need.units for phase in unit.seconds))
    on_gpu = need.device_memory > 0
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("unit", no_wrap=True)
    for name in ("route", "coefficients", *names, "total", "memory", *(["GPU memory"] if on_gpu else []), "node"):
        table.add_column(name, justify="right", no_wrap=True)
    ordered = sorted(need.units, key=lambda unit: (need.placed[unit.name].start, -unit.total))
    for unit in ordered[:_ROWS]:
        where = f"{size(unit.coefficient_bytes)}, {_PLACES[unit.coefficients]}" if unit.coefficients else "–"
        table.add_row(
            unit.name.removesuffix(".weight"),
            unit.route or "–",
            where,
            *(duration(unit.seconds[name]) if unit.seconds.get(name) else "–" for name in names),
            duration(unit.total),
            size(unit.host_memory),
            *([size(unit.device_memory)] if on_gpu else []),
            str(need.placed[unit.name].node + 1),
        )
    if len(ordered) > _ROWS:
        table.add_row(f"… and {len(ordered) - _ROWS} more")
    return table


def totals(need: Estimate) -> Table:
    """Work, time and memory in all, and whether it fits."""
    table = Table.grid(padding=(0, 2))
    table.add_row("on", cluster_line(need.cluster))
    if (more := need.better_cpus_per_task) is not None:
        table.add_row("", f"fewer units than cores: --cpus-per-task {more} would use them (it is part of the result)")
    table.add_row("work", f"{len(need.units)} unit(s), {need.flops / 1e12:.3g} TFLOP")
    table.add_row(
        "time",
        f"about {duration(need.seconds)}: units {duration(need.unit_seconds)}, largest first, "
        f"assembly {duration(need.assembly_seconds)}; start-up apart",
    )
    table.add_row("through storage", f"{size(need.read_bytes)} read, {size(need.written_bytes)} written")
    gpu = f", {size(need.device_memory)} of a GPU" if need.device_memory else ""
    table.add_row("memory", f"largest process {size(need.memory)}, a node {size(need.node_memory)}{gpu}")
    short = need.short_of
    table.add_row("fits", "yes" if short is None else Text.assemble(("no", "bold red"), f": {short}"))
    return table
