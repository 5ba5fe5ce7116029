"""The command that makes the page of a study; `lesa_ray.cli` puts it on the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer

from lesa_ray.cli_options import AsJson, print_json
from lesa_ray.job_folder import check_kept


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Folders or URLs of comparisons, analyses, expanded checkpoints, training runs."
        ),
    ],
    out: Annotated[str, typer.Option(help="Where report.html and figures/*.png go: a folder or an fsspec URL.")],
    as_json: AsJson = False,
) -> None:
    """Make one HTML page, and images, of what was measured. RUN... is any mix of what the page can show.

    It takes `pip install 'lesa-ray[report]'`."""
    check_kept("--out", out)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it cannot keep its fonts in a home folder
    from lesa_ray.report.page.build import write_report

    written = write_report(runs, out)
    if as_json:
        print_json(asdict(written))
        return
    from lesa_ray.report.terminal import console
    from lesa_ray.sizes import size

    count = len(written.missing)
    lacking = f"; {count} {'piece is' if count == 1 else 'pieces are'} missing, the page says which" if count else ""
    console.print(
        f"{written.page}: {len(written.figures)} figures, {size(written.nbytes)}{lacking}",
        highlight=False,
        soft_wrap=True,
    )


COMMANDS: tuple[Callable[..., None], ...] = (report,)
