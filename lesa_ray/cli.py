"""Grow a pretrained language model deeper, train it on, and see what it costs and what it gives.

Standard output is for results (`--json`), standard error for people. Exit code 0: done; 2: wrong input, one line says
what, nothing is left behind but what was finished; 1: a fault of the machine, the same command goes on; 130:
interrupted, the same command goes on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from lesa_ray.cli_analyze import COMMANDS as ANALYSIS
from lesa_ray.cli_compare import COMMANDS as COMPARISON
from lesa_ray.cli_fleet import COMMANDS
from lesa_ray.cli_keys import LESA_OPTIONS, Command
from lesa_ray.cli_layerwise import COMMANDS as LAYERWISE
from lesa_ray.cli_options import AsJson, ConfigFile, OptionalBase, described, print_json, with_options, working
from lesa_ray.cli_report import COMMANDS as REPORT
from lesa_ray.config import ExpandConfig, load_settings
from lesa_ray.ending import INTERRUPTED, ending
from lesa_ray.errors import UserError, WithReport
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.interrupt import signals_interrupt
from lesa_ray.job_folder import check_kept
from lesa_ray.sizes import size
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.train_settings import FinetuneConfig, TrainConfig

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode=None, help=__doc__
)

_growing = with_options(
    ExpandConfig,
    leave_out=("base", "out"),
    inner={"lesa": LESA_OPTIONS},
)
"""The options of `expand` and `inspect`."""


@app.command(cls=Command)
@_growing
def expand(
    base: OptionalBase = None,
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="A new folder or an fsspec URL.")] = None,
    config: ConfigFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")] = False,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Grow a checkpoint deeper: BASE to OUT."""
    settings = load_settings(ExpandConfig, config, base=base, out=out, **given)
    check_kept("OUT", settings.out)
    from lesa_ray.report import terminal

    if dry_run:
        from lesa_ray.expansion.out import check_out, out_state
        from lesa_ray.expansion.prepare import prepare
        from lesa_ray.expansion.rehearsal import check_function

        check_out(settings.base, settings.out)
        expansion = prepare(settings)
        out_state(expansion)
        check_function(expansion)
        _show(expansion, None, as_json)
        return
    from lesa_ray.distributed.expand import expand as run

    with working("expand", settings.out) as listener:
        result = run(settings, listener=listener)
    if as_json:
        print_json(
            {
                "out": result.out,
                "layers": result.layers,
                "parameters": result.parameters,
                "seconds": round(result.seconds, 3),
                "peak_memory": result.peak_memory,
                "reused": result.reused,
                "resumed": result.resumed,
                "manifest": result.manifest,
            }
        )
        return
    if (table := terminal.fit_table(result.manifest)) is not None:
        terminal.console.print(table)
    how = " (it was there already)" if result.reused else " (an interrupted run was taken up)" if result.resumed else ""
    terminal.console.print(
        f"{result.out}: {result.layers} layers, {terminal.count(result.parameters)} parameters, "
        f"{terminal.duration(result.seconds)}, peak memory of a process {size(result.peak_memory)}{how}",
        highlight=False,
    )


