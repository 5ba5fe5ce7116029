"""Exact ranges of files; of remote ones long ranges in pieces of 16 MiB. Several are on their way at once.

One connection to an object store brings some 50 to 100 MB/s, whatever the network, and some 50 ms go by before its
first byte; many together fill it. A piece that is cut off on the way is asked for again by itself (by the filesystem's
own retries).
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError

PIECE = 16 * 2**20
_SIDE_BY_SIDE = 8
_AHEAD = 4
_AT_ONCE = 2**30
"""Linux reads no more than 2 GiB at a call."""

T = TypeVar("T")


def side_by_side(
    calls: Iterable[tuple[int, Callable[[], T]]], threads: int = _SIDE_BY_SIDE
) -> Generator[T, None, None]:
    """What calls return, in their order, each made by one of some threads, a few ahead of what is taken.

    Bounded are those under way, those done that wait, and the one that was taken last: there are at most as many as
    threads, and they hold at most a piece for each thread together, unless one alone holds more.

    calls: each with the bytes that it will hold; drawn in the thread that takes. Raises: what a call raises, in its
    place; calls not begun are then dropped.
    """
    waiting = iter(calls)
    following = next(waiting, None)
    coming: deque[tuple[int, Future[T]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(threads)
    try:
        while coming or following is not None:
            while following is not None and len(coming) < threads:
                size, call = following
                if coming and held + size > threads * PIECE:
                    break
                coming.append((size, pool.submit(call)))
                held += size
                following = next(waiting, None)
            yield coming[0][1].result()
            held -= coming.popleft()[0]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_into(storage: Storage, name: str, start: int, view: memoryview) -> None:
    """Fill `view` with the bytes of a file from `start` on; of a remote one up to eight pieces, 128 MiB, are held
    beside it, of a local one nothing.

    Raises: UserError if the file ends before.
    """
    if storage.is_local:
        with open(storage.path(name), "rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < len(view):
                count = file.readinto(view[done : done + _AT_ONCE])
                if not count:
                    raise ends_early(storage, name)
                done += count
        return

    def read(begin: int) -> None:
        end = min(begin + PIECE, len(view))
        view[begin:end] = _exactly(storage, name, start + begin, start + end)

    begins = range(0, len(view), PIECE)
    if len(begins) <= 1:
        for begin in begins:
            read(begin)
        return
    for _ in side_by_side((PIECE, functools.partial(read, begin)) for begin in begins):
        pass


def read_full(descriptor: int, view: memoryview, position: int) -> bool:
    """Fill `view` with the bytes of an open file from `position` on; False if it ends before. A read may bring less
    than is there, on a network's filesystem say."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + _AT_ONCE]], position + done)
        if not count:
            return False
        done += count
    return True


def read_ahead(storage: Storage, name: str, start: int, end: int) -> Iterator[bytes]:
    """The bytes [start, end) of a file, in order, in pieces; up to four are on their way while one is worked on.

    Raises: UserError if the file ends before.
    """
    if end - start <= PIECE:
        if start < end:
            yield _exactly(storage, name, start, end)
        return
    begins = range(start, end, PIECE)
    yield from side_by_side(
        ((PIECE, functools.partial(_exactly, storage, name, begin, min(begin + PIECE, end))) for begin in begins),
        threads=_AHEAD,
    )


def _exactly(storage: Storage, name: str, start: int, end: int) -> bytes:
    data = storage.read(name, start, end)
    if len(data) != end - start:
        raise ends_early(storage, name)
    return data


def ends_early(storage: Storage, name: str) -> UserError:
    """What is raised where a file is shorter than its header says."""
    return UserError(f"{storage.url}/{name}: ends before its header says; it changed during the run or is truncated")
