"""Job: pre-train layer-wise scaled models and their isotropic equal from scratch, several seeds, and compare them.

    python -m pipelines.layerwise_study --config pipelines/layerwise_study_small.yaml     # on a CPU, minutes
    lesa-ray submit -- python -m pipelines.layerwise_study --config pipelines/layerwise_study.yaml

Everything lies below `out`: `runs/DEPTH/PROFILE/SEED/` (what `lesa-ray pretrain` leaves: a checkpoint, the curve),
`results.json`; `corpus/` and `blocks/` where the study makes its own data. What is there is reused, an interrupted run
goes on. A run with an error of its own (its loss is no number any more) stops no other; it is told at the end. All
models have one seed before any has two, so what is there early can be compared. `parallel` runs go side by side, each
led by a Ray task that takes no CPU itself; throughput then depends on what ran beside a run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lesa_ray.comparison.layerwise_study import (
    LayerwiseStudyConfig,
    Row,
    Summary,
    check_tokens,
    models_of,
    reading,
    summarise,
    to_json,
)
from lesa_ray.config import load_settings
from lesa_ray.errors import UserError
from lesa_ray.job_folder import check_kept
from lesa_ray.layerwise.profiles import ProfileName
from lesa_ray.training.train_settings import TrainConfig
from pipelines.jobs import exits

if TYPE_CHECKING:
    from lesa_ray.training.finish import Trained
    from lesa_ray.training.tokens import TokenBlocks

TrainAll = Callable[[Sequence[TrainConfig]], Iterable[tuple[TrainConfig, "Trained | UserError"]]]
"""Pre-trains each, or finds that it is done; gives them as they end, or what is wrong with one."""


def run_study(config: LayerwiseStudyConfig, train_all: TrainAll) -> dict[str, Any]:
    """Every run; what results.json holds.

    A run that cannot be is among its `missing`. Raises: UserError, before anything is trained, or if no run can be;
    MachineError, after which the same call goes on."""
    from lesa_ray.checkpoint.storage import Storage
    from lesa_ray.layerwise.settings import architecture, sizes_of
    from lesa_ray.training.tokens import open_blocks

    blocks = open_blocks(config.data) if config.data is not None else make_blocks(config)
    models = models_of(config, blocks)
    checked = check_tokens(blocks)
    if not blocks.heldout.rows:
        raise UserError(f"data {blocks.url}: has no held-out rows to compare on; tokenize with --holdout")
    storage = Storage(config.out)
    runs: dict[str, tuple[int, ProfileName]] = {}
    configs = []
    for seed in config.seeds:
        for (layers, profile), model in models.items():
            out = storage.within(config.run_name(profile, layers, seed)).url
            given = {**config.train, "architecture": architecture(model), "data": blocks.url, "out": out, "seed": seed}
            configs.append(TrainConfig.model_validate(given))
            runs[out] = layers, profile
    rows: dict[str, Row] = {}
    failed: dict[str, UserError] = {}

    def write() -> dict[str, Any]:
        missing = [f"{out}: {failed[out]}" for out in runs if out in failed]
        content = to_json(config, checked, [rows[out] for out in runs if out in rows], missing)
        storage.write("results.json", (json.dumps(content, indent=1) + "\n").encode())
        return content

    for run, trained in train_all(configs):
        if isinstance(trained, UserError):
            failed[run.out] = trained
            continue
        assert trained.heldout_after is not None
        layers, profile = runs[run.out]
        rows[run.out] = Row(
            layers=layers,
            profile=profile,
            seed=run.seed,
            parameters=trained.parameters,
            attention=sizes_of(models[layers, profile]).sizes.attention_share,
            tokens=trained.tokens,
            heldout_loss=trained.heldout_after,
            loss=trained.loss,
            tokens_per_second=trained.tokens_per_second,
        )
        write()
    if not rows:
        raise next(iter(failed.values()))
    return write()


def make_blocks(config: LayerwiseStudyConfig) -> TokenBlocks:
    """Token blocks of Python's standard library, as the demo's. Raises: UserError where `out` is a URL."""
    if "://" in config.out:
        raise UserError(
            f"out {config.out}: data is made in a folder only; make it with `lesa-ray tokenize`, give --data"
        )
    from lesa_ray.distributed.tokenize import tokenize
    from lesa_ray.report.terminal import progress_lines
    from lesa_ray.training.data_settings import TokenizeConfig
    from pipelines.corpus import build_corpus

    os.makedirs(config.out, exist_ok=True)
    corpus = build_corpus(os.path.join(config.out, "corpus"))
    settings = TokenizeConfig(
        data=(corpus.text_folder,),
        tokenizer=corpus.tokenizer_folder,
        out=os.path.join(config.out, "blocks"),
        seq_len=config.seq_len,
        holdout=corpus.holdout,
    )
    with progress_lines(f"tokenize {settings.out}") as listener:
        return tokenize(settings, listener).blocks


def in_turn(train: Callable[[TrainConfig], Trained]) -> TrainAll:
    """One after another."""

    def train_all(configs: Sequence[TrainConfig]) -> Iterator[tuple[TrainConfig, Trained | UserError]]:
        for config in configs:
            try:
                trained: Trained | UserError = train(config)
            except UserError as error:
                trained = error
            yield config, trained

    return train_all


def side_by_side(parallel: int) -> TrainAll:
    """So many at once, each led by a Ray task; a fault of the machine ends the others."""

    def train_all(configs: Sequence[TrainConfig]) -> Iterator[tuple[TrainConfig, Trained | UserError]]:
        from lesa_ray.distributed.start import start_ray
        from lesa_ray.distributed.tasks import Tasks
        from lesa_ray.distributed.train import pretrain
        from lesa_ray.report.terminal import log_line

        start_ray()
        with Tasks[int](pretrain) as tasks:
            waiting = list(enumerate(configs))
            while waiting or tasks:
                while waiting and len(tasks) < parallel:
                    at, config = waiting.pop(0)
                    log_line("pretrain", config.out)
                    tasks.start(at, f"pretrain {config.out}", config, num_cpus=0)
                for at, end in tasks.ends():
                    try:
                        trained = end()
                        log_line("pretrain", f"{configs[at].out}: held-out loss {trained.heldout_after:.4f}")
                    except UserError as error:
                        trained = error
                        log_line("pretrain", f"{configs[at].out}: {error}")
                    yield configs[at], trained

    return train_all


def train_with_ray(config: TrainConfig) -> Trained:
    """`lesa-ray pretrain`, showing how far it is."""
    from lesa_ray.distributed.train import pretrain
    from lesa_ray.report.terminal import console, progress_lines
    from lesa_ray.report.training import training_lines

    with progress_lines(f"pretrain {config.out}") as listener:
        result = pretrain(config, listener)
    console.print(training_lines(result), highlight=False)
    return result


def table(summaries: Sequence[Summary]) -> Table:
    """The models side by side."""
    shown = Table(title="held-out loss, nats a token; difference to isotropic over the same seeds")
    for name in ("layers", "profile"):
        shown.add_column(name)
    for name in ("parameters", "attention", "seeds", "loss", "SD", "difference", "± 95 %", "tokens/s", "speed"):
        shown.add_column(name, justify="right")
    for one in summaries:
        shown.add_row(
            str(one.layers), one.profile, f"{one.parameters:,}", f"{100 * one.attention:.1f} %", str(one.seeds),
            f"{one.heldout_loss:.4f}", _spread(one.spread), f"{one.difference:+.4f}", _spread(one.difference_half),
            f"{one.tokens_per_second:,.0f}", f"{100 * one.speed:.0f} %",
        )  # fmt: skip
    return shown


def _spread(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def main(
    config: Annotated[str | None, typer.Option(help="YAML file with the study's settings; flags win.")] = None,
    out: Annotated[str | None, typer.Option(help="Where everything goes: a folder or an fsspec URL.")] = None,
    data: Annotated[str | None, typer.Option(help="Token blocks, made with `lesa-ray tokenize`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on standard output.")] = False,
) -> None:
    """Pre-train layer-wise scaled models and their isotropic equal from scratch, and compare them."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: waiting threads sleep
    from lesa_ray.cli_options import print_json, results_apart
    from lesa_ray.report.terminal import console

    with exits("layerwise_study"), results_apart():
        settings = load_settings(LayerwiseStudyConfig, config, out=out, data=data)
        check_kept("out", settings.out)
        many = settings.parallel > 1
        content = run_study(settings, side_by_side(settings.parallel) if many else in_turn(train_with_ray))
    if as_json:
        print_json(content)
    else:
        summaries = summarise(Row(**row) for row in content["rows"])
        console.print(table(summaries))
        for line in reading(summaries):
            console.print(line, highlight=False)
    for line in content["missing"]:
        print(f"layerwise_study: {line}; the same command tries again", file=sys.stderr)
    if content["missing"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
