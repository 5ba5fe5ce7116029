"""Move the bytes of tensors from where they lie to where they belong: by the kernel, through memory, or as zeros."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import IO

from lesa_ray.checkpoint.finite import FiniteCheck
from lesa_ray.checkpoint.header import TORCH_NAMES
from lesa_ray.checkpoint.ranges import PIECE, ends_early, read_ahead, read_full
from lesa_ray.checkpoint.shards import OutTensor, Span
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError


class Readers:
    """The source files open while one shard is written."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._storages: dict[str, Storage] = {}
        self._files: dict[tuple[str, str], IO[bytes]] = {}

    def storage(self, span: Span) -> Storage:
        if span.url not in self._storages:
            self._storages[span.url] = Storage(span.url)
        return self._storages[span.url]

    def local(self, span: Span) -> IO[bytes]:
        key = (span.url, span.file)
        if key not in self._files:
            path = self.storage(span).path(span.file)
            self._files[key] = self._stack.enter_context(open(path, "rb", buffering=0))  # noqa: SIM115
        return self._files[key]

    def chunks(self, span: Span, start: int, end: int) -> Iterator[bytes | bytearray]:
        """The bytes [start, end) of the source file, in chunks."""
        storage = self.storage(span)
        if not storage.is_local:
            yield from read_ahead(storage, span.file, start, end)
            return
        for position in range(start, end, PIECE):
            size = min(PIECE, end - position)
            chunk = bytearray(size)
            if not read_full(self.local(span).fileno(), memoryview(chunk), position):
                raise ends_early(storage, span.file)
            yield chunk


def write_run(
    out: IO[bytes], storage: Storage, run: list[OutTensor], readers: Readers, wanted: list[tuple[int, int]]
) -> None:
    """Append a run of tensors, neighbours in one source, in `out`, a file of `storage`.

    wanted: the ranges [start, end) of the run that are written here, all of it for zeros and conversions; the rest
    comes by the server. Raises: UserError for NaN and Inf in a checked or converted tensor, or a source too short.
    """
    nbytes = sum(tensor.nbytes for tensor in run)
    first = run[0].source
    if first is None:
        _write_zeros(out, storage, nbytes)
        return
    if run[0].converted:
        for tensor in run:
            _convert(out, tensor, readers)
        return
    whole = wanted == [(0, nbytes)]
    checks = [FiniteCheck(t.source.name, t.dtype, t.nbytes) for t in run if t.source] if first.check and whole else []
    if storage.is_local and readers.storage(first).is_local:
        out.flush()
        if _copy_in_kernel(first, readers, out.fileno(), nbytes):
            FiniteCheck.feed_file(checks, readers.local(first).fileno(), first.offset)
            return
    for start, end in wanted:
        for chunk in readers.chunks(first, first.offset + start, first.offset + end):
            FiniteCheck.feed(checks, chunk)
            out.write(chunk)


def _write_zeros(out: IO[bytes], storage: Storage, nbytes: int) -> None:
    if storage.is_local:  # a hole: reads as zeros and takes no time and no space
        out.flush()
        out.seek(nbytes, os.SEEK_CUR)
        out.truncate()
        return
    zeros = bytes(min(nbytes, PIECE))
    for position in range(0, nbytes, PIECE):
        out.write(zeros[: min(PIECE, nbytes - position)])


def _copy_in_kernel(first: Span, readers: Readers, target: int, nbytes: int) -> bool:
    """Append the bytes of a local file from a span on to another inside the kernel; False if it cannot, with nothing
    changed."""
    if not hasattr(os, "copy_file_range"):  # Linux alone has it
        return False
    source, offset, done = readers.local(first).fileno(), first.offset, 0
    position = os.lseek(target, 0, os.SEEK_CUR)
    while done < nbytes:
        try:
            count = os.copy_file_range(source, target, min(nbytes - done, 2**30), offset + done, position + done)
        except OSError as error:
            if done == 0 and error.errno in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise
        if count == 0:
            raise ends_early(readers.storage(first), first.file)
        done += count
    os.lseek(target, position + nbytes, os.SEEK_SET)
    return True


def _convert(out: IO[bytes], tensor: OutTensor, readers: Readers) -> None:
    import torch

    source = tensor.source
    assert source is not None
    wide, narrow = (getattr(torch, TORCH_NAMES[dtype]) for dtype in (source.dtype, tensor.dtype))
    for chunk in readers.chunks(source, source.offset, source.offset + source.nbytes):
        values = torch.frombuffer(bytearray(chunk), dtype=wide)
        if source.scale != 1:
            values = values.to(torch.promote_types(wide, torch.float32)) * source.scale
        values = values.to(narrow)
        if not torch.isfinite(values).all():
            raise UserError(
                f"tensor {source.name} holds NaN or Inf, or values too large for {TORCH_NAMES[tensor.dtype]}"
            )
        out.write(values.view(torch.uint8).numpy().data)
