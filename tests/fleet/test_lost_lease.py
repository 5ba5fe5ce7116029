"""A fleet whose lease another process took stops the stage's work, and goes on when it may."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from lesa_ray.distributed.fleet import run_fleet
from lesa_ray.fleet.graph import build
from lesa_ray.fleet.settings import FleetConfig
from lesa_ray.store import lease as store_lease
from lesa_ray.store.catalog import Store, lease_name


@pytest.mark.timeout(450)
@pytest.mark.usefixtures("local_ray")
def test_a_stage_whose_lease_is_lost_is_stopped_and_taken_up_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_lease, "_RENEWALS", 12)  # each second
    config = FleetConfig.model_validate(
        {
            "name": "f", "store": str(tmp_path / "store"), "lease": 12,
            "families": [{"name": "llama", "checkpoint": str(models / "llama")}],
            "stages": {"expand": {"lesa": {"epochs": 400}}},  # seconds: long enough to miss the lease
        }
    )  # fmt: skip
    (stage,) = build(config, "file")
    assert stage.identity is not None
    store = Store(config.store)
    out = Path(store.folder(stage.identity.place(stage.label)).root)
    lease = tmp_path / "store" / ".lesa-ray" / "leases" / f"{lease_name('expand', stage.identity.digest)}.json"
    said: list[str] = []
    seen: list[dict[str, bytes]] = []

    def files() -> dict[str, bytes]:
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def say(_: str, text: str) -> None:
        if "making" in text and not any("making" in one for one in said):
            thief = {"holder": "a thief", "owner": "t", "term": 5, "released": False, "nonce": "n"}
            with (lease.parent / ".lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # as who takes it over does: a renewal may be under way
                lease.write_text(json.dumps(thief))
        if text.startswith(("under way, a thief", "begins: was interrupted")):
            seen.append(files())
        said.append(text)

    (outcome,) = run_fleet(config, [stage], say)
    assert outcome.how == "made", said
    story = ["begins: new", "is no longer this fleet's", "under way, a thief", "begins: was interrupted, goes on"]
    places = [next(i for i, one in enumerate(said) if one.startswith(text)) for text in story]
    assert places == sorted(places)
    assert "under way, a thief; waits, 12 s at most if that has died" in said
    during, after = seen
    assert during == after  # nothing was written meanwhile
    assert ".lesa-ray/run.json" in during
    assert "config.json" not in during
    assert store.record(outcome.place) is not None
    assert not lease.exists()  # nobody will want it any more
