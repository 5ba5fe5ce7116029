"""What a person sees in the terminal: the plan as a picture, tables, progress, one line at the end.

Everything goes to standard error, so that `--json` on standard output stays clean for programs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lesa_ray.checkpoint.manifest import Manifest
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.plan import New, Old, Plan
from lesa_ray.printable import printable
from lesa_ray.report.console import Console
from lesa_ray.sizes import size

console = Console(stderr=True)
if not console.is_terminal:
    console.width = 140  # a log file wraps nothing
_CELL = 9
_PLAIN_SECONDS = 10.0  # where no terminal can redraw a line, one is printed this often


def duration(seconds: float) -> str:
    """Seconds for people: 4.2 s, 12 min, 3.1 h."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count(parameters: int) -> str:
    """Parameters for people: 8.03 B."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def unread_files(endings: dict[str, int]) -> str:
    """Which files among the data are left out: how many of each ending."""
    kinds = ", ".join(f"{files:,} {ending or 'without an ending'}" for ending, files in endings.items())
    return f"files among the data that were not read: {kinds}"


def plan_picture(plan: Plan, *, copies: bool, width: int) -> Text:
    """The layers of the result in reading order, each with its index: old ones with the layer they were, new ones
    with those they come from."""
    text = Text()
    per_row = max(1, (width - 2) // (2 * _CELL))
    for index, output in enumerate(plan.outputs):
        if isinstance(output, Old):
            cell, style = f"{index:>4} ← {output.id}", "default"
        elif copies or output.upper is None:
            cell, style = f"{index:>4} ⧉ {plan.origin(output.lower)}", "bold green"
        else:
            cell, style = f"{index:>4} + {plan.origin(output.lower)}|{plan.origin(output.upper)}", "bold green"
        text.append(f"{cell:<{2 * _CELL}}", style=style)
        if (index + 1) % per_row == 0 and index + 1 < plan.layers:
            text.append("\n")
    text.append("\n  ← old layer   ", style="dim")
    text.append("⧉ new, a copy   " if copies else "+ new, between two   ", style="dim")
    text.append("(index in the result, then layers of the base)", style="dim")
    return text


def show_expansion(expansion: Expansion) -> None:
    """What the base is, the plan, and the size of the result."""
    show_base(expansion)
    job, plan = expansion.job, expansion.job.whole_plan
    paper = f" ({job.method.paper})" if job.method.paper else ""
    console.print(Text.assemble("\n", (job.method.name, "bold"), f": {plan.base_layers} → {plan.layers} layers{paper}"))
    if expansion.chosen is not None:
        console.print(f"chosen by auto: {expansion.chosen}", highlight=False)
    console.print(plan_picture(plan, copies=job.method.copies, width=console.width))
    table = Table.grid(padding=(0, 2))
    scaled = "not zeroed" if job.output_scale == 1 else f"output projections × {job.output_scale:g}"
    table.add_row("new layers", "all output projections zero: the function is kept" if job.zero_init else scaled)
    table.add_row("norms, biases", {"lower": "lower neighbour's", "first": "layer 0's"}.get(job.vectors, job.vectors))
    if job.widths is not None:
        slots = [job.widths.of(output.id) for output in job.plan.outputs if isinstance(output, New)]
        table.add_row("new FFN widths", ", ".join(f"{width.neurons:,}" for width in slots))
        table.add_row("new query heads", ", ".join(str(width.heads) for width in slots))
        if job.widths.note is not None:
            table.add_row("", job.widths.note)
    if (change := class_change(expansion)) is not None:
        table.add_row("class", change)
    table.add_row(
        "result", f"{count(expansion.parameters)} parameters, {size(expansion.nbytes)}, {len(expansion.shards)} file(s)"
    )
    console.print(table)


def class_change(expansion: Expansion) -> str | None:
    """What the result's class is, if it is not the base's."""
    before, after = expansion.job.anatomy.family, expansion.config.get("model_type")
    if expansion.job.widths is None or before == after:
        return None
    return f"{before} → {after}, for layers of several widths; loads elsewhere with trust_remote_code=True"


def show_base(expansion: Expansion) -> None:
    """Family, layers, weight types with shapes and dtypes, parameters."""
    checkpoint, anatomy = expansion.checkpoint, expansion.job.anatomy
    tied = "tied" if checkpoint.config.get("tie_word_embeddings") else "untied"
    console.print(
        Text.assemble(
            (checkpoint.base, "bold"),
            f": {anatomy.family}, {anatomy.depth} layers, {count(checkpoint.parameters)} parameters, "
            f"{size(checkpoint.nbytes)} in {len(checkpoint.shards)} file(s), {tied} embeddings",
        ),
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("weight type", "shape", "dtype", "kind"):
        table.add_column(column)
    rows: dict[tuple[str, ...], int] = {}
    for t in anatomy.types.values():
        kind = t.kind + (" (stored transposed)" if t.transposed else "")
        if (having := len(anatomy.layers_with(t.name))) < anatomy.layers:
            kind += f" ({having} of {anatomy.layers} layers)"
        row = (t.of_its_kind, _shape(expansion, t.name), t.dtype, kind)
        rows[row] = rows.get(row, 0) + 1
    for (name, shape, dtype, kind), members in rows.items():
        table.add_row(name, shape, dtype, f"{kind}, of {members} experts" if members > 1 else kind)
    console.print(table)
    if checkpoint.left_out:
        parts = ", ".join(f"{name} ({size(nbytes)})" for name, nbytes in checkpoint.left_out.items())
        console.print(f"the language model of a larger one; left out: {parts}", markup=False, highlight=False)
    if anatomy.below:
        lowest = "layer 0 has" if anatomy.below == 1 else f"layers 0 to {anatomy.below - 1} have"
        console.print(f"{lowest} other tensors than those above, between which the new layers go")


def _shape(expansion: Expansion, weight_type: str) -> str:
    """A weight type's shape; from the least to the most where layers differ."""
    anatomy, checkpoint = expansion.job.anatomy, expansion.checkpoint
    having = anatomy.layers_with(weight_type)
    shapes = [checkpoint.entry(anatomy.name(layer, weight_type)).shape for layer in having]
    sizes = [sorted(set(size)) for size in zip(*shapes, strict=True)]
    return " × ".join(str(size[0]) if len(size) == 1 else f"{size[0]} … {size[-1]}" for size in sizes)


