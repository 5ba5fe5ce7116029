"""How a job that is no command of `lesa-ray` ends: as those do, with one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from lesa_ray.ending import ending
from lesa_ray.interrupt import signals_interrupt


@contextmanager
def exits(name: str) -> Iterator[None]:
    """Around a job's work: what stops it becomes one line and `typer.Exit` (`lesa_ray.ending`); a defect passes."""
    try:
        with signals_interrupt():
            yield
    except (Exception, KeyboardInterrupt) as error:
        if (end := ending(error)) is None:
            raise
        said, code = end
        print(f"{name}: {said}", file=sys.stderr)
        raise typer.Exit(code) from None
