"""Job: which way to grow is worth it? The same comparison on several bases, and what they say together.

    python -m pipelines.study --config pipelines/study_minutes.yaml    # two CPU cores
    python -m pipelines.study --config pipelines/study_small.yaml      # the same, an hour and a half
    python -m pipelines.study --config pipelines/study_gpu.yaml        # one GPU
    lesa-ray submit -- python -m pipelines.study --config pipelines/study_cluster.yaml

Bases that are not there yet are pre-trained first. Below `out`: `NAME/corpus/`, `NAME/blocks/`, `NAME/base/` for each
of them, `results.json`; the comparisons lie in the artifact store. What is there is reused, what was interrupted goes
on, and an arm that is added later is run alone."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lesa_ray.comparison.study_settings import StudyBase, StudyConfig
from lesa_ray.comparison.verdict import to_json
from lesa_ray.config import load_settings, validated
from lesa_ray.errors import MachineError, UserError
from lesa_ray.job_folder import check_kept
from pipelines.jobs import exits

if TYPE_CHECKING:
    from lesa_ray.comparison.graph import Comparison
    from lesa_ray.comparison.settings import ComparisonConfig
    from lesa_ray.training.tokens import TokenBlocks
    from lesa_ray.training.train_settings import TrainConfig


def run_study(config: StudyConfig) -> dict[str, Any]:
    """Every base, every comparison; what results.json holds.

    What failed is among its `missing`; the same call tries that again. Raises: UserError for the first setting that is
    wrong, before anything is trained, or if no base can be made; MachineError where too little is there to say
    anything."""
    from lesa_ray.checkpoint.storage import Storage
    from lesa_ray.comparison.collect import Collector
    from lesa_ray.comparison.graph import build
    from lesa_ray.distributed.compare import run_comparison
    from lesa_ray.report.terminal import log_line
    from lesa_ray.store.catalog import Store

    out, store = Storage(config.out), store_of(config)
    blocks = {base.name: _blocks(config, base) for base in config.bases if base.checkpoint is None}
    for base in config.bases:
        try_arms(config, base, blocks.get(base.name))
    comparisons, places, checkpoints = {}, {}, {}
    missing: list[str] = []
    for base in config.bases:
        try:
            checkpoints[base.name] = make_base(config, base, blocks.get(base.name))
        except UserError as error:  # of this base's training, as of a loss that is no number any more
            missing.append(f"{base.name}: {error}")
    if not checkpoints:
        raise UserError("; ".join(missing))
    for base in config.bases:
        if (checkpoint := checkpoints.get(base.name)) is None:
            continue
        chosen = comparison_of(config, base, checkpoint, blocks.get(base.name))

        def say(stage: str, text: str, name: str = chosen.name) -> None:
            log_line(f"{name} {stage}".strip(), text)

        comparison = build(chosen, _where(config, base))
        content, outcomes = run_comparison(comparison, say)
        if lost := [one for one in outcomes if one.how in ("failed", "skipped")]:
            missing.append(f"{chosen.name}: {len(lost)} stages are missing, {lost[0].id} for one: {lost[0].why}")
        comparisons[base.name] = content
        places[base.name] = Collector(comparison, Store(store, chosen.lease)).storage.url
    try:
        results = to_json(config, comparisons, places, missing)
    except UserError as error:
        raise MachineError("; ".join([str(error), *missing])) from None
    out.write("results.json", (json.dumps(results, indent=1) + "\n").encode())
    return results


def store_of(config: StudyConfig) -> str:
    """The artifact store of the comparisons."""
    from lesa_ray.checkpoint.storage import Storage
    from lesa_ray.fleet.settings import absolute

    return absolute(config.store or Storage(config.out).within("store").url)


def comparison_of(
    config: StudyConfig, base: StudyBase, checkpoint: str, blocks: TokenBlocks | None
) -> ComparisonConfig:
    """The comparison on one base."""
    from lesa_ray.fleet.settings import absolute

    place = None if blocks is None else absolute(blocks.url)
    return config.comparison(base, absolute(checkpoint), store_of(config), place)


def _where(config: StudyConfig, base: StudyBase) -> str:
    return f"study {config.name}, base {base.name}"


def try_arms(config: StudyConfig, base: StudyBase, blocks: TokenBlocks | None) -> Comparison:
    """What would be run on a base, every arm tried: one that is there, or one of random weights, since none is trained
    yet.

    Raises: UserError."""
    from lesa_ray.comparison.graph import build

    if blocks is None:
        assert base.checkpoint is not None
        return build(comparison_of(config, base, base.checkpoint, None), _where(config, base))
    import torch
    from transformers import AutoModelForCausalLM

    from lesa_ray.expansion.miniature import quiet_transformers
    from lesa_ray.training.model import build as build_model

    given = _architecture(base, blocks)
    _train_config(config, base, blocks)  # which settings are wrong is told first
    with tempfile.TemporaryDirectory(prefix="lesa-ray-study-") as folder, quiet_transformers():
        settings = build_model(given, f"{_where(config, base)}: architecture").config
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16, trust_remote_code=False)
        model.save_pretrained(folder)
        return build(comparison_of(config, base, folder, blocks), _where(config, base))


def _architecture(base: StudyBase, blocks: TokenBlocks) -> dict[str, Any]:
    """The config.json of a base that is pre-trained here."""
    return {"vocab_size": blocks.vocab_size, **(base.architecture or {})}


def _train_config(config: StudyConfig, base: StudyBase, blocks: TokenBlocks) -> TrainConfig:
    """How a base is pre-trained. Raises: UserError."""
    from lesa_ray.checkpoint.storage import Storage
    from lesa_ray.training.train_settings import TrainConfig

    given = {
        **config.train, **base.train, "seed": config.seed_of(base), "data": blocks.url,
        "out": Storage(config.out).within(f"{base.name}/base").url,
        "architecture": _architecture(base, blocks),
    }  # fmt: skip
    return validated(TrainConfig, given, f"{_where(config, base)}: train")


def make_base(config: StudyConfig, base: StudyBase, blocks: TokenBlocks | None) -> str:
    """A base's checkpoint."""
    if blocks is None:
        assert base.checkpoint is not None
        return base.checkpoint
    from lesa_ray.distributed.train import pretrain
    from lesa_ray.report.terminal import console, progress_lines
    from lesa_ray.report.training import training_lines

    settings = _train_config(config, base, blocks)
    with progress_lines(f"pretrain {settings.out}") as listener:
        trained = pretrain(settings, listener)
    console.print(training_lines(trained), highlight=False)
    return settings.out


