"""SIGTERM and SIGHUP as interrupts: `ray job stop`, Kubernetes and batch systems end a process with the one, a terminal
that goes away with the other, and what Ctrl-C does, one line and leases let go, is wanted then too.

Ray makes SIGTERM its own wherever it starts: its core prints a stack and, three seconds later, aborts what has not
ended by then. `as_before` gives the signal back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in the block, and so does SIGHUP, but for who ignores it, as `nohup` does.
    Nothing in other threads than the main one, which cannot be told what a signal does."""

    def interrupt(number: int, _: object) -> None:
        if number == signal.SIGHUP:  # the kernel and the shell send one each
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hangs_up = signal.getsignal(signal.SIGHUP)
    with as_before():
        signal.signal(signal.SIGTERM, interrupt)
        if hangs_up is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, interrupt)
        try:
            yield
        finally:
            if hangs_up is signal.SIG_DFL:
                signal.signal(signal.SIGHUP, hangs_up)


@contextmanager
def as_before() -> Iterator[None]:
    """Put back at the block's end what SIGTERM did at its beginning."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:  # Ray's own way, where the signal comes while it starts
        if error.code == signal.SIGTERM:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
