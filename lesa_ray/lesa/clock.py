"""Where the time of a unit goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Wall-clock seconds by phase. A phase inside another counts for itself alone.

    A GPU works on after a call has returned: a phase there ends when the device has done what the phase asked for on
    this thread's stream. Other threads' streams, which read ahead, are not waited for."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device if device.startswith("cuda") else None
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        """Count the time since the last change for the innermost phase."""
        if self._device is not None and self._open:
            import torch

            torch.cuda.current_stream(self._device).synchronize()
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
