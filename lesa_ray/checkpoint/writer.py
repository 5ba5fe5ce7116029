"""Write safetensors files whose layout is planned before there is anything to write.

A shard's header follows from names, dtypes and shapes alone, so the place of every byte is known ahead and tensors
can be copied in from where they lie, without being parsed or held: within a local filesystem by the kernel
(`copy_file_range`, which shares extents where the filesystem can), within S3 by the server (UploadPartCopy), elsewhere
in chunks of 16 MiB, read ahead and uploaded several at a time.

Old tensors keep the order they had in the base, so neighbours in a file stay neighbours and one copy moves many
tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING

from lesa_ray.checkpoint.copying import Readers, write_run
from lesa_ray.checkpoint.header import ELEMENT_NAMES
from lesa_ray.checkpoint.part_plan import Piece, plan_parts, uploaded_ranges
from lesa_ray.checkpoint.server_copy import ServerCopies
from lesa_ray.checkpoint.shards import OutTensor, Shard, Span, header_bytes
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError

if TYPE_CHECKING:
    import torch

_CONVERTED = 2**20
"""Bytes of a tensor that are converted and looked at together: of a whole one they would take its size again, and more,
in a thread beside those that compute."""


def write_shard(storage: Storage, shard: Shard, make: Callable[[str], torch.Tensor] | None = None) -> None:
    """Write one file of the result from its sources. It appears whole or not at all.

    Where source and target lie in the same S3, the server copies: the bytes of long runs do not pass through this
    machine and are not looked at, whatever their spans' `check` says. A server that makes no such copies is found out
    by asking, and then everything is written from here.

    make: gives the tensor of a name, for those without a source, one at a time (again, if the server refused to copy);
    without it they are zeros.
    Raises: UserError if a tensor that is made, checked, scaled or converted to another type holds NaN or Inf (which),
    or if a source ends before its header says or changes meanwhile.
    """
    _write_file(storage, shard.file, header_bytes(shard.tensors), list(_runs(shard.tensors)), make)


def copy_file(source: Storage, target: Storage, file: str, nbytes: int) -> None:
    """Copy one file, of `nbytes` bytes, under the same name. It appears whole or not at all."""
    whole = OutTensor(file, "U8", (nbytes,), Span(source.url, file, 0, nbytes, "U8", file))
    _write_file(target, file, b"", [[whole]], None)


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


Make = Callable[[str], "torch.Tensor"]


def _write_file(storage: Storage, file: str, header: bytes, runs: list[list[OutTensor]], make: Make | None) -> None:
    """Write a header and runs of tensors, by copies on the server where they can be made."""
    with contextlib.ExitStack() as stack:
        readers = Readers(stack)
        copies = ServerCopies(storage)
        plan = plan_parts([Piece(len(header)), *(_piece(run, readers, copies) for run in runs)])
        if any(part.source for part in plan):
            try:
                with storage.create(file, plan) as out:
                    _write_content(out, storage, header, runs, make, readers, uploaded_ranges(plan))
            except Exception as error:
                if not copies.refused(error):
                    raise
            else:
                return
        with storage.create(file) as out:
            _write_content(out, storage, header, runs, make, readers, [(0, len(header) + _nbytes(runs))])


def _piece(run: list[OutTensor], readers: Readers, copies: ServerCopies) -> Piece:
    first, nbytes = run[0].source, _nbytes([run])
    if first is None or run[0].converted:
        return Piece(nbytes)
    return Piece(nbytes, copies.source(readers.storage(first), first.file, first.offset, nbytes))


def _nbytes(runs: Sequence[list[OutTensor]]) -> int:
    return sum(tensor.nbytes for run in runs for tensor in run)


def _write_content(
    out: IO[bytes],
    storage: Storage,
    header: bytes,
    runs: list[list[OutTensor]],
    make: Make | None,
    readers: Readers,
    wanted: list[tuple[int, int]],
) -> None:
    """wanted: the ranges [start, end) of the file that are written here; the others the server copies."""
    out.write(header)
    position = len(header)
    for run in runs:
        end = position + _nbytes([run])
        if make is not None and run[0].source is None:
            for tensor in run:
                _write_made(out, tensor, make(tensor.name))
        else:
            within = [
                (max(a, position) - position, min(b, end) - position) for a, b in wanted if a < end > position < b
            ]
            write_run(out, storage, run, readers, within)
        position = end


def _write_made(out: IO[bytes], planned: OutTensor, tensor: torch.Tensor, hint: str = "") -> None:
    import torch

    assert planned.shape == tuple(tensor.shape), (planned, tensor.shape)
    rows = tensor.detach() if tensor.ndim else tensor.detach().reshape(1)
    at_once = max(_CONVERTED // max(planned.nbytes // max(len(rows), 1), 1), 1)
    for start in range(0, len(rows), at_once):
        narrow = rows[start : start + at_once].to("cpu", getattr(torch, ELEMENT_NAMES[planned.dtype])).contiguous()
        if not torch.isfinite(narrow).all():
            raise UserError(f"the new tensor {planned.name} holds NaN or Inf in {ELEMENT_NAMES[planned.dtype]}{hint}")
        out.write(narrow.view(-1).view(torch.uint8).numpy().data)


def _runs(tensors: tuple[OutTensor, ...]) -> Iterator[list[OutTensor]]:
    """Group neighbours of one dtype whose bytes are neighbours in their source too and need no conversion."""
    run: list[OutTensor] = []
    for tensor in tensors:
        for piece in tensor.parts or (tensor,):
            if run and not _continues(run[-1], piece):
                yield run
                run = []
            run.append(piece)
    if run:
        yield run


def _continues(before: OutTensor, after: OutTensor) -> bool:
    a, b = before.source, after.source
    if a is None or b is None:
        return a is b
    if before.converted or after.converted:
        return False
    return (a.url, a.file, a.offset + a.nbytes, a.dtype, a.check) == (b.url, b.file, b.offset, b.dtype, b.check)
