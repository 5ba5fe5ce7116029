"""Seconds by phase, on a device that works on after a call has returned."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from lesa_ray.lesa.clock import Clock


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_a_device_still_does_is_charged_to_the_phase_that_asked(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is done at a certain time in place of a GPU's."""
    done = 0.0

    def synchronize() -> None:
        time.sleep(max(done - time.perf_counter(), 0))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=synchronize))
    clock = Clock(device)
    with clock.phase("gram"):
        done = time.perf_counter() + 0.2
        with clock.phase("load"):
            pass
    assert (clock.seconds["gram"] >= 0.15) == (device == "cuda")
    assert clock.seconds["load"] < 0.15