def _blocks(config: StudyConfig, base: StudyBase) -> TokenBlocks:
    """A base's own token blocks."""
    from lesa_ray.checkpoint.storage import Storage
    from lesa_ray.distributed.tokenize import tokenize
    from lesa_ray.report.terminal import progress_lines
    from lesa_ray.training.data_settings import TokenizeConfig

    folder, data, tokenizer, more = Storage(config.out).within(base.name), base.data, base.tokenizer, config.tokenize
    where = _where(config, base)
    if base.corpus:
        if "://" in config.out:
            raise UserError(f"{where}: corpus: is made in a folder only; set out to one, or name data")
        from pipelines.corpus import CorpusSettings, build_corpus

        os.makedirs(folder.url, exist_ok=True)
        asked = {name: value for name, value in more.items() if name == "holdout"}  # the tokenizer reads the rest
        chosen = validated(CorpusSettings, {"kinds": base.corpus, "vocab_size": config.vocab_size, **asked}, where)
        corpus = build_corpus(os.path.join(folder.url, "corpus"), chosen)
        data, tokenizer = (corpus.text_folder,), corpus.tokenizer_folder
        more = {**more, "holdout": corpus.holdout}
    given = {**more, "data": data, "tokenizer": tokenizer, "out": folder.within("blocks").url}
    settings = validated(TokenizeConfig, given, f"{where}: tokenize")
    with progress_lines(f"tokenize {settings.out}") as listener:
        return tokenize(settings, listener).blocks


def table(results: dict[str, Any]) -> Table:
    """A line an arm, the best first; controls in italics."""
    found = results["verdict"]
    shown = Table(title=f"final held-out loss, nats a token, less that of {found['yardstick']}; ± 95 % over the seeds")
    shown.add_column("arm")
    bases = results["comparisons"]
    for name in ("mean", *bases):
        shown.add_column(name, justify="right", no_wrap=True)
    for arm in found["arms"]:
        cells = []
        for base in bases:
            one = arm["bases"][base]
            half = "" if one["half"] is None else f" ±{one['half']:.4f}"
            cells.append(f"{one['difference']:+.4f}{half}")
        shown.add_row(arm["name"], f"{arm['difference']:+.4f}", *cells, style="italic" if arm["control"] else None)
    return shown


def main(
    config: Annotated[str, typer.Option(help="YAML file with the study's settings; flags win.")],
    out: Annotated[str | None, typer.Option(help="Where everything goes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on standard output.")] = False,
) -> None:
    """Make the bases, grow each in every way, train all on the same data, and say what came out."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported: waiting threads sleep
    from lesa_ray.cli_options import print_json, results_apart
    from lesa_ray.report.terminal import console

    with exits("study"), results_apart():
        settings = load_settings(StudyConfig, config, out=out)
        check_kept("out", settings.out)
        check_kept("store", settings.store)
        results = run_study(settings)
    if as_json:
        print_json(results)
    else:
        console.print(table(results))
        for line in results["reading"]:
            console.print(line, highlight=False)
        console.print(f"lesa-ray report {shlex.join(results['comparisons'].values())} --out DIR   # the page")
    for line in results["missing"]:
        print(f"study: {line}; the same command tries again", file=sys.stderr)
    if results["missing"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
