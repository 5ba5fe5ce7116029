"""The whole story on one small machine, without a network: `python -m pipelines.demo`.

Pre-trains a small Llama on the source of Python's standard library, grows it 1.5× with every method of the registry,
and measures each result's perplexity on files it has not seen. Everything goes under `--out` (default `demo/`):
`corpus/`, `base/`, a folder per method, `results.json`.

Decides
- What is there is reused, what was interrupted goes on; a second run only reads. `results.json` holds what the first
  run measured, each entry under a hash of what made it (base, method, factor, held-out text).
- Steps: 1,500, or as many as fit into `--minutes` at the pace of a few throw-away steps, if that is fewer. They are
  written to `plan.json` before training begins, so the clock has no say in a run that is taken up again.
- torch and transformers are imported where they are needed, so that the first line appears at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from lesa_ray import ExpandConfig, Expanded, MachineError, UserError, expand
from lesa_ray.report import terminal
from lesa_ray.training.settings import PretrainSettings

if TYPE_CHECKING:
    from lesa_ray.training.corpus import Corpus
    from lesa_ray.training.pretrain import PretrainResult

FACTOR = 1.5
SAME = 1e-6  # nats: losses closer than this are called equal; sums in another order differ by about 1e-7
console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Row:
    """A line of the table, and an entry of `results.json`."""

    name: str
    layers: int
    parameters: int
    loss: float
    perplexity: float
    seconds: float
    peak_memory: int | None
    """Bytes of the largest process; None where it was not measured (the base)."""


def run(out: str, minutes: float, steps: int | None) -> list[Row]:
    """Every step, in order; returns the table's rows, the base first."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made: {error.strerror}") from error
    corpus = make_corpus(out)
    base = make_base(out, corpus, minutes, steps)
    with console.status("loading the expansion methods"):
        from lesa_ray.expansion.registry import METHODS
    rows = [measure_base(out, base, corpus)]
    rows += [grow(out, method, corpus) for method in METHODS]
    console.print(table(rows))
    console.print(reading(rows))
    console.print("Next, your own model:")
    console.print("  lesa-ray expand meta-llama/Llama-3.1-8B ./llama-12b --method lesa --factor 1.5", style="bold")
    return rows


def make_corpus(out: str) -> Corpus:
    """Step 1: the text and its tokenizer."""
    folder = os.path.join(out, "corpus")
    reused = os.path.exists(folder)
    with console.status("corpus: reading the standard library, training a tokenizer"):
        from lesa_ray.training.corpus import build_corpus

        corpus = build_corpus(folder)
    console.print(
        f"{'reusing' if reused else 'made'} {folder}: {len(corpus.train):,} tokens of {corpus.train_files} files to "
        f"train on, {len(corpus.heldout):,} of {corpus.heldout_files} held out"
    )
    return corpus


def make_base(out: str, corpus: Corpus, minutes: float, steps: int | None) -> PretrainResult:
    """Step 2: the small model that is to be grown."""
    with console.status("base: loading, timing a few steps"):
        from lesa_ray.training import pretrain as engine

        settings = plan_base(out, corpus, minutes, steps)
        tokenizer = corpus.tokenizer()
    folder = os.path.join(out, "base")
    with counter(f"pre-training {folder}") as advance:

        def show(progress: engine.Progress) -> None:
            advance(progress.step, progress.steps, str(progress))

        base = engine.pretrain(folder, corpus.train, tokenizer, settings, show)
    console.print(
        f"{'reusing' if base.reused else 'made'} {folder}: {settings.layers} layers, {base.parameters:,} parameters, "
        f"{base.steps} steps, {base.tokens:,} tokens in {base.seconds:.0f} s"
    )
    return base


def plan_base(out: str, corpus: Corpus, minutes: float, steps: int | None) -> PretrainSettings:
    """The base's settings: `steps` if given, else those of the base or the plan that is there, else what fits."""
    steps = steps or read_json(os.path.join(out, "base", "pretrain.json")).get("steps")
    if steps is None:
        path = os.path.join(out, "plan.json")
        plan = read_json(path)
        if plan.get("minutes") != minutes:
            plan = {"minutes": minutes, "steps": steps_within(minutes, corpus)}
            write_json(path, plan)
        steps = plan["steps"]
    return PretrainSettings(steps=steps)