def describe(expansion: Expansion) -> dict[str, Any]:
    """The same as `show_expansion`, as plain JSON values."""
    job = expansion.job
    return {
        "base": {
            "name": job.config.base,
            "family": job.anatomy.family,
            "layers": job.anatomy.depth,
            "other_layers_below": job.anatomy.below,
            "left_out": expansion.checkpoint.left_out,
            "parameters": expansion.checkpoint.parameters,
            "bytes": expansion.checkpoint.nbytes,
            "files": len(expansion.checkpoint.shards),
            "tied_embeddings": bool(expansion.checkpoint.config.get("tie_word_embeddings")),
            "weight_types": {
                t.name: {
                    "shape": list(t.shape),
                    "dtype": t.dtype,
                    "kind": t.kind,
                    "layers": len(job.anatomy.layers_with(t.name)),
                }
                for t in job.anatomy.types.values()
            },
        },
        "plan": {
            "method": job.method.name,
            "chosen": expansion.chosen,
            "layers": job.whole_plan.layers,
            "outputs": [
                {"old": o.id} if isinstance(o, Old) else {"new": o.id, "lower": o.lower, "upper": o.upper}
                for o in job.whole_plan.outputs
            ],
            "zero_init": job.zero_init,
            "output_scale": 0.0 if job.zero_init else job.output_scale,
            "vectors": job.vectors,
        },
        "result": {
            **_described_widths(expansion),
            "parameters": expansion.parameters,
            "bytes": expansion.nbytes,
            "files": [shard.file for shard in expansion.shards],
        },
    }


def _described_widths(expansion: Expansion) -> dict[str, Any]:
    """Family and widths of the result's layers, where they differ."""
    widths = expansion.job.widths
    if widths is None:
        return {}
    layers = [widths.of(output.id) for output in expansion.job.plan.outputs]
    return {
        "family": expansion.config["model_type"],
        "ffn": [width.neurons for width in layers],
        "heads": [width.heads for width in layers],
        "note": widths.note,
    }


def fit_table(manifest: Manifest) -> Table | None:
    """How well each weight type was predicted, beside predicting zero, the mean of the neighbours, and ridge
    regression."""
    fits = {name: fit for name, fit in manifest["fit"].items() if "trained" in fit}
    if not fits:
        return None
    held_out = any(fit["held_out"] for fit in fits.values())
    rows = "held-out layers" if held_out else "training layers (none was held out)"
    made_by = "ridge regression" if next(iter(fits.values())).get("predictor") == "ridge" else "the network"
    table = Table(
        title=f"Fit of {made_by} on {rows}: R² (1 is perfect, 0 is predicting zero) and cosine", title_justify="left"
    )
    if any("cosine_matched" in fit.get("mlp", {}) for fit in manifest["fit"].values()):
        table.caption = "Layers were matched first, which alone lifts R² and cosine; `lesa-ray analyze` shows chance."
        table.caption_justify = "left"
    for column in ("weight type", "train loss", "held-out loss", "R²", "cosine", "R² mean", "R² ridge", "norm ratio"):
        table.add_column(column, justify="left" if column == "weight type" else "right", no_wrap=True)
    for name, fit in fits.items():
        scores = fit["held_out"] or fit["trained"]
        table.add_row(
            name.removesuffix(".weight"),
            f"{fit['train_loss'][-1] if fit['train_loss'] else fit['trained']['predictor']['loss']:.3g}",
            f"{fit['held_out']['predictor']['loss']:.3g}" if fit["held_out"] else "–",
            *(_number(scores["predictor"][key]) for key in ("r2", "cosine")),
            *(_number(scores.get(rival, {}).get("r2")) for rival in ("mean", "ridge")),
            _number(fit["norm_ratio"]),
        )
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


class ProgressLines:
    """A listener that draws a bar, or prints a line now and then where there is no terminal: in the log of a job each
    says when, and of what, the label."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._label = progress, label
        self._task: TaskID | None = None
        self._name, self._total, self._printed = "", 0.0, 0.0

    def phase(self, name: str, total: float) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._name, self._total, self._printed = name, total, time.monotonic()
        self._task = self._progress.add_task(name, total=total or None, detail="")
        if not console.is_terminal:
            log_line(self._label, name)

    def progress(self, done: float, detail: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done, detail=detail)
        if not console.is_terminal and time.monotonic() - self._printed > _PLAIN_SECONDS and self._total:
            self._printed = time.monotonic()
            log_line(self._label, f"{self._name}: {100 * done / self._total:.0f} % {detail}")


def log_line(label: str, text: str) -> None:
    """A line of a log: the time of day (UTC), of which run and stage, what. Where it cannot be written (the disk of the
    log is full, the terminal was closed, what read the pipe has ended) the work goes on without."""
    now = datetime.now(UTC).strftime("%H:%M:%S")
    with suppress(OSError):
        sys.stderr.write(printable(f"{now} {label}: {' '.join(text.split())}\n"))
        sys.stderr.flush()


@contextmanager
def progress_lines(label: str) -> Iterator[ProgressLines]:
    """Progress on standard error while the block runs. label: the stage and the run, for logs."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield ProgressLines(progress, label)
