"""What ends a process from outside, as an interrupt: SIGTERM, and SIGHUP but for who ignores it."""

from __future__ import annotations

import subprocess
import sys

HEAD = """
import os, signal, sys, threading
from lesa_ray.interrupt import as_before, signals_interrupt

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves

def interrupted(*numbers):
    "Whether these signals interrupt a block whose end takes a while; those after the first are to leave that alone."
    ended = False
    try:
        with signals_interrupt():
            try:
                signal.raise_signal(numbers[0])
            finally:
                for number in numbers[1:]:
                    signal.raise_signal(number)
                ended = True
    except KeyboardInterrupt:
        return ended
    return False

def of(number):
    return signal.getsignal(number)
"""


def said(script: str) -> list[str]:
    command = [sys.executable, "-c", HEAD + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_both_signals_interrupt_and_do_afterwards_what_they_did_before() -> None:
    script = """
print(interrupted(signal.SIGTERM), of(signal.SIGTERM) is signal.SIG_DFL, of(signal.SIGHUP) is signal.SIG_DFL)
print(interrupted(signal.SIGHUP, signal.SIGHUP), of(signal.SIGHUP) is signal.SIG_DFL)
with signals_interrupt():
    pass
print(of(signal.SIGTERM) is signal.SIG_DFL, of(signal.SIGHUP) is signal.SIG_DFL)
"""
    assert said(script) == ["True True True", "True True", "True True"]


def test_who_ignores_that_a_terminal_goes_away_is_not_interrupted() -> None:
    """As under `nohup`."""
    script = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
print(interrupted(signal.SIGHUP), of(signal.SIGHUP) is signal.SIG_IGN)
print(interrupted(signal.SIGTERM), of(signal.SIGHUP) is signal.SIG_IGN)
"""
    assert said(script) == ["False True", "True True"]


def test_a_signal_that_ray_makes_its_own_is_given_back() -> None:
    script = """
with signals_interrupt():
    ours = of(signal.SIGTERM)
    with as_before():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(signal.SIGTERM))
    print(of(signal.SIGTERM) is ours)
    try:
        with as_before():
            sys.exit(signal.SIGTERM)  # as Ray's own handler does
    except KeyboardInterrupt:
        print("interrupted", of(signal.SIGTERM) is ours)
    try:
        with as_before():
            sys.exit(2)
    except SystemExit as error:
        print("exit", error.code, of(signal.SIGTERM) is ours)
"""
    assert said(script) == ["True", "interrupted True", "exit 2 True"]


def test_another_thread_is_told_nothing() -> None:
    script = """
def elsewhere():
    with signals_interrupt(), as_before():
        print(of(signal.SIGTERM) is signal.SIG_DFL)

thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
"""
    assert said(script) == ["True"]
