"""How a job that is no command of `lesa-ray` ends: one line and the exit code for what stopped it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from lesa_ray import MachineError, UserError
from lesa_ray.checkpoint.storage import explain
from lesa_ray.interrupt import sigterm_interrupts


@contextmanager
def exits(name: str) -> Iterator[None]:
    """Around a job's work: 2 for wrong input, 1 for a fault of the machine, 130 for an interruption (`typer.Exit`)."""
    try:
        with sigterm_interrupts():
            yield
    except (UserError, MachineError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
    except OSError as error:
        print(f"{name}: {explain(error)}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
