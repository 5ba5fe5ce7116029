"""How a command or a job ends when something stops it: one line, and an exit code that says whether it is worth another
try.

2: wrong input, nothing is left behind but what was finished. 1: a fault of the machine, the same command goes on. 130:
interrupted, likewise.
"""

from __future__ import annotations

from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import explain, is_fault
from lesa_ray.printable import printable

INTERRUPTED = 130


def ending(error: BaseException) -> tuple[str, int] | None:
    """What to say of an error and the exit code for it; None for one that is a defect of the program."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from here", INTERRUPTED
    if isinstance(error, UserError | MachineError):
        return _line(str(error)), 2 if isinstance(error, UserError) else 1
    return (_line(explain(error)), 1) if is_fault(error) else None


def _line(text: str) -> str:
    return printable(" ".join(text.split()))
