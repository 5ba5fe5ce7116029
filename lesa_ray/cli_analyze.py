"""The command that looks at a checkpoint's weights; `lesa_ray.cli` puts it on the command line."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.cli_options import AsJson, ConfigFile, OptionalBase, print_json, with_options, working
from lesa_ray.config import load_settings
from lesa_ray.errors import NotWritten
from lesa_ray.job_folder import check_kept


@with_options(AnalyzeConfig, leave_out=("base", "lesa"))
def analyze(
    base: OptionalBase = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Show what a checkpoint's weights look like. With --data also what its layers do; nothing is trained."""
    settings = load_settings(AnalyzeConfig, config, base=base, **given)
    check_kept("--out", settings.out)
    begin = time.monotonic()
    with working("analyze", settings.out or settings.base) as listener:
        listener.phase("starting", 0)  # importing torch takes seconds
        from lesa_ray.distributed.analyze import FILE
        from lesa_ray.distributed.analyze import analyze as run

        refused: NotWritten | None = None
        try:
            report = run(settings, listener=listener)
        except NotWritten as error:
            report, refused = error.report, error
    if as_json:
        print_json(report)
        if refused:
            raise refused
        return
    from lesa_ray.report import terminal
    from lesa_ray.report.analysis import analysis_table

    terminal.console.print(analysis_table(report), highlight=False)
    if refused:
        raise refused
    where = "" if settings.out is None else f"{settings.out.rstrip('/')}/{FILE}, "
    terminal.console.print(f"{where}{terminal.duration(time.monotonic() - begin)}", highlight=False)


COMMANDS: tuple[Callable[..., None], ...] = (analyze,)
