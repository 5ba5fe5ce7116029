"""Find NaN and Inf in raw bytes, at the speed of memory, without torch.

In every IEEE type a value is NaN or Inf when all exponent bits are set. Shifted left by one bit, which drops the
sign, such a value is the largest there is: at least the exponent's mask. So the maximum of the shifted unsigned
integers tells, and NumPy computes it with vector instructions on chunks that stay in the cache (1.5 to 4 GB/s a core
measured, against about 1 GB/s for reading from a fast disk)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lesa_ray.checkpoint.ranges import read_full
from lesa_ray.errors import UserError

if TYPE_CHECKING:
    import torch

_BLOCK = 512 * 1024
_ELEMENTS = 2**18
_LARGEST: dict[str, tuple[Any, int]] = {  # dtype → (unsigned integer of its size, exponent mask shifted left by one)
    "BF16": (np.uint16, 0xFF00),
    "F16": (np.uint16, 0xF800),
    "F32": (np.uint32, 0xFF000000),
    "F64": (np.uint64, 0xFFE0000000000000),
}


def assert_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises: UserError naming the tensor if it holds NaN or Inf."""
    if tensor.is_floating_point() and not all_finite(tensor):
        raise UserError(f"BASE: tensor {name} holds NaN or Inf; repair or replace the checkpoint")


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor (contiguous, or it is copied) holds neither NaN nor Inf.

    Looked at in blocks: torch makes a copy and masks of what it looks at, which of a whole layer is more than that."""
    import torch

    values = tensor.reshape(-1)
    blocks = (values[start : start + _ELEMENTS] for start in range(0, len(values), _ELEMENTS))
    return all(bool(torch.isfinite(block).all()) for block in blocks)


@dataclass
class FiniteCheck:
    """Looks at the `nbytes` bytes of one tensor as they pass."""

    name: str
    dtype: str
    nbytes: int
    seen: int = 0

    @staticmethod
    def feed(checks: list[FiniteCheck], data: bytes | bytearray) -> None:
        """Hand the next bytes of consecutive tensors to their checks. Raises: UserError naming the first bad tensor."""
        view = memoryview(data)
        for check in checks:
            take = min(check.nbytes - check.seen, len(view))
            if take:
                check._look(view[:take])
                check.seen += take
                view = view[take:]
            if not view:
                return

    @staticmethod
    def feed_file(checks: list[FiniteCheck], descriptor: int, offset: int) -> None:
        """Read consecutive tensors from a local file and check them. Raises: UserError naming the first bad tensor."""
        buffer = bytearray(_BLOCK)
        for check in checks:
            if check.dtype in _LARGEST:
                done = 0
                while done < check.nbytes:
                    block = memoryview(buffer)[: min(_BLOCK, check.nbytes - done)]
                    if not read_full(descriptor, block, offset + done):
                        raise UserError(f"BASE: tensor {check.name} is cut off; somebody is changing the checkpoint")
                    check._look(block)
                    done += len(block)
            offset += check.nbytes

    def _look(self, data: Any) -> None:
        if self.dtype not in _LARGEST:
            return
        integer, mask = _LARGEST[self.dtype]
        for start in range(0, len(data), _BLOCK):
            part = data[start : start + _BLOCK]
            values = np.frombuffer(part, dtype=integer)
            if values.size and (values << integer(1)).max() >= mask:
                raise UserError(f"BASE: tensor {self.name} holds NaN or Inf; repair or replace the checkpoint")
