"""One holder at a time: real processes race for leases on a folder, on S3 with conditional writes and without."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from lesa_ray import MachineError
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.store import process, register
from lesa_ray.store.claims import Claims, StoreClock
from lesa_ray.store.lease import Lease, Leases
from lesa_ray.store.process import Process, is_alive, this_process
from tests.waiting import until

RACER = """
import os, sys, time
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.store.lease import Leases

url, inside, me, times = sys.argv[1:4] + [int(sys.argv[4])]
leases = Leases(Storage(url), term=30)
print("ready", flush=True)
sys.stdin.readline()
got = 0
while got < times:
    lease = leases.acquire("thing", me)
    if lease is None:
        time.sleep(0.02)
        continue
    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if anyone else is inside
    time.sleep(0.03)
    assert lease.held
    os.unlink(inside)
    lease.release()
    got += 1
print("done", got, flush=True)
"""
HOLDER = """
import os, signal, sys, time
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.store.lease import Leases

lease = Leases(Storage(sys.argv[1]), term=float(sys.argv[2])).acquire("thing", "the first")
print("held", lease is not None, flush=True)
sys.stdin.readline()
with lease._one_at_a_time:  # between two renewals
    os.kill(os.getpid(), signal.SIGSTOP)
while lease.held:
    time.sleep(0.02)
print("lost", flush=True)
"""

NEIGHBOUR = """
import sys, time
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.store.lease import Leases

leases = Leases(Storage(sys.argv[1]), term=float(sys.argv[2]))
leases._knows = sys.argv[3] == "claimed"
lease = leases.outlive("thing", "the first", print)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms of a second are short beside what a disk that others write to may take."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.timeout(360)
def test_processes_that_race_are_never_inside_together(place: str, tmp_path: Path) -> None:
    racers, times = 3, 3
    inside = str(tmp_path / "inside")
    processes = [start(RACER, place, inside, f"racer {i}", str(times)) for i in range(racers)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        ends = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert ends == [f"done {times}\n"] * racers
    assert not os.path.exists(inside)


@pytest.mark.timeout(270)
@pytest.mark.parametrize("place", ["folder", "plain"], indirect=True)  # `conditional` differs from `folder` in no step
def test_a_dead_holders_lease_runs_out_and_a_stopped_one_learns_that_it_lost(place: str) -> None:
    term = 4.0
    leases = Leases(Storage(place), term)
    first = start(HOLDER, place, str(term))
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held True\n"
        time.sleep(term + 1.1)
        assert leases.holder("thing") == "the first"  # renewed
        assert leases.acquire("thing", "the second") is None
        assert first.stdin is not None
        first.stdin.write("stop\n")
        first.stdin.flush()
        os.waitpid(first.pid, os.WUNTRACED)
        got = []
        waited = until(lambda: got.append(leases.acquire("thing", "the second")) or got[-1])
        assert waited > 0.5 * term
        lease = got[-1]
        assert lease is not None
        assert leases.holder("thing") == "the second"
        first.send_signal(signal.SIGCONT)
        assert first.stdout.readline() == "lost\n"
        first.wait(timeout=20)
        assert lease.held
        assert leases.holder("thing") == "the second"  # the first took nothing back
        lease.release()
        assert not lease.held
        assert leases.holder("thing") is None
    finally:
        first.kill()
        first.wait(timeout=20)


@pytest.mark.timeout(180)
def test_a_holder_whose_store_is_away_stops_before_anyone_can_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The observer needs a whole term without a renewal; the holder counts less."""
    term = 4.0
    leases = Leases(Storage(str(tmp_path)), term)
    lease = leases.acquire("thing", "me")
    assert lease is not None

    def away(*_: object) -> str:
        raise MachineError("the store does not answer")

    monkeypatch.setattr(register.LocalRegister, "swap", away)
    until(lambda: not lease.held)
    assert leases.holder("thing") == "me"
    assert leases.acquire("thing", "another") is None
    monkeypatch.undo()
    until(lambda: leases.holder("thing") is None)


@pytest.mark.timeout(180)
def test_a_clock_that_was_set_back_does_not_keep_the_dead_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By that clock the files are of the future and grow no older; the observer's own counts a term without a change.

    Once with compare-and-swap, once with claims."""
    both = [Leases(Storage(str(tmp_path / name)), 1.0) for name in ("swapped", "claimed")]
    monkeypatch.setattr(both[1], "_knows", True)
    for leases in both:
        dead = leases.acquire("thing", "the first")
        assert dead is not None
        dead._stop.set()
        dead._thread.join()
    for file in tmp_path.rglob("*.json"):
        os.utime(file, (time.time() + 1e6, time.time() + 1e6))
    for leases in both:
        assert leases.acquire("thing", "the second") is None
    for leases in both:
        until(lambda leases=leases: leases.acquire("thing", "the second"), 10)  # type: ignore[misc]


@pytest.mark.timeout(180)
def test_who_comes_after_a_process_of_this_machine_need_not_wait(tmp_path: Path) -> None:
    first = start(NEIGHBOUR, str(tmp_path), "600", "swapped")
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        leases, waited = Leases(Storage(str(tmp_path)), 600), []
        assert leases.outlive("thing", "the second", waited.append) == "the first"
    finally:
        first.kill()
        first.wait(timeout=20)
    assert isinstance(leases.outlive("thing", "the second", waited.append), Lease)
    assert leases.holder("thing") == "the second"
    assert not waited


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["swapped", "claimed"])
def test_a_process_of_this_machine_that_is_suspended_keeps_what_it_has(how: str, tmp_path: Path) -> None:
    term = 1.0
    first = start(NEIGHBOUR, str(tmp_path), str(term), how)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        first.send_signal(signal.SIGSTOP)
        time.sleep(term + 1.5)
        leases = Leases(Storage(str(tmp_path)), term)
        leases._knows = how == "claimed"
        assert leases.outlive("thing", "the second", print) == "the first"
    finally:
        first.kill()
        first.wait(timeout=20)
    assert isinstance(leases.outlive("thing", "the second", print), Lease)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["swapped", "claimed"])
