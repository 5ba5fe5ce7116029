"""Exact ranges of files; of remote ones long ranges in pieces of 16 MiB, of which several are on their way at once.

One connection to an object store brings some 50 to 100 MB/s, whatever the network; many together fill it. A piece
that is cut off on the way is asked for again by itself (by the filesystem's own retries).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError

PIECE = 16 * 2**20
_SIDE_BY_SIDE = 8
_AHEAD = 4
_AT_ONCE = 2**30
"""Linux reads no more than 2 GiB at a call."""


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
                    raise _ends_early(storage, name)
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
    with ThreadPoolExecutor(min(_SIDE_BY_SIDE, len(begins))) as pool:
        futures = [pool.submit(read, begin) for begin in begins]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_ahead(storage: Storage, name: str, start: int, end: int) -> Iterator[bytes]:
    """The bytes [start, end) of a file, in order, in pieces; up to four are on their way while one is worked on.

    Raises: UserError if the file ends before.
    """
    begins = iter(range(start, end, PIECE))
    if end - start <= PIECE:
        if start < end:
            yield _exactly(storage, name, start, end)
        return
    with ThreadPoolExecutor(_AHEAD) as pool:
        coming: deque[Future[bytes]] = deque()
        try:
            while True:
                while len(coming) < _AHEAD and (begin := next(begins, None)) is not None:
                    coming.append(pool.submit(_exactly, storage, name, begin, min(begin + PIECE, end)))
                if not coming:
                    return
                yield coming.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _exactly(storage: Storage, name: str, start: int, end: int) -> bytes:
    data = storage.read(name, start, end)
    if len(data) != end - start:
        raise _ends_early(storage, name)
    return data


def _ends_early(storage: Storage, name: str) -> UserError:
    return UserError(f"{storage.url}/{name}: ends before its header says; it changed during the run or is truncated")
