"""The whole story on one small machine, without a network: `python -m pipelines.demo`.

    text ▸ tokenize ▸ pretrain a base ▸ expand it by every method ▸ evaluate ▸ train two results, and the base, on

Each step is what `lesa-ray` does on the command line. Everything goes under `--out` (default `demo/`): `corpus/`,
`blocks/`, `base/`, a folder per method, `trained/`, `results.json`.

Decides
- What is there is reused, what was interrupted goes on; a second run only reads. What `results.json` holds is under a
  hash of what made it.
- Steps of the base: 1,500, or as many as fit into `--minutes` at the pace of a few throw-away steps, if that is fewer.
  They are written to `plan.json` before training begins, so the clock has no say in a run that is taken up again.
- Afterwards LESA's and LLaMA Pro's results train their new layers, the base everything it has, all on the same rows in
  the same order, for an eighth of the base's steps at a quarter of its learning rate.
- torch and transformers are imported where they are needed, so that the first line appears at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table

from lesa_ray import ExpandConfig, Expanded, UserError, expand
from lesa_ray.report import terminal
from lesa_ray.report.console import Console
from lesa_ray.sizes import size
from lesa_ray.training.train_settings import TrainConfig
from pipelines.jobs import exits

if TYPE_CHECKING:
    from lesa_ray.training.finish import Trained
    from lesa_ray.training.tokens import TokenBlocks
    from pipelines.corpus import Corpus

FACTOR = 1.5
CONTEXT = 256
BATCH = 4  # beat 8 on the same 0.3 M tokens (held-out loss 4.91 and 5.19); at 1.5 M they were level
MOST_STEPS = 1500  # 1.5 M tokens, 0.7 of an epoch
RATE = 2e-3  # held-out loss with 3e-3 was 0.05 higher, with 6e-3 another 0.6
METHODS = ("lesa", "llama-pro", "solar", "avg-deus", "opt-deus")
"""Those that were published."""
TRAINED_ON = ("lesa", "llama-pro")
SAME = 1e-6  # nats: losses closer than this are called equal; sums in another order differ by about 1e-7
console = Console(soft_wrap=True, highlight=False)


def architecture(vocab_size: int) -> dict[str, Any]:
    """The base's config.json: a Llama of eight layers, so that LESA's predictor has six triples, one of them held
    out.

    64 dimensions a head: on a CPU few wide heads are faster than many narrow ones. Tied: at a million tokens most rows
    of a separate head would be barely trained."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


@dataclass(frozen=True)
class Row:
    """A line of the first table, and an entry of `results.json`."""

    name: str
    layers: int
    parameters: int
    loss: float
    perplexity: float
    seconds: float | None
    peak_memory: int | None
    """Bytes of the largest process; None where it was not measured (the base)."""


