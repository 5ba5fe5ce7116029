"""`lesa-ray compare`; `lesa_ray.cli` puts it on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lesa_ray.cli_fleet import show_standings
from lesa_ray.cli_options import AsJson, print_json, results_apart
from lesa_ray.errors import UserError
from lesa_ray.job_folder import check_kept


def compare(
    places: Annotated[
        list[str] | None,
        typer.Argument(metavar="[status] FILE", help="The comparison's YAML file; status: show what there is so far."),
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="FILE, as other commands take it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the stages, and why each is made; no more.")] = False,
    as_json: AsJson = False,
) -> None:
    """Grow one base in several ways, train all, and compare. Whatever of FILE is missing is made, on the same data for
    all.

    The result is comparison.json in the artifact store, beside a table here."""
    from lesa_ray.config import load_settings

    *words, file = [*(places or []), *([config] if config else [])] or [""]
    if not file or words not in ([], ["status"]):
        raise UserError("FILE: give the comparison's YAML file, as in `lesa-ray compare FILE`")
    from lesa_ray.comparison.settings import ComparisonConfig
    from lesa_ray.fleet.settings import absolute

    settings = load_settings(ComparisonConfig, file)
    check_kept("store", settings.store)
    settings = settings.model_copy(update={"store": absolute(settings.store)})
    from lesa_ray.comparison.graph import build
    from lesa_ray.report.terminal import console, log_line

    comparison = build(settings, file)
    if words or dry_run:
        from lesa_ray.store.catalog import Store

        store = Store(settings.store, settings.lease)
    if dry_run:
        from lesa_ray.fleet.state import look_at_all

        for note in (*comparison.notes, *comparison.remarks):
            console.print(note, highlight=False)
        show_standings(look_at_all(store, comparison.stages), as_json)
        return
    if words:
        from lesa_ray.comparison.collect import Collector
        from lesa_ray.faults import reaching

        with reaching(f"store {settings.store}", "cannot be listed"):
            store.storage.folders()
        _show(Collector(comparison, store).collect(), as_json)
        return
    from lesa_ray.distributed.compare import run_comparison

    def say(stage: str, text: str) -> None:
        log_line(f"{settings.name} {stage}".strip(), text)

    with results_apart():
        content, outcomes = run_comparison(comparison, say)
    _show(content, as_json)
    if any(one.how in ("failed", "skipped") for one in outcomes):
        sys.exit(1)


def _show(content: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(content)
        return
    from lesa_ray.report.comparison import comparison_table, reading
    from lesa_ray.report.terminal import console

    console.print(comparison_table(content), highlight=False)
    for line in reading(content):
        console.print(line, highlight=False)


COMMANDS: tuple[Callable[..., None], ...] = (compare,)
