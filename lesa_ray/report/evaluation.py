"""What a person sees of an evaluation: the losses side by side, the tasks, and how to read them."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lesa_ray.report.terminal import unread_files

_CLEAR = 2.0
"""Standard errors from which on a difference is printed bold: by chance alone one in twenty is."""


def evaluation_table(report: dict[str, Any]) -> Group:
    """The report of `lesa_ray.distributed.evaluate.evaluate` as tables with a caption, for `terminal.console.print`."""
    parts: list[Table | Text] = []
    if report["data"] is not None:
        parts += [_losses(report), Text(_caption(report), style="dim")]
    if any(record.get("tasks") for record in report["checkpoints"]):
        parts.append(_tasks(report))
    parts += [Text(f"not measured: {one['error']}") for one in report["checkpoints"] if "error" in one]
    return Group(*parts)


def measured(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the checkpoints that could be measured."""
    return [record for record in report["checkpoints"] if "error" not in record]


def _losses(report: dict[str, Any]) -> Table:
    records = measured(report)
    table = Table(
        title=f"Loss on {_data_name(report)}", title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    table.add_column("checkpoint", overflow="fold", min_width=12)
    in_bytes = any(record["bits_per_byte"] is not None for record in records)
    paired = any("difference" in record for record in records)
    for name in ("tokens", "loss", "perplexity", *(["bits/byte"] if in_bytes else [])):
        table.add_column(name, justify="right", no_wrap=True)
    if paired:
        table.add_column("Δ to the first", justify="right", no_wrap=True)
    for record in records:
        cells: list[str | Text] = [
            record["checkpoint"],
            f"{record['tokens']:,}",
            f"{record['loss']:.4f}",
            _perplexity(record["perplexity"]),
        ]
        if in_bytes:
            cells.append(f"{record['bits_per_byte']:.4f}")
        if paired:
            cells.append(_difference(record.get("difference")))
        table.add_row(*cells)
    return table


def _perplexity(value: float | None) -> str:
    if value is None:
        return "over 1e304"
    return f"{value:.3f}" if value < 1e5 else f"{value:.4g}"


def _difference(found: dict[str, Any] | None) -> str | Text:
    if found is None:
        return "–"
    unit = "" if found["of"] == "loss" else " b/B"
    if found["stderr"] is None:
        return f"{found['value']:+.4f}{unit}"
    clear = abs(found["value"]) > _CLEAR * found["stderr"]
    return Text(f"{found['value']:+.4f} ± {found['stderr']:.4f}{unit}", style="bold" if clear else "default")


def _data_name(report: dict[str, Any]) -> str:
    data = report["data"]
    return f"{data['name']}, split {data['split']}" if data["kind"] == "blocks" else str(data["name"])


def _caption(report: dict[str, Any]) -> str:
    """Windows, and what the differences are."""
    text = (
        f"windows of {report['window']:,} tokens, one every {report['stride']:,}; loss in nats a token, "
        "each token weighs the same"
    )
    if (limit := report["settings"]["limit"]) is not None:
        text += f"; only the first {limit:,} documents or rows"
    found = [record["difference"] for record in report["checkpoints"] if "difference" in record]
    if found:
        units = " or ".join(sorted({one["over"] for one in found}))
        text += f"; Δ ± its standard error, paired over {units}, bold where it is more than twice that"
    if any(one["of"] != "loss" for one in found):
        text += "; b/B: bits a byte, where the tokenizers differ and losses cannot be compared"
    if unread := report["data"].get("unread_files"):
        text += f"; {unread_files(unread)}"
    return text


def _tasks(report: dict[str, Any]) -> Table:
    records = measured(report)
    title = "Tasks (lm-evaluation-harness), value ± standard error"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("task", "metric", "examples", "shots"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for record in records:
        table.add_column(record["checkpoint"], justify="right", overflow="fold")
    for task, found in records[0]["tasks"].items():
        for metric, figure in found["metrics"].items():
            arrow = {True: " ↑", False: " ↓"}.get(figure["higher_is_better"], "")
            shared = [str(found[key]) if found[key] is not None else "–" for key in ("examples", "fewshot")]
            cells = [_figure(record["tasks"].get(task, {}).get("metrics", {}).get(metric)) for record in records]
            table.add_row(task, metric + arrow, *shared, *cells)
    return table


def _figure(found: dict[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "–"
    return f"{found['value']:.4f}" + ("" if found["stderr"] is None else f" ± {found['stderr']:.4f}")
