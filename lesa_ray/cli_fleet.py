"""Commands of fleets and of the artifact store; `lesa_ray.cli` puts them on the command line."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer

from lesa_ray.cli_options import AsJson, print_json, results_apart
from lesa_ray.errors import UserError
from lesa_ray.faults import reaching
from lesa_ray.job_folder import check_kept


def fleet(
    places: Annotated[
        list[str] | None, typer.Argument(metavar="[status] FILE", help="The fleet's YAML file; status: show a table.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the stages, and why each is made; no more.")] = False,
    as_json: AsJson = False,
) -> None:
    """Expand, train and measure families of checkpoints. Whatever of FILE is missing, or has changed, is made.

    `fleet status FILE` shows where its stages stand, from the artifact store alone."""
    from lesa_ray.config import load_settings
    from lesa_ray.fleet.settings import FleetConfig, absolute
    from lesa_ray.store.catalog import Store

    *word, file = places or [""]
    if not file or word not in ([], ["status"]):
        raise UserError("FILE: give the fleet's YAML file, as in `lesa-ray fleet FILE` or `lesa-ray fleet status FILE`")
    config = load_settings(FleetConfig, file)
    check_kept("store", config.store)
    config = config.model_copy(update={"store": absolute(config.store)})
    if word:
        _status(config, as_json)
        return
    from lesa_ray.fleet.graph import build

    stages = build(config, f"fleet {file}")
    if dry_run:
        from lesa_ray.fleet.state import look_at_all

        show_standings(look_at_all(Store(config.store, config.lease), stages), as_json)
        return
    from lesa_ray.distributed.fleet import run_fleet
    from lesa_ray.report.fleet import outcome_table
    from lesa_ray.report.terminal import console, log_line

    def say(stage: str, text: str) -> None:
        log_line(f"{config.name} {stage}".strip(), text)

    with results_apart():
        outcomes = run_fleet(config, stages, say)
    if as_json:
        print_json([asdict(one) for one in outcomes])
    else:
        console.print(outcome_table(outcomes), highlight=False)
    if any(one.how in ("failed", "skipped") for one in outcomes):
        sys.exit(1)


def _status(config: Any, as_json: bool) -> None:
    from lesa_ray.fleet.state import status
    from lesa_ray.report.terminal import console
    from lesa_ray.store.catalog import open_store

    with reaching(f"STORE {config.store}"):
        standings, facts = status(open_store(config.store), config)
    show_standings(standings, as_json)
    if not as_json:
        changed = "; the file has changed since, `--dry-run` shows what that means" if facts["file_changed"] else ""
        console.print(f"last started {facts['started'][:19].replace('T', ' ')} UTC{changed}", highlight=False)


def show_standings(standings: Any, as_json: bool) -> None:
    """Print where stages stand."""
    from lesa_ray.report.fleet import describe_standing, standing_table
    from lesa_ray.report.terminal import console

    if as_json:
        print_json([describe_standing(one) for one in standings])
    else:
        console.print(standing_table(standings), highlight=False)


def runs(
    store: Annotated[str, typer.Argument(metavar="STORE", help="An artifact store: a folder or an fsspec URL.")],
    as_json: AsJson = False,
) -> None:
    """List the finished stages of an artifact store."""
    from lesa_ray.store.catalog import open_store

    with reaching(f"STORE {store}"):
        found = open_store(store).finished()
    if as_json:
        print_json([{"place": place, **record} for place, record in found])
        return
    from lesa_ray.report.fleet import record_table
    from lesa_ray.report.terminal import console

    console.print(record_table(found), highlight=False)


def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished stage's folder or URL: STORE/KIND/LABEL-HASH.")],
    as_json: AsJson = False,
) -> None:
    """Compare the files of a finished stage with its record. Every byte is read; exit code 1 if one differs."""
    from lesa_ray.store.catalog import find_run
    from lesa_ray.store.record import compare_files

    place, storage, record = find_run(run)
    wrong = compare_files(storage, record)
    if as_json:
        print_json({"run": place, "files": len(record["files"]), "bytes": record["bytes"], "wrong": wrong})
    else:
        for line in wrong:
            sys.stdout.write(f"{line}\n")
        verdict = f"{len(wrong)} not as recorded" if wrong else "all as recorded"
        sys.stderr.write(f"lesa-ray: {place}: {len(record['files'])} files, {verdict}\n")
    if wrong:
        sys.exit(1)


def gc(
    store: Annotated[str, typer.Argument(metavar="STORE", help="An artifact store: a folder or an fsspec URL.")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove it.")] = False,
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", min=0, help="Only stages that no one has worked on for so many days.")
    ] = 7.0,
    superseded: Annotated[
        bool,
        typer.Option(
            "--superseded",
            help="Finished stages too that no fleet or comparison named when it was last started: of other settings "
            "or data, or an earlier version.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show, or with --yes remove, what was abandoned in a store. Unfinished stages no one works on, uploads never
    completed."""
    from lesa_ray.report.fleet import garbage_table
    from lesa_ray.report.terminal import console
    from lesa_ray.sizes import size
    from lesa_ray.store.catalog import open_store
    from lesa_ray.store.garbage import Garbage, NotRemoved, find_garbage, remove
    from lesa_ray.store.superseded import find_superseded, remove_superseded

    opened = open_store(store)
    abandoned = find_garbage(opened, older_than)
    unneeded = find_superseded(opened, older_than) if superseded else []
    found = [*abandoned, *unneeded]
    holder = f"gc on {socket.gethostname()}, process {os.getpid()}"
    removed: list[Garbage] = []
    stay: list[str] = []
    if yes:
        for one in abandoned:
            try:
                removed += [one] if remove(opened, one, holder) else []
            except NotRemoved as error:
                stay.append(str(error))
        removed += remove_superseded(opened, unneeded, holder, stay.append)
    for line in stay:
        sys.stderr.write(f"lesa-ray: {line}\n")
    if as_json:
        lists = {"abandoned": abandoned, **({"superseded": unneeded} if superseded else {})}
        shown = {name: [asdict(one) for one in ones] for name, ones in lists.items()}
        print_json({**shown, "removed": [one.name for one in removed]})
        sys.exit(1 if stay else 0)
    if found:
        console.print(garbage_table(found), highlight=False)
    total = size(sum(one.nbytes for one in (removed if yes else found)))
    what = "abandoned or superseded" if superseded else "abandoned"
    if not found:
        said = f"nothing was {what} more than {older_than:g} days ago"
    else:
        said = f"{len(removed)} removed, {total}" if yes else f"{len(found)} {what}, {total}; --yes removes them"
    sys.stderr.write(f"lesa-ray: {opened.url}: {said}\n")
    if stay:
        sys.exit(1)


COMMANDS: tuple[Callable[..., None], ...] = (fleet, runs, verify, gc)