def test_a_process_takes_up_what_ran_out_while_its_store_was_away(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    term, away = 1.0, []

    def refusing(kind: type, name: str) -> None:
        """A store that does not answer while `away` holds something."""
        real = getattr(kind, name)

        def call(*given: object, **named: object) -> object:
            if away:
                raise MachineError("the store does not answer")
            return real(*given, **named)

        monkeypatch.setattr(kind, name, call)

    refusing(register.LocalRegister, "swap")
    refusing(Claims, "write")
    refusing(Claims, "withdraw")
    here, there = (Leases(Storage(str(tmp_path)), term) for _ in range(2))
    here._knows = there._knows = how == "claimed"
    lease = here.acquire("thing", "the first", this_process())
    assert lease is not None
    away.append("away")
    until(lambda: not lease.held)
    with pytest.raises(MachineError):
        lease.renew()
    away.clear()
    until(lambda: lease.held)
    away.append("away")
    time.sleep(term + 1.5)
    assert not lease.held
    away.clear()
    assert there.outlive("thing", "the second", print) == "the first"
    until(lambda: lease.held)
    away.append("away")
    lease.release()  # without an answer
    away.clear()
    second = there.acquire("thing", "the second", this_process())
    assert second is not None
    assert not lease.renew()
    until(lambda: second.held)
    second.release()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_takes_no_lease_away(full: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(storage: Storage, name: str, data: bytes) -> None:
        raise OSError(full, os.strerror(full), name)

    term, begin = 1.0, time.monotonic()
    lease = Leases(Storage(str(tmp_path)), term).acquire("thing", "the first")
    assert lease is not None
    there = Leases(Storage(str(tmp_path)), term)
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "write", refused)
        assert there.outlive("thing", "the second", print) == "the first"  # it was seen to renew
        until(lambda: time.monotonic() > begin + term + 2.5 or not lease.held)
        assert lease.held
        assert there.holder("thing") == "the first"
        held = tmp_path / "leases" / "thing.json"
        stolen = held.read_bytes().replace(b"the first", b"a thief  ").replace(b'"owner": "', b'"owner": "x')
        held.write_bytes(stolen)
        until(lambda: not lease.held)
    assert not lease.renew()
    assert held.read_bytes() == stolen
    lease.release()


@pytest.mark.timeout(180)
def test_nobody_slips_in_while_what_ran_out_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of claims the old one counts until the new one does."""
    here, there = (Leases(Storage(str(tmp_path)), 1.0) for _ in range(2))
    here._knows = there._knows = True
    write = Claims.write
    got: list[Lease | None] = []

    def refused(*_: Any, **__: Any) -> None:
        raise MachineError("the store does not answer")

    def contested(claims: Claims, told: Mapping[str, Any], *given: Any, **named: Any) -> None:
        if told["holder"] == "the second":
            return write(claims, told, *given, **named)
        got.append(there.acquire("thing", "the second", this_process()))
        write(claims, told, *given, **named)
        got.append(there.acquire("thing", "the second", this_process()))
        return None

    lease = here.acquire("thing", "the first", this_process())
    assert lease is not None
    monkeypatch.setattr(Claims, "write", refused)
    until(lambda: not lease.held)
    monkeypatch.setattr(Claims, "write", contested)
    until(lambda: lease.held)
    lease.release()
    assert len(got) >= 4
    assert set(got) == {None}
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.timeout(180)
def test_whether_a_process_of_another_machine_lives_is_waited_for(tmp_path: Path) -> None:
    """It does if it renews; it is dead if it has not for a term."""
    leases, waited = Leases(Storage(str(tmp_path)), 1.2), []
    away = Process(machine="another", number=os.getpid(), began=0)
    lease = leases.acquire("thing", "the first", away)
    assert lease is not None
    assert leases.outlive("thing", "the second", waited.append) == "the first"
    lease._stop.set()
    lease._thread.join()
    assert isinstance(leases.outlive("thing", "the second", waited.append), Lease)
    assert waited == ["the first", "the first"]


def test_a_process_is_told_from_a_later_one_of_its_number() -> None:
    me = this_process()
    assert me is not None
    assert is_alive(me)
    assert is_alive({**me, "began": me["began"] - 1}) is False
    assert is_alive({**me, "machine": "another"}) is None
    assert is_alive(None) is None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = process._began(child.pid)
    assert began is not None
    child.kill()
    until(lambda: process._began(child.pid) is None)  # killed, and not waited for yet
    child.wait(timeout=20)
    assert is_alive({**me, "number": child.pid, "began": began}) is False


@pytest.mark.timeout(90)
def test_a_clock_that_is_wrong_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = Leases(Storage(str(tmp_path)), 30)
    lease = leases.acquire("thing", "me")
    assert lease is not None
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 1e6)
    assert leases.acquire("thing", "another") is None
    lease.release()
    assert leases.acquire("thing", "another") is not None


@pytest.mark.timeout(90)
def test_a_clock_that_is_set_forward_makes_no_lease_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = Leases(Storage(str(tmp_path)), 30), Leases(Storage(str(tmp_path)), 30)
    lease = here.acquire("thing", "me")
    assert lease is not None
    assert there.holder("thing") == "me"
    now, file = time.time, tmp_path / "leases/thing.json"
    os.utime(file, (now() - 600, now() - 600))  # as the kernel's clock has it when it was set
    monkeypatch.setattr(time, "time", lambda: now() + 600)
    assert there.acquire("thing", "another") is None
    assert lease.renew()
    lease.release()
    assert there.acquire("thing", "another") is not None


@pytest.mark.timeout(180)
def test_a_renewal_that_was_made_but_never_answered_loses_nothing(
    conditional: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to a write is lost: the version it gave is not known, but the content is the holder's own."""
    lease = Leases(Storage(conditional), 60).acquire("thing", "me")
    assert lease is not None
    swap, lost = register.S3Register.swap, []

    def once(self: register.S3Register, name: str, expected: str | None, data: bytes) -> str | None:
        answer = swap(self, name, expected, data)
        if not lost:
            lost.append(answer)
            raise MachineError("the store does not answer")
        return answer

    monkeypatch.setattr(register.S3Register, "swap", once)
    with pytest.raises(MachineError):
        lease.renew()
    assert lost[0] is not None
    assert lease.renew()
    lease.release()


@pytest.mark.timeout(180)
def test_who_only_looks_writes_nothing(place: str) -> None:
    """As `fleet --dry-run` with keys that may not write."""
    control = Storage(f"{place}/control")
    assert Leases(control).holder("thing") is None
    assert not control.list()
    lease = Leases(control).acquire("thing", "me")
    assert Leases(control).holder("thing") == "me"
    assert lease is not None
    lease.release()


@pytest.mark.timeout(90)
def test_claims_grow_old_by_the_clock_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is eleven days behind that of this machine."""

    def modified(_: object, path: str) -> datetime:
        return datetime.fromtimestamp(os.stat(path).st_mtime - 1e6, UTC)

    monkeypatch.setattr(LocalFileSystem, "modified", modified)
    here, there = (Leases(Storage(str(tmp_path)), 30) for _ in range(2))
    here._knows = there._knows = True
    lease = here.acquire("thing", "me")
    assert lease is not None
    assert there.holder("thing") == "me"
    assert there.acquire("thing", "another") is None
    lease.release()
    assert there.acquire("thing", "another") is not None
    assert len(list(tmp_path.rglob(".clock*"))) == 0


def test_what_is_found_out_about_a_store_is_no_part_of_a_leases_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = register.register_of

    def slowly(*given: Storage) -> register.Register | None:
        time.sleep(1.0)
        return found(*given)

    monkeypatch.setattr("lesa_ray.store.lease.register_of", slowly)
    lease = Leases(Storage(str(tmp_path)), 1.0).acquire("thing", "me")
    assert lease is not None
    assert lease.held
    lease.release()


def test_a_renewal_counts_from_when_it_was_asked_for_and_not_if_it_comes_too_late() -> None:
    """Meanwhile someone may have it."""
    asked: list[bool] = []

    def slow(late: bool) -> bool:
        asked.append(late)
        time.sleep(1.2)
        return True

    begin = time.monotonic()
    lease = Lease("thing", "me", 20, begin, slow, lambda: None, lasting=False)
    assert lease.renew()
    assert lease._valid_until <= time.monotonic() - 1.2 + 0.7 * 20
    lease.release()
    lease = Lease("thing", "me", 20, time.monotonic() - 0.7 * 20 + 1.0, slow, lambda: None, lasting=False)
    assert lease.held
    assert not lease.renew()
    assert not lease.renew()
    assert asked == [False, False]
    lease.release()


def test_a_lease_that_was_taken_over_is_lost_at_once(tmp_path: Path) -> None:
    """A thief's stays as it is, whatever its former holder does."""
    lease, file = Leases(Storage(str(tmp_path)), 600).acquire("thing", "the first"), tmp_path / "leases/thing.json"
    assert lease is not None
    assert lease.held
    stolen = file.read_bytes().replace(b'"owner": "', b'"owner": "x')
    file.write_bytes(stolen)
    assert not lease.renew()
    assert not lease.held
    assert not lease.renew()
    lease.release()
    assert file.read_bytes() == stolen


def test_a_claim_that_others_removed_does_not_come_back(tmp_path: Path) -> None:
    leases = Leases(Storage(str(tmp_path)), 600)
    leases._knows = True
    lease = leases.acquire("thing", "the first")
    assert lease is not None
    [claim] = (tmp_path / "leases/thing").glob("*.json")
    claim.unlink()
    assert not lease.renew()
    assert not lease.held
    assert not claim.exists()
    lease.release()


def test_what_took_too_long_to_get_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the time the claim is there its term may be over."""
    leases, write = Leases(Storage(str(tmp_path)), 1.0), Claims.write
    leases._knows = True

    def slow(*given: Any, held: bool) -> None:
        write(*given, held=held)
        time.sleep(0.8 if held else 0)

    monkeypatch.setattr(Claims, "write", slow)
    assert leases.acquire("thing", "the first") is None
    assert not list(tmp_path.rglob("*.json"))


def test_a_lease_is_let_go_on_a_full_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = Leases(Storage(str(tmp_path)), 600)
    lease = leases.acquire("thing", "the first")
    assert lease is not None

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", full)
        lease.release()
    second = leases.acquire("thing", "the second")
    assert second is not None
    second.release()


def test_a_lease_is_as_long_as_its_holder_says(tmp_path: Path) -> None:
    first, there = Leases(Storage(str(tmp_path)), 600), Leases(Storage(str(tmp_path)), 0.1)
    lease, file = first.acquire("thing", "the first"), tmp_path / "leases/thing.json"
    assert lease is not None
    now = time.time()
    os.utime(file, (now - 590, now - 590))
    assert there.holder("thing") == "the first"
    assert there.acquire("thing", "the second") is None
    os.utime(file, (now - 610, now - 610))
    assert there.holder("thing") is None
    second = there.acquire("thing", "the second")
    assert second is not None
    assert not lease.renew()
    second.release()
    lease.release()


def test_of_two_who_claim_a_thing_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That with the smaller name, which waits until the other has withdrawn; nobody waits where it is held."""

    def claims(name: str) -> Claims:
        made = Claims(Storage(str(tmp_path)), 1.0, register.Unchanged(), StoreClock(Storage(str(tmp_path))))
        made.id = name
        return made

    told = {"holder": "one of us", "process": None, "owner": "o"}
    first, second = claims("a"), claims("b")
    first.write(told, 600, held=False)
    begin = time.monotonic()
    assert not second.take(told, 600)
    assert time.monotonic() - begin < 5  # of ten that it would look on
    assert [file.name for file in tmp_path.glob("*.json")] == ["a.json"]
    second.write(told, 600, held=False)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(first.take, told, 600)
        time.sleep(1)
        assert not taken.done()
        second.withdraw()
        assert taken.result(timeout=60)
    assert second.held() is not None
    late, begin = claims("0"), time.monotonic()
    monkeypatch.setattr(late, "held", lambda: None)  # it is got between the first look and the claim
    assert not late.take(told, 600)
    assert time.monotonic() - begin < 5
    assert [file.name for file in tmp_path.glob("*.json")] == ["a.json"]


def test_a_lease_outlives_faults_of_the_disk() -> None:
    asked: list[bool] = []

    def faulty(*late: bool) -> bool:
        asked.extend(late)
        raise OSError("input/output error")

    lease = Lease("thing", "me", 0.4, time.monotonic(), faulty, faulty, lasting=True)  # type: ignore[arg-type]
    until(lambda: len(asked) > 2, 20)
    lease.release()
    lease = Lease("thing", "me", 20, time.monotonic(), faulty, faulty, lasting=True)  # type: ignore[arg-type]
    lease.release()
    assert not lease.held
    assert "me" not in process.HERE