@app.command(cls=Command)
@_growing
def inspect(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A folder, a Hugging Face repo id, or an fsspec URL.")],
    cluster: Annotated[
        str | None, typer.Option(help="YAML file that describes a cluster, to predict for. [default: this machine]")
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Show a checkpoint, the plan, and what it would cost. Options are those of expand."""
    from lesa_ray.expansion.prepare import prepare
    from lesa_ray.expansion.rehearsal import check_layers

    settings = load_settings(ExpandConfig, config, base=base, out="expanded", **given)
    expansion = prepare(settings)
    check_layers(expansion)
    _show(expansion, cluster, as_json)


def _show(expansion: Any, cluster: str | None, as_json: bool) -> None:
    """Print an expansion and what it needs on a cluster, by default on this machine."""
    from lesa_ray.expansion.cluster_spec import read_cluster, this_machine
    from lesa_ray.expansion.estimate import estimate
    from lesa_ray.report import terminal
    from lesa_ray.report.estimate import show_estimate

    need = estimate(expansion, this_machine() if cluster is None else read_cluster(cluster))
    if as_json:
        print_json({**terminal.describe(expansion), "estimate": need.to_dict()})
        return
    terminal.show_expansion(expansion)
    show_estimate(need)


@app.command()
@with_options(TokenizeConfig, leave_out=("data", "tokenizer", "out"))
def tokenize(
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA... TOKENIZER OUT",
            help=f"DATA: {described(TokenizeConfig, 'data', '')} "
            f"TOKENIZER: {described(TokenizeConfig, 'tokenizer', '')} OUT: a new folder or an fsspec URL.",
        ),
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Turn text or conversations into token blocks for training.

    All places but the last two are DATA."""
    if places and len(places) < 3:
        raise UserError("DATA, TOKENIZER and OUT: give all three, or --config FILE")
    *data, tokenizer, out = places or (None, None, None)
    settings = load_settings(
        TokenizeConfig, config, data=data if places else None, tokenizer=tokenizer, out=out, **given
    )
    check_kept("OUT", settings.out)
    from lesa_ray.report import terminal

    with working("tokenize", settings.out) as listener:
        listener.phase("starting", 0)
        from lesa_ray.distributed.tokenize import tokenize as run

        result = run(settings, listener=listener)
    from lesa_ray.report.data import describe_tokens, token_lines

    if as_json:
        print_json(describe_tokens(result))
        return
    terminal.console.print(token_lines(result), highlight=False)


@app.command()
@with_options(TrainConfig, leave_out=("checkpoint",))
def pretrain(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CKPT", help="A folder, a Hugging Face repo id, or an fsspec URL.")
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Train a checkpoint on, or a configuration from scratch. On token blocks: CKPT, --data, --out."""
    settings = load_settings(TrainConfig, config, checkpoint=checkpoint, **given)
    check_kept("--out", settings.out)

    with working("pretrain", settings.out) as listener:
        listener.phase("starting", 0)
        from lesa_ray.distributed.train import pretrain as run

        result = run(settings, listener=listener)
    _print_trained(result, as_json)


@app.command()
@with_options(FinetuneConfig, leave_out=("checkpoint", "architecture", "dtype"))
def finetune(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CKPT", help="A folder, a Hugging Face repo id, or an fsspec URL.")
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Fine-tune a checkpoint on conversations. The loss is on the answers only: CKPT, --data, --out."""
    settings = load_settings(FinetuneConfig, config, checkpoint=checkpoint, **given)
    check_kept("--out", settings.out)

    with working("finetune", settings.out) as listener:
        listener.phase("starting", 0)
        from lesa_ray.distributed.finetune import finetune as run

        result = run(settings, listener=listener)
    _print_trained(result, as_json)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="OUT of a training run: a folder or an fsspec URL.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new folder or an fsspec URL.")],
    checkpoint: Annotated[
        str, typer.Option(help="Which checkpoint of the run: last, best (least held-out loss), or a step.")
    ] = "last",
    base: Annotated[
        str | None, typer.Option(help="Where the checkpoint that was trained lies now, if it was moved.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Where the token blocks lie now, if they were moved.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint of a training run as a Hugging Face folder."""
    check_kept("OUT", out)
    from lesa_ray.distributed.export import export_checkpoint

    with working("export", out) as listener:
        result = export_checkpoint(run, out, checkpoint, base, data, listener)
    if as_json:
        print_json(asdict(result))
        return
    from lesa_ray.report import terminal

    how = " (it was there already)" if result.reused else ""
    terminal.console.print(f"{result.out}: {size(result.nbytes)}{how}", highlight=False)


@app.command()
@with_options(EvaluateConfig, leave_out=("checkpoints",))
def evaluate(
    checkpoints: Annotated[
        list[str] | None, typer.Argument(metavar="CKPT...", help="Folders, Hugging Face repo ids, or fsspec URLs.")
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Measure checkpoints side by side. Perplexity on text or token blocks, tasks of lm-evaluation-harness."""
    settings = load_settings(EvaluateConfig, config, checkpoints=checkpoints, **given)
    check_kept("--out", settings.out)
    from lesa_ray.report import terminal

    with working("evaluate", ", ".join(settings.checkpoints)) as listener:
        listener.phase("starting", 0)  # importing transformers takes seconds
        from lesa_ray.distributed.evaluate import evaluate as run

        refused: WithReport | None = None
        try:
            report = run(settings, listener=listener)
        except WithReport as error:
            report, refused = error.report, error
    if as_json:
        print_json(report)
    else:
        from lesa_ray.report.evaluation import evaluation_table

        terminal.console.print(evaluation_table(report))
    if refused:
        raise refused


@app.command(context_settings={"allow_interspersed_args": False})
def submit(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="-- COMMAND...", help="E.g. python -m pipelines.expand --config FILE")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="URL of the cluster's dashboard. [default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else "
            "http://127.0.0.1:8265]"
        ),
    ] = None,
    cpus: Annotated[float, typer.Option(help="CPUs for the command itself; 0 runs it on the head.")] = 1.0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's name and go.")] = False,
) -> None:
    """Run a command on a Ray cluster as a job. It has this project's code and the files it names."""
    from lesa_ray.distributed.submit import submit as run

    sys.exit(run(command or [], address=address, cpus=cpus, wait=not no_wait))


for command in (*COMMANDS, *COMPARISON, *ANALYSIS, *REPORT, *LAYERWISE):
    app.command(cls=Command)(command)


def _print_trained(result: Any, as_json: bool) -> None:
    if as_json:
        print_json(asdict(result))
        return
    from lesa_ray.report import terminal
    from lesa_ray.report.training import training_lines

    terminal.console.print(training_lines(result), highlight=False)


def main() -> None:
    """Run the command line and exit with its code."""
    _open_streams()
    sys.exit(_run())


def _open_streams() -> None:
    """Give streams that the caller has closed a place that takes all: else the first file that is opened would have
    their number, and what libraries say of faults would be written into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def _run() -> int:
    try:
        _check_names()
        with signals_interrupt():
            code = app(standalone_mode=False)
        if code == INTERRUPTED:  # Typer makes an exit code of an interrupt, and returns it
            raise KeyboardInterrupt
    except typer.Exit as error:
        return error.exit_code
    except (Exception, KeyboardInterrupt) as error:
        end = _misuse(error) or ending(KeyboardInterrupt() if isinstance(error, typer.Abort) else error)
        if end is None:
            raise
        said, code = end
        with contextlib.suppress(OSError):  # of a terminal that has gone
            sys.stderr.write(f"lesa-ray: {said}\n")
        return code
    return 0


def _check_names() -> None:
    """Records, pages and tokenizers' files take text alone; a name that is none would stop them after the work.

    Raises: UserError."""
    try:
        here = os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the current folder was removed; go to one that is there") from error
    for name in (*sys.argv[1:], here):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            said = name.encode(errors="backslashreplace").decode()
            raise UserError(
                f"{said}: is no UTF-8; rename it, or, if it is written in another encoding, set LC_ALL=C.UTF-8"
            ) from error


def _misuse(error: BaseException) -> tuple[str, int] | None:
    """What Typer says of a command line that cannot be read."""
    if not hasattr(error, "format_message"):
        return None
    return f"{' '.join(error.format_message().split())} (see lesa-ray --help)", 2


if __name__ == "__main__":
    main()
