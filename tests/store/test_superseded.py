"""Finished stages that no fleet needs any more are found, and nothing that one needs is."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lesa_ray import UserError
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.store.catalog import Store
from lesa_ray.store.garbage import find_garbage
from lesa_ray.store.identity import Identity
from lesa_ray.store.lease import Lease
from lesa_ray.store.record import RECORD_FILE, describe_files, make_record
from lesa_ray.store.superseded import find_superseded, remove_superseded

STAGE = Identity("expand", {"base": "b"}, {"method": "lesa", "factor": 1.5}, "0.2.0")
OLD = dataclasses.replace(STAGE, code="0.1.0")


def make(
    store: Store, identity: Identity, label: str = "x", started: str = "2026-01-01T00:00:00+00:00", **given: Any
) -> str:
    place = identity.place(label)
    store.folder(place).write("config.json", b"{}")
    record = make_record(
        identity, label, given=given, started=started, seconds=1, metrics={}, files=describe_files(store.folder(place))
    )
    store.finish(place, record)
    return place


def plan(store: Store, name: str, *stages: tuple[str, Identity | None], what: str = "fleet") -> None:
    content = [
        {"kind": "expand", "label": label, "identity": one and one.content, "problem": None} for label, one in stages
    ]
    store.write_plan(what, name, {what: name, "stages": content})


def names(store: Store, days: float = 7.0) -> set[str]:
    return {one.name for one in find_superseded(store, days)}


@pytest.mark.timeout(180)
def test_what_no_plan_names_is_superseded(place: str) -> None:
    store = Store(place, term=30)
    now, old = make(store, STAGE), make(store, OLD)
    plan(store, "weekly", ("y", STAGE))  # under another label it is the same
    [found] = find_superseded(store)
    assert (found.kind, found.name, found.nbytes, found.detail) == ("finished", old, 2, "made 2026-01-01 00:00")
    assert remove_superseded(store, [found], "gc", pytest.fail) == [found]
    assert remove_superseded(store, [found], "gc", pytest.fail) == []
    assert store.folder(old).is_empty()
    assert store.record(now) is not None
    assert names(store) == set()
    assert store.unfinished() == []


def test_all_fleets_and_comparisons_of_a_store_count(tmp_path: Any) -> None:
    store = Store(str(tmp_path))
    make(store, STAGE)
    other, left = make(store, OLD, "y"), make(store, dataclasses.replace(OLD, code="0.0.1"), "y")
    plan(store, "weekly", ("x", STAGE))
    assert names(store) == {other, left}
    plan(store, "once", ("y", OLD), what="comparison")
    assert names(store) == {left}


def test_a_label_whose_inputs_could_not_be_read_keeps_its_stages(tmp_path: Any) -> None:
    """A hub that is away for a day costs no results."""
    store = Store(str(tmp_path))
    make(store, OLD, "x")
    other = make(store, dataclasses.replace(OLD, inputs={"base": "c"}), "y")
    plan(store, "weekly", ("x", None))
    assert names(store) == {other}


def test_what_a_needed_stage_was_made_from_is_needed(tmp_path: Any) -> None:
    """A fleet's checkpoint may be what another fleet has made, by its place."""
    store = Store(str(tmp_path))
    first = make(store, OLD, "a")
    second = make(store, dataclasses.replace(OLD, inputs={"base": "1"}), "b", base=f"{store.url}/{first}")
    third = dataclasses.replace(STAGE, inputs={"base": "2"})
    make(store, third, "c", checkpoints=[f"{store.url}/{second}"])
    left = make(store, OLD, "d" * 20)
    plan(store, "weekly", ("c", third))
    assert names(store) == {left}


def test_young_ones_stay(tmp_path: Any) -> None:
    store = Store(str(tmp_path))
    old = make(store, OLD, started=(datetime.now(UTC) - timedelta(hours=1)).isoformat())
    plan(store, "weekly", ("x", STAGE))
    assert names(store) == set()
    assert names(store, days=0) == {old}


def test_a_stage_that_ran_for_long_is_as_young_as_its_end(tmp_path: Any) -> None:
    store, days = Store(str(tmp_path)), 10
    place, started = OLD.place("x"), datetime.now(UTC) - timedelta(days=days)
    store.folder(place).write("config.json", b"{}")
    files = describe_files(store.folder(place))
    record = make_record(
        OLD, "x", given={}, started=started.isoformat(), seconds=(days - 1) * 86400, metrics={}, files=files
    )
    store.finish(place, record)
    plan(store, "weekly", ("x", STAGE))
    assert names(store) == set()
    assert names(store, days=0.5) == {place}


