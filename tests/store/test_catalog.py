"""A store finds what was made by what made it, says why something has to be made, and knows what was abandoned."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lesa_ray import MachineError, UserError, cli
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.fleet.state import look
from lesa_ray.store import catalog, garbage
from lesa_ray.store.catalog import Store, find_run, open_store
from lesa_ray.store.garbage import find_garbage, remove
from lesa_ray.store.identity import Identity
from lesa_ray.store.record import RECORD_FILE, describe_files, make_record, walk

STAGE = Identity("expand", {"base": "b"}, {"method": "lesa", "factor": 1.5}, "0.1.0")


def begin(store: Store, identity: Identity, label: str, files: dict[str, bytes]) -> str:
    place = identity.place(label)
    store.begin(place, identity, "me")
    for name, data in files.items():
        store.folder(place).write(name, data)
    return place


def make(store: Store, identity: Identity, label: str = "x", started: str = "2026-01-01") -> str:
    place = begin(store, identity, label, {"config.json": b"{}"})
    record = make_record(
        identity, label, given={}, started=started, seconds=1, metrics={"layers": 8},
        files=describe_files(store.folder(place)),
    )  # fmt: skip
    store.finish(place, record)
    return place


@pytest.mark.timeout(180)
def test_what_was_made_is_found_by_what_made_it(place: str) -> None:
    store = Store(place)
    assert store.locate(STAGE, "x") == (STAGE.place("x"), None)
    assert store.why(STAGE, "x") == "new"
    begin(store, STAGE, "x", {"half": b"1"})
    assert store.locate(STAGE, "x") == (STAGE.place("x"), None)
    assert store.why(STAGE, "x") == "was interrupted, goes on"
    assert [one.place for one in store.unfinished()] == [STAGE.place("x")]
    made = make(store, STAGE)
    for label in ("x", "another"):
        found, record = Store(place).locate(STAGE, label)
        assert (found, record is not None) == (made, True)
    assert store.unfinished() == []
    assert [(found, record["metrics"]) for found, record in store.finished()] == [(made, {"layers": 8})]
    assert not store.control.within("begun/expand").list()
    assert find_run(f"{place}/{made}")[0] == made


def test_why_compares_with_the_latest_of_the_same_label(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    changed = dataclasses.replace(STAGE, settings={"method": "lesa", "factor": 2.0})
    later = dataclasses.replace(STAGE, code="0.2.0")
    make(store, STAGE, started="2026-01-02")
    assert store.why(changed, "x") == "settings changed: expand.factor (1.5 → 2.0)"
    make(store, later, started="2026-01-03")
    assert store.why(changed, "x") == "code version changed: 0.2.0 → 0.1.0"
    assert store.why(changed, "y") == "new"
    assert store.why(dataclasses.replace(STAGE, kind="pretrain"), "x") == "new"


@pytest.mark.parametrize("content", [b'{"format": 2}', b'{"format": 1, "label": "x", "digest": "'])
def test_a_record_that_cannot_be_read_is_no_earlier_one(content: bytes, tmp_path: Path) -> None:
    """As a later version, or a file system after a power failure, may leave it."""
    store = Store(str(tmp_path))
    begin(store, STAGE, "x", {RECORD_FILE: content})
    changed = dataclasses.replace(STAGE, code="0.2.0")
    assert store.why(changed, "x") == "new"
    assert store.locate(changed, "x") == (changed.place("x"), None)
    assert store.locate(STAGE, "y") == (STAGE.place("y"), None)
    with pytest.raises(UserError, match=r"stage.json: is"):
        store.locate(STAGE, "x")
    assert find_garbage(store, days=0) == []  # whatever it is, it was finished


def test_a_look_at_a_stage_reads_nothing_of_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fleet looks at every stage that waits, all the time; why it is made is asked once."""
    store, read = Store(str(tmp_path)), []
    for number in range(5):
        make(store, dataclasses.replace(STAGE, code=str(number)))
    monkeypatch.setattr(catalog, "read_record", lambda storage: read.append(storage.url))
    assert look(store, STAGE, "x").state == "waiting"
    assert read == [store.folder(STAGE.place("x")).url]


