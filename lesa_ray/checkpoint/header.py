"""The header of a safetensors file: what tensors are in it, of what type and shape, and where their bytes lie.

The format: 8 bytes little-endian header length, a JSON header, the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from lesa_ray.checkpoint.names import item_name
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError, first_line

FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Element sizes in bytes of the float types that weights may have."""
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ELEMENT_NAMES = {**TORCH_NAMES, "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
                 "BOOL": "bool"}  # fmt: skip
"""The float types, and those that buffers may have beside them."""
ELEMENT_BYTES = {**FLOAT_BYTES, "C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
                 "BOOL": 1}  # fmt: skip
"""Element sizes in bytes of what a tensor may be of. Others are of a byte (float8) or less, quantised weights."""
FORMAT_NAMES = {name: key for key, name in TORCH_NAMES.items()}

_FIRST_READ = 128 * 1024
_MAX_HEADER = 100 * 2**20  # the format's own bound


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes at `offset` (from the start) of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_BYTES

    def item(self, index: int) -> TensorEntry:
        """What lies at `index` of the first axis."""
        nbytes = self.nbytes // self.shape[0]
        name, offset = item_name(self.name, index), self.offset + index * nbytes
        return TensorEntry(name, self.dtype, self.shape[1:], self.file, offset, nbytes)


def read_entries(storage: Storage, file: str) -> list[TensorEntry]:
    """The tensors of one safetensors file, in the order of their bytes. Raises: UserError if it is damaged."""
    return read_header(storage.url, storage, file, storage.size(file) or 0)


def raw_header(storage: Storage, file: str, size: int) -> bytes:
    """The header's JSON bytes. Raises: ValueError if the file cannot hold one."""
    head = storage.read(file, 0, min(size, _FIRST_READ))
    if len(head) < 8:
        raise ValueError(f"has {size} bytes")
    length = int.from_bytes(head[:8], "little")
    if length > _MAX_HEADER or 8 + length > size:
        raise ValueError(f"says its header has {length} bytes, the file has {size}")
    return head[8 : 8 + length] if 8 + length <= len(head) else storage.read(file, 8, 8 + length)


def read_header(where: str, storage: Storage, file: str, size: int) -> list[TensorEntry]:
    try:
        raw = raw_header(storage, file, size)
        header = json.loads(raw.decode())
        header.pop("__metadata__", None)
        data = 8 + len(raw)
        entries = [_entry(name, item, file, data) for name, item in header.items()]
        entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
        _check_without_gaps(entries, data)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{where}: {file}: is not a whole safetensors file ({first_line(error)}); download it again"
        ) from error
    end = entries[-1].offset + entries[-1].nbytes if entries else data
    if end != size:
        raise UserError(
            f"{where}: {file}: is truncated or damaged ({size} bytes, its header needs {end}); download it again"
        )
    for entry in entries:
        size_of_one = ELEMENT_BYTES.get(entry.dtype)
        if size_of_one is not None and entry.elements * size_of_one != entry.nbytes:
            raise UserError(
                f"{where}: {file}: tensor {entry.name} has {entry.nbytes} bytes, not those of {entry.shape}"
            )
    return entries


def _entry(name: str, item: Any, file: str, data: int) -> TensorEntry:
    """One tensor of a header; `data`: where the tensors' bytes begin. Raises: ValueError, LookupError or TypeError if
    it says what no tensor can be."""
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    name.encode()  # half a surrogate pair, which JSON can spell, could not be written again
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"tensor {name}: its dtype, shape or data_offsets is of the wrong kind")
    for number in (*shape, *offsets):
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"tensor {name}: {number!r} in its shape or data_offsets")
    return TensorEntry(name, dtype, tuple(shape), file, data + offsets[0], offsets[1] - offsets[0])


def _check_without_gaps(entries: list[TensorEntry], data: int) -> None:
    """Raises: ValueError if tensors, by the order of their bytes, leave some out or share some. The library refuses
    both: there bytes could be hidden."""
    end = data
    for entry in entries:
        if entry.offset != end or entry.nbytes < 0:
            raise ValueError(f"tensor {entry.name} is at byte {entry.offset}, where {end} comes next")
        end += entry.nbytes
