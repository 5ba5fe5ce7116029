"""Two ways a command can fail, and what each promises.

`UserError`: the input is wrong. One line says what, where and what to do; exit code 2; nothing is left behind (but a
`KeptError` leaves what was finished).
`MachineError`: the machine failed (disk full, storage unreachable, a worker lost for good). One line; exit code 1;
what was finished stays, and the same command goes on from there.

Messages get into logs, records and dashboards: what a URL holds of secrets is not in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lesa_ray.places import shown


class _Told(Exception):
    def __init__(self, *words: object) -> None:
        super().__init__(*(shown(word) if isinstance(word, str) else word for word in words))


class UserError(_Told, ValueError):
    """Wrong input: exit code 2, nothing written."""


class KeptError(UserError):
    """Wrong input, found when a part of the work was finished. That stays, and with the rest mended the same command
    goes on from there."""


class RoomError(UserError):
    """Less room was stated than the work needs. What is finished is as good with more room, and stays."""


class UnsharedError(UserError):
    """A folder, or this program, that not all machines have which are to work. What is finished stays."""


class MachineError(_Told, RuntimeError):
    """A fault of the machine: exit code 1, the same command resumes."""


class FullError(MachineError):
    """A GPU's memory is full. What tried it would most likely find it so again: it is not tried again by itself."""


class WithReport(Exception):
    """Figures were made before something failed: `report`, so that they are not lost."""

    def __init__(self, message: str, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = dict(report or {})


class NotWritten(WithReport, MachineError):
    """The figures could not be written."""


class SomeWrong(WithReport, UserError):
    """Of several things that were to be measured one cannot be; the others were, and their figures are written."""


class SomeFailed(WithReport, MachineError):
    """The same where the machine failed for one of them."""


def first_line(error: BaseException) -> str:
    """What a library says is wrong, cut to a line of ours; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
