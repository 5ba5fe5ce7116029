"""Write safetensors files whose layout is planned before there is anything to write.

A shard's header follows from names, dtypes and shapes alone, so the place of every byte is known ahead and tensors
can be copied in from where they lie, without being parsed or held: within a local filesystem by the kernel
(`copy_file_range`, which shares extents where the filesystem can), elsewhere in chunks of 16 MiB.

Old tensors keep the order they had in the base, so neighbours in a file stay neighbours and one copy moves many
tensors."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from lesa_ray.checkpoint.finite import FiniteCheck
from lesa_ray.checkpoint.reader import FLOAT_BYTES, SINGLE_FILE, TORCH_NAMES
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError

if TYPE_CHECKING:
    import torch

CHUNK = 16 * 2**20
_OTHER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class Span:
    """`nbytes` bytes at `offset` of `file` in the storage at `url`, elements of type `dtype`."""

    url: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    name: str
    """The tensor's name there, for messages."""
    check: bool = False
    """Whether to look for NaN and Inf on the way (old tensors; those a unit made were looked at when made)."""


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor of the result and where its bytes come from; no source means zeros."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Span | None

    @property
    def nbytes(self) -> int:
        size = FLOAT_BYTES.get(self.dtype) or _OTHER_BYTES.get(self.dtype, 1)
        return math.prod(self.shape) * size


@dataclass(frozen=True)
class Shard:
    """One file of the result."""

    file: str
    tensors: tuple[OutTensor, ...]

    @property
    def nbytes(self) -> int:
        return len(header_bytes(self.tensors)) + sum(tensor.nbytes for tensor in self.tensors)


def plan_shards(groups: list[list[OutTensor]], limit: int) -> list[Shard]:
    """Lay tensors into files of at most `limit` bytes; each group begins a file of its own.

    A tensor larger than the limit has a file to itself.
    """
    files: list[list[OutTensor]] = []
    for group in groups:
        room = -1
        for tensor in group:
            if tensor.nbytes > room:
                files.append([])
                room = limit
            files[-1].append(tensor)
            room -= tensor.nbytes
    if len(files) == 1:
        return [Shard(SINGLE_FILE, tuple(files[0]))]
    total = len(files)
    return [Shard(f"model-{i:05d}-of-{total:05d}.safetensors", tuple(file)) for i, file in enumerate(files, start=1)]


def index_bytes(shards: list[Shard]) -> bytes:
    """The JSON index that transformers reads (`model.safetensors.index.json`)."""
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def header_bytes(tensors: tuple[OutTensor, ...]) -> bytes:
    """Length and JSON header of a safetensors file with these tensors, padded so that data begin on 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_shard(storage: Storage, shard: Shard, make: Callable[[str], torch.Tensor] | None = None) -> None:
    """Write one file of the result from its sources. It appears whole or not at all.

    make: gives the tensor of a name, for those without a source, one at a time; without it they are zeros.
    Raises: UserError if a tensor that is made, checked, or converted to a narrower type holds NaN or Inf (which one).
    """
    with storage.create(shard.file) as out:
        out.write(header_bytes(shard.tensors))
        with contextlib.ExitStack() as stack:
            readers = _Readers(stack)
            for run in _runs(shard.tensors):
                if make is None or run[0].source is not None:
                    _write_run(out, storage, run, readers)
                    continue
                for tensor in run:
                    _write_made(out, tensor, make(tensor.name))


def copy_file(source: Storage, target: Storage, file: str, nbytes: int) -> None:
    """Copy one file, of `nbytes` bytes, under the same name. It appears whole or not at all."""
    whole = OutTensor(file, "U8", (nbytes,), Span(source.url, file, 0, nbytes, "U8", file))
    with target.create(file) as out, contextlib.ExitStack() as stack:
        _write_run(out, target, [whole], _Readers(stack))


class TensorFileWriter:
    """Write tensors one after another into a file whose header was planned. The order must be the planned one."""

    def __init__(self, out: IO[bytes], tensors: tuple[OutTensor, ...]) -> None:
        self._out = out
        self._expected = iter(tensors)
        out.write(header_bytes(tensors))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """tensor: any float dtype; converted to the planned one. Raises: UserError if it does not fit (NaN, Inf)."""
        planned = next(self._expected)
        assert planned.name == name, (planned, name)
        _write_made(self._out, planned, tensor, hint="; try --dtype float32")

    def finish(self) -> None:
        assert next(self._expected, None) is None, "not all planned tensors were written"


def _write_made(out: IO[bytes], planned: OutTensor, tensor: torch.Tensor, hint: str = "") -> None:
    import torch

    assert planned.shape == tuple(tensor.shape), (planned, tensor.shape)
    narrow = tensor.detach().to("cpu", getattr(torch, TORCH_NAMES[planned.dtype])).contiguous()
    if not torch.isfinite(narrow).all():
        raise UserError(f"the new tensor {planned.name} holds NaN or Inf in {TORCH_NAMES[planned.dtype]}{hint}")
    out.write(narrow.view(-1).view(torch.uint8).numpy().data)


def _runs(tensors: tuple[OutTensor, ...]) -> Iterator[list[OutTensor]]:
    """Group neighbours of one dtype whose bytes are neighbours in their source too and need no conversion."""
    run: list[OutTensor] = []
    for tensor in tensors:
        if run and not _continues(run[-1], tensor):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def _continues(before: OutTensor, after: OutTensor) -> bool:
    a, b = before.source, after.source
    if a is None or b is None:
        return a is b
    if a.dtype != before.dtype or b.dtype != after.dtype:
        return False
    return (a.url, a.file, a.offset + a.nbytes, a.dtype, a.check) == (b.url, b.file, b.offset, b.dtype, b.check)


class _Readers:
    """The source files open while one shard is written."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._storages: dict[str, Storage] = {}
        self._files: dict[tuple[str, str], IO[bytes]] = {}

    def storage(self, span: Span) -> Storage:
        return self._storages.setdefault(span.url, Storage(span.url))

    def local(self, span: Span) -> IO[bytes]:
        key = (span.url, span.file)
        if key not in self._files:
            path = self.storage(span).path(span.file)
            self._files[key] = self._stack.enter_context(open(path, "rb", buffering=0))  # noqa: SIM115
        return self._files[key]

    def chunks(self, span: Span, start: int, end: int) -> Iterator[bytes]:
        """The bytes [start, end) of the source file, in chunks."""
        storage = self.storage(span)
        for position in range(start, end, CHUNK):
            stop = min(position + CHUNK, end)
            if storage.is_local:
                yield os.pread(self.local(span).fileno(), stop - position, position)
            else:
                yield storage.read(span.file, position, stop)


