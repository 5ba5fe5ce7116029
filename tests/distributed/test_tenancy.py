"""Who may work at an OUT: what is refused after days of work is the machine's fault, and the same command goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from lesa_ray import MachineError
from lesa_ray.distributed.tenancy import tenancy
from lesa_ray.expansion.runner import Silent
from lesa_ray.store.lease import Lease


@pytest.mark.timeout(60)
def test_a_place_that_refuses_later_is_no_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Lease) -> bool:
        raise PermissionError("The provided token has expired")

    with tenancy(str(tmp_path), "lease", Silent()) as tenant:
        tenant.confirm()
        monkeypatch.setattr(Lease, "held", property(lambda _: False))
        monkeypatch.setattr(Lease, "renew", refuse)
        with pytest.raises(MachineError, match=rf"^OUT {tmp_path}: cannot be written .*the same command then goes on"):
            tenant.confirm()