def steps_within(minutes: float, corpus: Corpus, timed: int = 7) -> int:
    """As many steps as fit, in tens, at most the default, at the median pace of a few steps of a throw-away model."""
    from lesa_ray.training import pretrain as engine

    settings = PretrainSettings()
    model = engine.make_model(settings, len(corpus.tokenizer()), 0)
    optimizer = engine.make_optimizer(model, settings)
    paces = []
    with engine.cpu_threads(settings.threads):
        for step in range(timed):
            started = time.perf_counter()
            engine.train_step(model, optimizer, corpus.train, step, settings)
            paces.append(time.perf_counter() - started)
    fitting = int(60 * minutes / sorted(paces)[timed // 2]) // 10 * 10
    return min(settings.steps, max(10, fitting))


def measure_base(out: str, base: PretrainResult, corpus: Corpus) -> Row:
    """The base's own line."""
    key = key_of(out, corpus, "base")
    known = read_json(os.path.join(out, "results.json"))
    if key in known:
        return Row(**known[key])
    loss, perplexity = measure(base.out, corpus)
    row = Row("base", PretrainSettings().layers, base.parameters, loss, perplexity, base.seconds, None)
    remember(out, key, row)
    return row


def grow(out: str, method: str, corpus: Corpus) -> Row:
    """Step 3, for one method: expand the base, measure the result."""
    folder = os.path.join(out, method)
    config = ExpandConfig(base=os.path.join(out, "base"), out=folder, method=method, factor=FACTOR)
    key = key_of(out, corpus, method)
    known = read_json(os.path.join(out, "results.json"))
    if key in known:
        result = expand_with_progress(config)  # at once, unless the folder was removed
        console.print(f"{'reusing' if result.reused else 'made'} {folder}")
        return Row(**known[key])
    console.print(f"expanding into {folder}")
    # A fresh process, so that its peak memory is its own, not that of the training and measuring done here; 3 s.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        result = fresh.submit(expand_with_progress, config).result()
    loss, perplexity = measure(folder, corpus)
    row = Row(method, result.layers, result.parameters, loss, perplexity, result.seconds, result.peak_memory)
    remember(out, key, row)
    return row


def expand_with_progress(config: ExpandConfig) -> Expanded:
    """`lesa_ray.expand`, showing how far it is."""
    with terminal.progress_lines() as listener:
        return expand(config, listener=listener)


def measure(folder: str, corpus: Corpus) -> tuple[float, float]:
    """Loss and perplexity of a checkpoint on the held-out files, in windows of the model's own context."""
    from lesa_ray.evaluation.perplexity import perplexity

    with counter(f"perplexity of {folder}") as advance:
        result = perplexity(folder, corpus.heldout, progress=advance)
    return result.loss, result.perplexity


def table(rows: list[Row]) -> Table:
    """The figures side by side."""
    shown = Table(title=f"{FACTOR}× deeper, before any further training; perplexity on held-out files")
    shown.add_column("method")
    for name in ("layers", "parameters", "perplexity", "seconds", "peak memory"):
        shown.add_column(name, justify="right")
    for row in rows:
        memory = "–" if row.peak_memory is None else terminal.size(row.peak_memory)
        shown.add_row(
            row.name, str(row.layers), f"{row.parameters:,}", f"{row.perplexity:.3f}", f"{row.seconds:.1f}", memory
        )
    return shown


def reading(rows: list[Row]) -> str:
    """What the figures say, in a few words, and what they do not."""
    base, *grown = rows
    same = [row.name for row in grown if abs(row.loss - base.loss) <= SAME]
    moved = sorted((row for row in grown if row.name not in same), key=lambda row: row.loss)
    kept = f"the base's function is kept by {', '.join(same) or 'none'}"
    changes = ", ".join(f"{row.name} {100 * (row.perplexity / base.perplexity - 1):+.2g} %" for row in moved)
    return (
        f"Reading: {kept}; perplexity moves with {changes or 'none'}.\n"
        f"This is where further training starts, not where it ends, and on one {base.layers}-layer base: too few "
        "layers for LESA's predictor to learn much from."
    )


def key_of(out: str, corpus: Corpus, name: str) -> str:
    """A hash of what makes a row: the base, the method and factor, the held-out text."""
    identity = read_json(os.path.join(out, "base", "pretrain.json"))["identity"]
    return f"{name} {hashlib.sha256(f'{identity} {name} {FACTOR} {corpus.digest}'.encode()).hexdigest()[:16]}"


def remember(out: str, key: str, row: Row) -> None:
    """Add a row to `results.json`."""
    path = os.path.join(out, "results.json")
    write_json(path, {**read_json(path), key: asdict(row)})


def read_json(path: str) -> dict[str, Any]:
    """A JSON file's mapping; empty where there is no file yet."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return cast("dict[str, Any]", json.load(file))


def write_json(path: str, data: dict[str, Any]) -> None:
    """Replace a JSON file at one moment."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
    os.replace(f"{path}.new", path)


@contextmanager
def counter(title: str) -> Iterator[Callable[..., None]]:
    """A bar with a line of text on a terminal; elsewhere (a log) a line at most every ten seconds.

    Yields `advance(done, total, text)`; without text it shows `done/total`.
    """
    if not console.is_terminal:
        last = time.monotonic()

        def log(done: int, total: int, text: str = "") -> None:
            nonlocal last
            if time.monotonic() - last >= 10:
                last = time.monotonic()
                console.print(f"{title}  {text or f'{done}/{total}'}")

        yield log
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with RichProgress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(title, total=None, text="loading")

        def draw(done: int, total: int, text: str = "") -> None:
            bars.update(bar, completed=done, total=total, text=text or f"{done}/{total}")

        yield draw


def main(
    out: Annotated[str, typer.Option(help="Folder for everything the demo makes.")] = "demo",
    minutes: Annotated[float, typer.Option(min=0.0, help="Longest time for pre-training the base.")] = 3.5,
    steps: Annotated[int | None, typer.Option(min=1, help="Pre-training steps, instead of --minutes.")] = None,
) -> None:
    """Pre-train a small model on this machine, grow it with every method, compare."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the demo draws its own
    # Threads that wait must sleep, not spin: with one other busy process on two cores a training step took 0.4 s
    # so, and more than 5 s otherwise. Read when torch is imported, hence here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console.print(f"lesa-ray demo, everything goes to {out}/")
    try:
        run(out, minutes, steps)
    except (UserError, MachineError) as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
    except KeyboardInterrupt:
        print("demo: interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    typer.run(main)
