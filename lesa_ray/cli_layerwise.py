"""The command that makes a layer-wise scaled configuration; `lesa_ray.cli` puts it on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from lesa_ray.cli_options import AsJson, ConfigFile, print_json, with_options
from lesa_ray.job_folder import check_kept
from lesa_ray.layerwise.settings import LayerwiseConfig


@with_options(LayerwiseConfig, leave_out=("out",))
def layerwise(
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="A new folder or an fsspec URL.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Make a configuration whose layers differ in width. The model is then pre-trained from scratch."""
    from lesa_ray.config import load_settings
    from lesa_ray.layerwise.folder import write_folder
    from lesa_ray.layerwise.settings import architecture, sizes_of

    settings = load_settings(LayerwiseConfig, config, out=out, **given)
    check_kept("OUT", settings.out)
    solved = sizes_of(settings)
    reused = write_folder(settings.out, architecture(settings))
    from lesa_ray.layerwise.table import describe, layer_table, total_line

    if as_json:
        print_json({"out": settings.out, "reused": reused, **describe(solved, settings.params)})
        return
    from lesa_ray.report.terminal import console

    console.print(layer_table(solved.sizes))
    console.print(total_line(solved, settings.params), highlight=False, soft_wrap=True)
    place = settings.out.rstrip("/")
    console.print(
        f"{place}{' (it was there already)' if reused else ''}: lesa-ray pretrain --architecture {place}/config.json",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


COMMANDS: tuple[Callable[..., None], ...] = (layerwise,)
