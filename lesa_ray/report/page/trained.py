"""Training runs given by themselves: their loss, step by step and on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lesa_ray.report.page.commands import command
from lesa_ray.report.page.figure import Entry, Figure, Panel, plot_line, short_ticks
from lesa_ray.report.page.palette import Stroke, arm_stroke
from lesa_ray.report.page.sources import Training
from lesa_ray.report.page.words import big, listed, signed
from lesa_ray.training.train_settings import OPERATIONAL, FinetuneConfig, TrainConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 600
"""Points drawn of one run: more cannot be seen, and would make the page heavy."""
_CONVERSATIONS = "/training/data"
"""Where fine-tuning puts token blocks of its own."""


def training_figure(trainings: Sequence[Training]) -> Figure | None:
    """Two panels: the held-out loss and that of the training rows, against tokens."""
    heldout = {run.label: _heldout(run) for run in trainings}
    size = max(1, -(-max(len(run.rows) for run in trainings) // _POINTS)) if trainings else 1
    losses = {run.label: _losses(run, size) for run in trainings}
    shown = [run for run in trainings if heldout[run.label][0] or losses[run.label][0]]
    if not shown:
        return None
    strokes = {run.label: arm_stroke(at, False) for at, run in enumerate(shown)}
    said = []
    for run in shown:
        ys = heldout[run.label][1]
        if len(ys) > 1 and _no_number_from(run, "heldout_loss") is None:
            said.append(f"{run.label} {ys[0]:.4f} → {ys[-1]:.4f} ({signed(ys[-1] - ys[0])})")
    see = (
        f"Held-out loss from the first evaluation to the last: {listed(said)}."
        if said
        else ("The held-out loss was not measured twice, so what training changed is not known.")
    )
    see += "".join(f" {text}" for run in shown for text in (*_ending_words(run), _insertion_words(run)) if text)
    panels = []
    if any(heldout[run.label][0] for run in shown):
        panels.append(_panel("held-out rows", {r.label: heldout[r.label] for r in shown}, strokes, marks=True))
    if any(losses[run.label][0] for run in shown):
        title = "training rows" if size == 1 else "training rows, means of neighbours"
        panels.append(_panel(title, {r.label: losses[r.label] for r in shown}, strokes))
    return Figure(
        "training",
        "Loss during training",
        f"{see} One run each: no spread is known." if len(shown) > 1 else see,
        how_train(shown[0]),
        tuple(panels),
        tuple(Entry(run.label, strokes[run.label]) for run in shown),
    )


def _ending_words(run: Training) -> list[str]:
    """What a run lacks at its end, a sentence each."""
    said = []
    steps, last = run.settings.get("steps"), max((row["step"] for row in run.rows), default=0)
    if not run.result and isinstance(steps, int) and last < steps:
        said.append(f"{run.label} has not ended: it stopped, or is, at step {last:,} of {steps:,}.")
    for key, name in (("heldout_loss", "held-out loss"), ("loss", "loss")):
        if (step := _no_number_from(run, key)) is not None:
            said.append(f"From step {step:,} the {name} of {run.label} is not a number.")
    return said


def _no_number_from(run: Training, key: str) -> int | None:
    """The step after which a loss is no number any more; None if the last one is."""
    at = None
    for row in run.rows:
        if key in row:
            at = (row["step"] if at is None else at) if row[key] is None else None
    return at


def _insertion_words(run: Training) -> str | None:
    """Until when the losses are those of the gated model; None where new layers did not come in gradually."""
    tokens = _tokens(run)
    known = [(row["step"], row["inserted"]) for row in run.rows if isinstance(row.get("inserted"), int | float)]
    whole = next((tokens.get(step, step) for step, share in known if share == 1), None)
    if whole is None:
        return f"New layers of {run.label} are not all in yet: its losses are the gated model's." if known else None
    return (
        f"New layers of {run.label} are all in after {big(whole)} tokens: until then its losses are the gated model's."
    )


def how_train(run: Training) -> str:
    """The command that makes the run again, of the token blocks that it was trained on."""
    settings = {"data": "BLOCKS", **(run.config or run.settings), "out": run.label.replace(" ", "-")}
    tuned = str(settings["data"]).endswith(_CONVERSATIONS)
    checkpoint = settings.get("checkpoint") or ("" if settings.get("architecture") else "CKPT")
    words = ["lesa-ray", "finetune" if tuned else "pretrain", *([checkpoint] if checkpoint else [])]
    of_itself = {"checkpoint", *OPERATIONAL} - {"out"}
    return command(words, FinetuneConfig if tuned else TrainConfig, settings, of_itself)


def _tokens(run: Training) -> dict[int, float]:
    """Tokens by step; where a row has none, as many a step as the others have."""
    known = {row["step"]: row["tokens"] for row in run.rows if isinstance(row.get("tokens"), int | float)}
    if not known:
        return {}
    last = max(known)
    return {0: 0.0, **{row["step"]: row["step"] * known[last] / last for row in run.rows if last}, **known}


def _series(run: Training, key: str) -> tuple[list[float], list[float]]:
    tokens = _tokens(run)
    points = [(tokens.get(row["step"], row["step"]), row[key]) for row in run.rows if isinstance(row.get(key), float)]
    return [x for x, _ in points], [y for _, y in points]


def _heldout(run: Training) -> tuple[list[float], list[float]]:
    return _series(run, "heldout_loss")


def _losses(run: Training, size: int) -> tuple[list[float], list[float]]:
    """The loss of the steps, as means over `size` of them."""
    x, y = _series(run, "loss")
    starts = range(0, len(x), size)
    return [x[min(s + size, len(x)) - 1] for s in starts], [sum(y[s : s + size]) / len(y[s : s + size]) for s in starts]


def _panel(
    title: str, series: dict[str, tuple[list[float], list[float]]], strokes: dict[str, Stroke], *, marks: bool = False
) -> Panel:
    def draw(axes: Axes) -> None:
        for label, (x, y) in series.items():
            if not x:
                continue
            stroke = strokes[label]
            every = max(1, len(x) // 8)
            few = marks or len(x) == 1
            more = {"marker": stroke.marker, "markevery": (0, every), "markersize": 4} if few else {"linewidth": 0.9}
            plot_line(axes, x, y, stroke, **more)
        axes.set_xlim(left=0)
        axes.margins(y=0.08)
        axes.set_xlabel("tokens trained on")
        axes.set_ylabel("loss (nats a token)")
        short_ticks(axes)

    return Panel(title, draw)