def run(out: str, minutes: float, steps: int | None, rows: int | None) -> None:
    """Every step, in order."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made: {error.strerror}") from error
    blocks = make_blocks(out, make_corpus(out))
    planned = plan_base(out, blocks, minutes, steps)
    heldout = min(rows or blocks.heldout.rows, blocks.heldout.rows)
    base = train(base_config(out, blocks, planned, heldout))
    grown = {method: grow(out, method) for method in METHODS}
    measured = measure(out, blocks, base, grown, heldout)
    console.print(table(measured))
    console.print(reading(measured))
    more = max(1, planned // 8)
    results = {name: train(more_config(out, blocks, name, more, heldout)) for name in ("base", *TRAINED_ON)}
    console.print(trained_table(results))
    console.print(trained_reading(results))
    console.print("Next, your own model:")
    console.print("  lesa-ray expand meta-llama/Llama-3.1-8B ./llama-12b --method lesa --factor 1.5", style="bold")


def make_corpus(out: str) -> Corpus:
    """The text and its tokenizer."""
    folder = os.path.join(out, "corpus")
    reused = os.path.exists(folder)
    with console.status("corpus: reading the standard library, training a tokenizer"):
        from pipelines.corpus import build_corpus

        corpus = build_corpus(folder)
    console.print(f"{'reusing' if reused else 'made'} {folder}: {corpus.files} files of Python's standard library")
    return corpus


def make_blocks(out: str, corpus: Corpus) -> TokenBlocks:
    """`lesa-ray tokenize`."""
    with console.status("tokenize: loading"):
        from lesa_ray.distributed.tokenize import tokenize
        from lesa_ray.report.data import token_lines
        from lesa_ray.training.data_settings import TokenizeConfig
    config = TokenizeConfig(
        data=(corpus.text_folder,),
        tokenizer=corpus.tokenizer_folder,
        out=os.path.join(out, "blocks"),
        seq_len=CONTEXT,
        holdout=corpus.holdout,
    )
    with terminal.progress_lines(f"tokenize {config.out}") as listener:
        result = tokenize(config, listener)
    console.print(f"{'reusing' if result.reused else 'made'} {token_lines(result)}")
    return result.blocks


def base_config(out: str, blocks: TokenBlocks, steps: int, heldout: int) -> TrainConfig:
    """How the base is pre-trained: warm-up, a constant rate, a linear decay over the last 30 % (after 0.3 M tokens that
    gave 4.87, 50 % 4.91, 90 % 5.10)."""
    return TrainConfig(
        architecture=architecture(blocks.vocab_size),
        data=blocks.url,
        out=os.path.join(out, "base"),
        steps=steps,
        batch=BATCH,
        learning_rate=RATE,
        schedule="wsd",
        warmup=min(50, steps // 2),
        decay=0.3,
        dtype="float32",
        checkpoint_every=100,
        eval_every=steps,
        eval_rows=heldout,
    )


def more_config(out: str, blocks: TokenBlocks, name: str, steps: int, heldout: int) -> TrainConfig:
    """How the base and two of its expansions are trained on."""
    return TrainConfig(
        checkpoint=os.path.join(out, name),
        data=blocks.url,
        out=os.path.join(out, "trained", name),
        train=("all",) if name == "base" else ("new",),
        steps=steps,
        batch=BATCH,
        learning_rate=RATE / 4,
        schedule="cosine",
        checkpoint_every=100,
        eval_every=steps,
        eval_rows=heldout,
        seed=1,
    )


def train(config: TrainConfig) -> Trained:
    """`lesa-ray pretrain`, showing how far it is."""
    with console.status("pretrain: loading"):
        from lesa_ray.distributed.train import pretrain
        from lesa_ray.report.training import training_lines
    with terminal.progress_lines(f"pretrain {config.out}") as listener:
        result = pretrain(config, listener)
    console.print(f"{'reusing' if result.reused else 'made'} {training_lines(result)}")
    return result


def plan_base(out: str, blocks: TokenBlocks, minutes: float, steps: int | None) -> int:
    """The base's steps: `steps` if given, else those of the plan that is there, else what fits."""
    path = os.path.join(out, "plan.json")
    plan = read_json(path)
    if plan.get("minutes") != minutes or plan.get("asked") != steps:
        plan = {"minutes": minutes, "asked": steps, "steps": steps or steps_within(minutes, out, blocks)}
        write_json(path, plan)
    return int(plan["steps"])