def _write_run(out: IO[bytes], storage: Storage, run: list[OutTensor], readers: _Readers) -> None:
    first = run[0].source
    if first is None:
        _write_zeros(out, storage, sum(tensor.nbytes for tensor in run))
        return
    if first.dtype != run[0].dtype:
        for tensor in run:
            _convert(out, tensor, readers)
        return
    checks = [FiniteCheck(t.source.name, t.dtype, t.nbytes) for t in run if t.source] if first.check else []
    start, end = first.offset, first.offset + sum(tensor.nbytes for tensor in run)
    if storage.is_local and readers.storage(first).is_local:
        out.flush()
        if _copy_in_kernel(readers.local(first).fileno(), out.fileno(), start, end - start):
            FiniteCheck.feed_file(checks, readers.local(first).fileno(), start)
            return
    for chunk in readers.chunks(first, start, end):
        FiniteCheck.feed(checks, chunk)
        out.write(chunk)


def _write_zeros(out: IO[bytes], storage: Storage, nbytes: int) -> None:
    if storage.is_local:  # a hole: reads as zeros and takes no time and no space
        out.flush()
        out.seek(nbytes, os.SEEK_CUR)
        out.truncate()
        return
    zeros = bytes(min(nbytes, CHUNK))
    for position in range(0, nbytes, CHUNK):
        out.write(zeros[: min(CHUNK, nbytes - position)])


def _copy_in_kernel(source: int, target: int, offset: int, nbytes: int) -> bool:
    """Append bytes of one local file to another inside the kernel; False if it cannot, with nothing changed."""
    done = 0
    position = os.lseek(target, 0, os.SEEK_CUR)
    while done < nbytes:
        try:
            count = os.copy_file_range(source, target, min(nbytes - done, 2**30), offset + done, position + done)
        except OSError as error:
            if done == 0 and error.errno in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise
        if count == 0:
            raise UserError("a shard of BASE ends before its header says; it changed during the run or is truncated")
        done += count
    os.lseek(target, position + nbytes, os.SEEK_SET)
    return True


def _convert(out: IO[bytes], tensor: OutTensor, readers: _Readers) -> None:
    import torch

    source = tensor.source
    assert source is not None
    wide, narrow = (getattr(torch, TORCH_NAMES[dtype]) for dtype in (source.dtype, tensor.dtype))
    for chunk in readers.chunks(source, source.offset, source.offset + source.nbytes):
        values = torch.frombuffer(bytearray(chunk), dtype=wide).to(narrow)
        if not torch.isfinite(values).all():
            raise UserError(
                f"tensor {source.name} holds NaN or Inf, or values too large for {TORCH_NAMES[tensor.dtype]}"
            )
        out.write(values.view(torch.uint8).numpy().data)