def test_a_record_that_was_copied_in_makes_nothing_finished(tmp_path: Path) -> None:
    """As the folder of a checkpoint may hold that of another store."""
    store = Store(str(tmp_path))
    made = make(store, STAGE)
    changed = dataclasses.replace(STAGE, code="2")
    begin(store, changed, "x", {RECORD_FILE: store.folder(made).read(RECORD_FILE)})
    assert store.locate(changed, "x")[1] is None
    make(store, changed)
    assert store.locate(changed, "x")[1] is not None


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_no_place_outside_the_store_is_opened(place: str) -> None:
    store = Store(place)
    for wrong in ("../x-0123456789ab", "expand/../../x-0123456789ab", "/etc/x-0123456789ab", "expand/x"):
        with pytest.raises(UserError, match="is not a stage's place"):
            store.record(wrong)
    with pytest.raises(UserError, match="is not an artifact store"):
        open_store(place)
    os.makedirs(f"{place}/expand")
    open_store(place)


@pytest.mark.timeout(180)
def test_the_lease_of_a_finished_stage_leaves_no_file(place: str) -> None:
    store = Store(place, term=30)
    lease = store.lease(STAGE, "me")
    assert lease is not None
    make(store, STAGE)
    store.settle(lease)
    assert store.worker(STAGE) is None
    assert not [name for name in walk(store.control.within("leases")) if name != ".lock"]


