"""SIGTERM as an interrupt: `ray job stop`, Kubernetes and batch systems end a process with it, and what Ctrl-C does,
one line and leases let go, is wanted then too.

Ray makes SIGTERM its own wherever it starts: its core prints a stack and, three seconds later, aborts what has not
ended by then. `as_before` gives the signal back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in the block. Nothing in other threads than the main one, which cannot be
    told what a signal does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with as_before():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, interrupt)
        yield


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