def test_what_a_fleet_needs_that_starts_meanwhile_is_not_removed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours may go by while a store is cleared."""
    store = Store(str(tmp_path), term=30)
    first, second = make(store, OLD), make(store, dataclasses.replace(OLD, code="0.0.1"))
    plan(store, "weekly", ("x", STAGE))
    found = find_superseded(store)
    assert {one.name for one in found} == {first, second}
    release = Lease.release

    def released(self: Lease) -> None:
        release(self)
        plan(store, "once", *(("x", Identity.from_content(record["identity"])) for _, record in store.finished()))

    monkeypatch.setattr(Lease, "release", released)
    removed = remove_superseded(store, found, "gc", pytest.fail)
    assert removed == found[:1]
    assert store.record(found[1].name) is not None


def test_what_a_fleet_plans_while_its_lease_is_taken_is_not_removed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path), term=30)
    old = make(store, OLD)
    plan(store, "weekly", ("x", STAGE))
    [found] = find_superseded(store)
    take = Store.lease

    def taken(self: Store, identity: Identity, holder: str) -> Lease | None:
        lease = take(self, identity, holder)
        plan(store, "once", ("x", OLD))
        return lease

    monkeypatch.setattr(Store, "lease", taken)
    assert remove_superseded(store, [found], "gc", pytest.fail) == []
    assert store.record(old) is not None
    monkeypatch.undo()
    assert store.lease(OLD, "a fleet") is not None


def test_what_a_fleet_has_found_finished_just_now_comes_back(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It plans and looks between the last look at what is planned and the removal."""
    store = Store(str(tmp_path), term=30)
    base = make(store, OLD)
    second = dataclasses.replace(OLD, inputs={"base": "1"})
    made = make(store, second, "b", base=f"{store.url}/{base}")
    plan(store, "weekly", ("x", STAGE))
    found = sorted(find_superseded(store), key=lambda one: one.name != base)
    before = {one.name: store.folder(one.name).read(RECORD_FILE) for one in found}
    begin, left = Store.begin, list[str]()

    def begun(self: Store, place: str, *given: Any) -> None:
        begin(self, place, *given)
        plan(store, "once", ("b", second))
        left.append(place)

    monkeypatch.setattr(Store, "begin", begun)
    assert remove_superseded(store, found, "gc", pytest.fail) == []
    assert left == [base]
    assert {place: store.folder(place).read(RECORD_FILE) for place in (base, made)} == before
    assert store.unfinished() == []
    assert store.begun(base) is None


def test_two_who_clear_a_store_do_not_bring_back_what_the_other_removed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path), term=30)
    old = make(store, OLD)
    plan(store, "weekly", ("x", STAGE))
    [found] = find_superseded(store)
    take = Store.lease

    def taken(self: Store, identity: Identity, holder: str) -> Lease | None:
        monkeypatch.undo()
        assert remove_superseded(store, [found], "another gc", pytest.fail) == [found]
        return take(self, identity, holder)

    monkeypatch.setattr(Store, "lease", taken)
    assert remove_superseded(store, [found], "gc", pytest.fail) == []
    assert store.folder(old).is_empty()
    assert store.begun(old) is None


def test_what_is_needed_again_or_in_use_is_not_removed(tmp_path: Any) -> None:
    store = Store(str(tmp_path), term=30)
    old = make(store, OLD)
    plan(store, "weekly", ("x", STAGE))
    [found] = find_superseded(store)
    lease = store.lease(OLD, "a fleet")
    assert lease is not None
    assert remove_superseded(store, [found], "gc", pytest.fail) == []
    lease.release()
    plan(store, "weekly", ("x", OLD))
    assert remove_superseded(store, [found], "gc", pytest.fail) == []
    assert store.record(old) is not None


def test_who_begins_a_stage_as_soon_as_it_is_removed_keeps_the_lease(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path), term=30)
    make(store, OLD)
    plan(store, "weekly", ("x", STAGE))
    [found] = find_superseded(store)
    release, taken = Lease.release, list[Lease | None]()

    def released(self: Lease) -> None:
        release(self)
        if not taken:
            taken.append(store.lease(OLD, "a fleet"))

    monkeypatch.setattr(Lease, "release", released)
    assert remove_superseded(store, [found], "gc", pytest.fail) == [found]
    [lease] = taken
    assert lease is not None
    assert lease.renew()
    lease.release()


def test_an_interrupted_removal_leaves_no_half_a_stage(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path), term=30)
    old = make(store, OLD)
    plan(store, "weekly", ("x", STAGE))
    [found] = find_superseded(store)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_superseded(store, [found], "gc", pytest.fail)
    assert not store.folder(old).exists(RECORD_FILE)
    [rest] = find_garbage(store, days=0)
    assert (rest.kind, rest.name) == ("stage", old)


def test_where_it_is_not_known_what_is_needed_nothing_is_found(tmp_path: Any) -> None:
    store = Store(str(tmp_path))
    make(store, STAGE)
    with pytest.raises(UserError, match=r"no fleet or comparison was started on it"):
        find_superseded(store)
    plan(store, "weekly", ("x", STAGE))
    for content in (b"{", json.dumps({"stages": [{"kind": "expand"}]}).encode(), b"[]"):
        store.control.write("fleets/other.json", content)
        with pytest.raises(UserError, match=r"fleets/other\.json is damaged"):
            find_superseded(store)