def test_what_was_finished_is_no_garbage_though_it_is_noted_as_begun(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    begin(store, STAGE, "x", {"half": b"1"})
    (found,) = find_garbage(store, days=0)
    made = make(store, STAGE)
    store.begin(made, STAGE, "me")  # as a kill leaves it between the record and the note
    assert store.unfinished() == []
    assert not remove(store, found, "gc")
    assert store.record(made) is not None


def test_what_could_not_be_finished_stays_noted_as_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what is left of it is nobody's."""
    store = Store(str(tmp_path))
    place = begin(store, STAGE, "x", {"config.json": b"{}"})
    files = describe_files(store.folder(place))
    record = make_record(STAGE, "x", given={}, started="2026-01-01", seconds=1, metrics={}, files=files)

    def away(*_: object) -> None:
        raise MachineError("the store does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", away)
        with pytest.raises(MachineError):
            store.finish(place, record)
    assert [one.place for one in store.unfinished()] == [place]
    store.finish(place, record)
    assert store.unfinished() == []


@pytest.mark.timeout(270)
def test_garbage_is_what_no_one_works_on(place: str) -> None:
    store = Store(place, term=30)
    made = make(store, STAGE)
    left, held = (dataclasses.replace(STAGE, code=code) for code in ("left", "held"))
    begin(store, left, "x", {"a/b": bytes(1000), "c": bytes(500)})
    begin(store, held, "x", {"d": bytes(10)})
    lease = store.lease(held, "me")
    assert lease is not None
    Storage(f"{place}/expand/by-hand").write("mine", b"1")
    assert find_garbage(store) == []  # the fleet that let go of it may go on
    found = find_garbage(store, days=0)
    assert [(one.kind, one.name, one.nbytes) for one in found] == [("stage", left.place("x"), 1500)]
    assert remove(store, found[0], "gc")
    assert not remove(store, found[0], "gc")
    assert find_garbage(store, days=0) == []
    assert store.folder(left.place("x")).is_empty()
    assert not store.folder(held.place("x")).is_empty()
    assert store.record(made) is not None
    assert Storage(f"{place}/expand/by-hand").read("mine") == b"1"
    lease.release()
    taken = find_garbage(store, days=0)
    assert [one.name for one in taken] == [held.place("x")]
    lease = store.lease(held, "a fleet that goes on with it")
    assert not remove(store, taken[0], "gc")
    assert not store.folder(held.place("x")).is_empty()
    assert lease is not None
    lease.release()


@pytest.mark.timeout(180)
def test_a_stage_is_as_old_as_the_last_that_was_done_with_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was begun ten days ago, and trained until now."""
    store = Store(place)
    with monkeypatch.context() as earlier:
        before = (datetime.now(UTC) - timedelta(days=10)).isoformat()
        earlier.setattr(catalog, "utc_now", lambda: before)
        trained, empty = (begin(store, dataclasses.replace(STAGE, code=code), "x", {}) for code in ("trained", "empty"))
    store.folder(trained).write("training/checkpoints/step-1", bytes(10))
    assert [one.name for one in find_garbage(store)] == [empty]
    assert [one.name for one in find_garbage(store, days=11)] == []
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 8 * 86400)
    assert {one.name for one in find_garbage(store)} == {empty, trained}


def test_a_stage_is_as_old_as_the_newest_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first checkpoint lies there for as long as it is trained."""
    store, before = Store(str(tmp_path)), datetime.now(UTC) - timedelta(days=10)
    monkeypatch.setattr(catalog, "utc_now", before.isoformat)
    trained = begin(store, STAGE, "x", {f"training/checkpoints/step-{number}": b"1" for number in range(3)})
    files = [tmp_path / trained / f"training/checkpoints/step-{number}" for number in range(3)]
    for file in (files[0], files[2]):
        os.utime(file, (before.timestamp(), before.timestamp()))
    assert find_garbage(store) == []
    os.utime(files[1], (before.timestamp(), before.timestamp()))
    assert [one.name for one in find_garbage(store)] == [trained]


@pytest.mark.timeout(180)
def test_uploads_that_were_never_completed(conditional: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(conditional, term=30)
    fs = store.storage.fs
    held = dataclasses.replace(STAGE, code="held")
    make(store, STAGE)
    keys = [f"{STAGE.place('x')}/model.bin", f"{held.place('x')}/model.bin", "something/else"]
    for key in keys:
        bucket, full, _ = fs.split_path(store.storage.path(key))
        upload = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=full)
        part = {"Bucket": bucket, "Key": full, "UploadId": upload["UploadId"], "PartNumber": 1}
        fs.call_s3("upload_part", **part, Body=bytes(1000))
    lease = store.lease(held, "me")
    assert [one.name for one in find_garbage(store)] == [keys[0], keys[2]]  # moto says that all began in 2010
    monkeypatch.setattr(garbage, "_UPLOAD_AGE_SECONDS", 1e10)
    found = find_garbage(store)  # the third is some other program's
    assert [(one.kind, one.name, one.nbytes) for one in found] == [("upload", keys[0], 1000)]
    assert remove(store, found[0], "gc")
    assert find_garbage(store) == []
    assert lease is not None
    lease.release()
    assert [one.name for one in find_garbage(store)] == [keys[1]]


@pytest.mark.timeout(180)
def test_uploads_are_found_whatever_a_page_of_them_holds(conditional: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server lists a thousand at a time, and as many parts of one. Moto lists all uploads at once, so the pages of
    these are made here."""
    store = Store(conditional)
    fs = store.storage.fs
    keys = [f"{STAGE.place('x')}/a", f"{STAGE.place('x')}/b", "something/else"]
    for key in keys:
        bucket, full, _ = fs.split_path(store.storage.path(key))
        upload = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=full)
        for number in (1, 2, 3):
            part = {"Bucket": bucket, "Key": full, "UploadId": upload["UploadId"], "PartNumber": number}
            fs.call_s3("upload_part", **part, Body=bytes(5 * 2**20 if number < 3 else 7))
    real = type(fs).call_s3

    def paged(self: object, method: str, **given: Any) -> Any:
        if method == "list_parts":
            return real(fs, method, **given, MaxParts=1)
        if method != "list_multipart_uploads":
            return real(fs, method, **given)
        after = (given.pop("KeyMarker", ""), given.pop("UploadIdMarker", ""))
        page = real(fs, method, **given)
        rest = sorted((one for one in page["Uploads"] if (one["Key"], one["UploadId"]) > after), key=lambda u: u["Key"])
        last = {"NextKeyMarker": rest[0]["Key"], "NextUploadIdMarker": rest[0]["UploadId"]}
        return {**page, "Uploads": rest[:1], "IsTruncated": len(rest) > 1, **last}

    monkeypatch.setattr(type(fs), "call_s3", paged)
    found = find_garbage(store)
    assert [(one.name, one.nbytes) for one in found] == [(key, 10 * 2**20 + 7) for key in keys]
    assert all(remove(store, one, "gc") for one in found)


@pytest.mark.timeout(180)
def test_stores_and_what_a_fleet_is_need_neither_ray_nor_torch() -> None:
    """So that `runs`, `fleet status` and the like work anywhere, at once."""
    script = (
        "import sys, lesa_ray.cli_fleet, lesa_ray.fleet.graph, lesa_ray.fleet.state, lesa_ray.report.fleet,"
        " lesa_ray.store.garbage; print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `lesa-ray` in this process: its exit code, standard output and standard error."""

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lesa-ray", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        return int(str(end.value.code)), shown.out, shown.err

    return command


@pytest.mark.timeout(180)
def test_the_commands_and_their_exit_codes(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    store = Store(str(tmp_path / "store"))
    made = make(store, STAGE)
    left = begin(store, dataclasses.replace(STAGE, code="left"), "x", {"c": bytes(500)})
    code, out, _ = run("runs", store.url, "--json")
    assert (code, [one["place"] for one in json.loads(out)]) == (0, [made])
    assert run("verify", f"{store.url}/{made}")[0] == 0
    store.folder(made).write("config.json", b"[]")
    code, out, _ = run("verify", f"{store.url}/{made}")
    assert (code, out) == (1, "config.json: has other content\n")
    code, _, err = run("verify", f"{store.url}/{left}")
    assert code == 2
    assert "holds no finished stage" in err
    assert "nothing was abandoned more than 7 days ago" in run("gc", store.url, "--yes")[2]
    code, out, _ = run("gc", store.url, "--older-than", "0", "--json")
    assert (code, [one["name"] for one in json.loads(out)["abandoned"]]) == (0, [left])
    assert "--yes removes them" in run("gc", store.url, "--older-than", "0")[2]
    assert not store.folder(left).is_empty()
    code, out, _ = run("gc", store.url, "--older-than", "0", "--yes", "--json")
    assert (code, json.loads(out)["removed"]) == (0, [left])
    assert store.folder(left).is_empty()
    assert run("gc", str(tmp_path / "nothing"))[0] == 2
    assert "no fleet or comparison was started" in run("gc", store.url, "--superseded")[2]
    store.write_plan("fleet", "mine", {"stages": []})
    code, out, _ = run("gc", store.url, "--superseded", "--json")
    assert (code, [one["name"] for one in json.loads(out)["superseded"]]) == (0, [made])
    assert "1 abandoned or superseded" in run("gc", store.url, "--superseded")[2]
    assert json.loads(run("gc", store.url, "--superseded", "--yes", "--json")[1])["removed"] == [made]
    assert store.folder(made).is_empty()


@pytest.mark.timeout(180)
def test_what_may_not_be_removed_is_told_and_not_counted(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "store"))
    made = make(store, STAGE)
    theirs = begin(store, dataclasses.replace(STAGE, code="theirs"), "x", {"a/b": bytes(500)})
    mine = begin(store, dataclasses.replace(STAGE, code="mine"), "x", {"c": bytes(500)})
    store.write_plan("fleet", "mine", {"stages": []})
    may = Storage.remove_tree

    def remove_tree(storage: Storage, name: str = "") -> None:  # as for another user, who may not write in it
        if theirs not in storage.url and made not in storage.url:
            may(storage, name)

    monkeypatch.setattr(Storage, "remove_tree", remove_tree)
    code, out, err = run("gc", store.url, "--older-than", "0", "--superseded", "--yes")
    assert code == 1
    assert f"{store.url}/{theirs}: could not be removed whole" in err
    assert f"{store.url}/{made}: could not be removed whole" in err
    assert "1 removed, 0.5 kB" in err
    assert store.folder(mine).is_empty()
    code, out, _ = run("gc", store.url, "--older-than", "0", "--yes", "--json")
    assert (code, json.loads(out)["removed"]) == (1, [])
    monkeypatch.undo()
    _, out, _ = run("gc", store.url, "--older-than", "0", "--yes", "--json")
    assert sorted(json.loads(out)["removed"]) == sorted([theirs, made])


def test_a_stage_that_may_not_be_removed_stays_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that who may remove it finds it."""
    store = Store(str(tmp_path))
    theirs = begin(store, STAGE, "x", {"a/b": b"1"})
    (found,) = find_garbage(store, days=0)

    def refused(*_: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(Storage, "remove_tree", refused)
    with pytest.raises(garbage.NotRemoved, match=f"{theirs}: could not be removed whole"):
        remove(store, found, "gc")
    monkeypatch.undo()
    assert find_garbage(store, days=0) == [found]
    assert remove(store, found, "gc")


def test_an_interrupt_is_told_by_the_exit_code(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: str) -> Store:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalog, "open_store", interrupt)
    code, out, err = run("runs", "store")
    assert (code, out) == (130, "")
    assert err == "lesa-ray: interrupted; the same command goes on from here\n"