def steps_within(minutes: float, out: str, blocks: TokenBlocks, timed: int = 7) -> int:
    """As many steps as fit, in tens, at most `MOST_STEPS`, at the median pace of a few steps of a throw-away model."""
    with console.status("base: timing a few steps"):
        import torch
        import torch.distributed as dist
        from torch._C._distributed_c10d import HashStore

        from lesa_ray.training.loop import Feed
        from lesa_ray.training.run import prepare
        from lesa_ray.training.worker import set_up

        config = base_config(out, blocks, timed, 0)
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            trainer, _, _ = set_up(prepare(config, gpus=False), torch.device("cpu"), fresh=True)
            paces = []
            for step, rows in Feed(blocks, config, trainer.place)(0, timed):
                started = time.perf_counter()
                trainer.step(step, rows)
                paces.append(time.perf_counter() - started)
        finally:
            dist.destroy_process_group()
    fitting = int(60 * minutes / sorted(paces)[timed // 2]) // 10 * 10
    return min(MOST_STEPS, max(10, fitting))


def grow(out: str, method: str) -> Expanded:
    """`lesa-ray expand`, in a fresh process, so that its peak memory is its own, on this process's Ray."""
    folder = os.path.join(out, method)
    config = ExpandConfig(base=os.path.join(out, "base"), out=folder, method=method, factor=FACTOR)
    if os.path.exists(os.path.join(folder, "config.json")):
        result = expand_with_progress(config)  # at once
        console.print(f"reusing {folder}")
        return result
    console.print(f"expanding into {folder}")
    from lesa_ray.distributed.start import start_ray

    start_ray()
    import ray

    address = ray.get_runtime_context().gcs_address
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(expand_with_progress, config, address).result()


def expand_with_progress(config: ExpandConfig, ray_address: str | None = None) -> Expanded:
    """`lesa_ray.expand`, showing how far it is."""
    if ray_address:
        os.environ["RAY_ADDRESS"] = ray_address
    with terminal.progress_lines(f"expand {config.out}") as listener:
        return expand(config, listener=listener)


def measure(out: str, blocks: TokenBlocks, base: Trained, grown: dict[str, Expanded], heldout: int) -> list[Row]:
    """`lesa-ray evaluate` on the held-out rows, all checkpoints side by side; the base's row first."""
    made = {"base": read_json(os.path.join(base.out, "training", "run.json"))["identity"]}
    made |= {method: result.manifest["fingerprint"] for method, result in grown.items()}
    key = hashlib.sha256(json.dumps([made, blocks.digest, heldout]).encode()).hexdigest()
    path = os.path.join(out, "results.json")
    known = read_json(path)
    if known.get("key") == key:
        return [Row(**row) for row in known["rows"]]
    with console.status("evaluate: loading"):
        from lesa_ray.distributed.evaluate import evaluate
        from lesa_ray.evaluation.settings import EvaluateConfig
    checkpoints = tuple(os.path.join(out, name) for name in made)
    config = EvaluateConfig(checkpoints=checkpoints, data=(blocks.url,), limit=heldout)
    with terminal.progress_lines(f"evaluate {out}") as listener:
        report = evaluate(config, listener)
    rows = []
    for name, record in zip(made, report["checkpoints"], strict=True):
        result = grown.get(name)
        seconds, memory = (result.seconds, result.peak_memory) if result else (None, None)
        rows.append(
            Row(name, record["layers"], record["parameters"], record["loss"], record["perplexity"], seconds, memory)
        )
    write_json(path, {"key": key, "rows": [asdict(row) for row in rows]})
    return rows


def table(rows: list[Row]) -> Table:
    """The figures side by side."""
    shown = Table(title=f"{FACTOR}× deeper, before any further training; perplexity on held-out files")
    shown.add_column("method")
    for name in ("layers", "parameters", "perplexity", "seconds", "peak memory"):
        shown.add_column(name, justify="right")
    for row in rows:
        memory = "–" if row.peak_memory is None else size(row.peak_memory)
        seconds = "–" if row.seconds is None else f"{row.seconds:.1f}"
        shown.add_row(row.name, str(row.layers), f"{row.parameters:,}", f"{row.perplexity:.3f}", seconds, memory)
    return shown


def reading(rows: list[Row]) -> str:
    """What the figures say, in a few words, and what they do not."""
    base, *grown = rows
    same = [row.name for row in grown if abs(row.loss - base.loss) <= SAME]
    moved = sorted((row for row in grown if row.name not in same), key=lambda row: row.loss)
    kept = f"the base's function is kept by {', '.join(same) or 'none'}"
    changes = ", ".join(f"{row.name} {100 * (row.perplexity / base.perplexity - 1):+.2g} %" for row in moved)
    return (
        f"Reading: {kept}; perplexity moves with {changes or 'none'}. One {base.layers}-layer base: too few layers for "
        "LESA's predictor to learn much from."
    )


def trained_table(results: dict[str, Trained]) -> Table:
    """Before and after training on."""
    first = next(iter(results.values()))
    shown = Table(title=f"Trained on, {first.steps:,} steps, {first.tokens:,} tokens each; loss on held-out files")
    shown.add_column("model")
    for name in ("trained", "before", "after", "change", "tokens/s"):
        shown.add_column(name, justify="right")
    for name, result in results.items():
        before, after = result.heldout_before or 0.0, result.heldout_after or 0.0
        share = f"{result.trained_parameters:,} of {result.parameters:,}"
        speed = f"{result.tokens_per_second:,.0f}"
        shown.add_row(name, share, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}", speed)
    return shown


def trained_reading(results: dict[str, Trained]) -> str:
    """What the second table says."""
    base, *grown = results.items()
    told = []
    for name, result in grown:
        ahead = (base[1].heldout_after or 0.0) - (result.heldout_after or 0.0)
        told.append(f"{name} ends {abs(ahead):.4f} {'below' if ahead > 0 else 'above'}")
    return (
        f"Reading: beside the base trained on for as many tokens, {', '.join(told)} its loss. One seed, a few minutes: "
        "it shows that the machinery works, not which method is better."
    )


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


def main(
    out: Annotated[str, typer.Option(help="Folder for everything the demo makes.")] = "demo",
    minutes: Annotated[float, typer.Option(min=0.0, help="Longest time for pre-training the base.")] = 3.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Pre-training steps, instead of --minutes.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Measure on so many held-out rows; all by default.")] = None,
) -> None:
    """Pre-train a small model on this machine, grow it with every method, train two results on, compare."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the demo draws its own
    # Threads that wait must sleep, not spin: with one other busy process on two cores a training step took 0.4 s
    # so, and more than 5 s otherwise. Read when torch is imported, hence here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console.print(f"lesa-ray demo, everything goes to {out}/")
    with exits("demo"):
        run(out, minutes, steps, rows)


if __name__ == "__main__":
    typer.run(main)
