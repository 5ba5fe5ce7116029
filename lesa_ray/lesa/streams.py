"""What flows into the core: checked layers, one at a time and the next one read ahead, and one seed per purpose.

Layers arrive from a callable, so that a unit of work never holds all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lesa_ray.errors import UserError
from lesa_ray.lesa.clock import Clock

BLOCK_ROWS = 2048
Load = Callable[[int], Tensor]
"""Layer number → its weight (d1, d2), any float dtype, on the CPU. Called several times per layer."""


def only(load: Load, layers: Sequence[int]) -> Load:
    """Those layers alone, numbered anew from 0."""
    return lambda at: load(layers[at])


def seed_for(seed: int, *purpose: object) -> int:
    """A seed of its own for each use of randomness, so that one use never shifts the numbers of another."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose; the global random state is neither read nor changed."""
    return torch.Generator().manual_seed(seed_for(seed, *purpose))


def square_norm(weight: Tensor) -> float:
    """‖W‖²_F of (d1, d2): rows in float32 (float64 if the weights are), their sum in float64, good to 1e-7."""
    dtype = working_dtype(weight.dtype)  # to which torch converts what it is given, before it sums
    norms = [torch.linalg.vector_norm(weight[rows], dim=1, dtype=dtype) for rows in row_blocks(len(weight))]
    return float(torch.cat(norms).double().square().sum())


class Layers:
    """The layers of some checkpoints, checked and streamed to the compute device, the next one read ahead.

    Iterating loads them again; nothing is kept. At most three layers are alive: the one in use, the next, and the one
    that the reader holds while it is moved. Each layer's ‖W‖²_F is noted when it first comes by.

    Raises, while it is read: UserError for a layer that is not a float matrix of the same shape as the others
    or holds NaN or Inf. The line names the layer; who knows the tensor's name wraps `load`.
    """

    def __init__(self, loads: Sequence[Load], count: int, device: str = "cpu", clock: Clock | None = None) -> None:
        self.count, self.device = count, torch.device(device)
        self._loads, self._clock = loads, clock or Clock()
        cuda = self.device.type == "cuda"
        self._copies = torch.cuda.Stream(self.device) if cuda else None  # type: ignore[no-untyped-call]
        self.squares = torch.full((len(loads), count), math.nan, dtype=torch.float64)
        """‖W‖²_F of each layer, (checkpoints, layers); NaN before it was read."""
        first = loads[0](0)
        if first.ndim != 2 or not first.is_floating_point():
            raise UserError(f"layer 0: expected a float matrix, found {first.dtype} of shape {tuple(first.shape)}")
        self.shape: tuple[int, int] = (first.shape[0], first.shape[1])
        self.dtype = first.dtype

    @property
    def columns(self) -> int:
        """Columns of one checkpoint's concatenation."""
        return self.count * self.shape[1]

    def stream(self, checkpoints: range | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """(checkpoint, layer, weight on the device) in order; all checkpoints by default."""
        wanted = [(c, i) for c in checkpoints or range(len(self._loads)) for i in range(self.count)]
        with ThreadPoolExecutor(1, "layers") as reader:
            coming = reader.submit(self._fetch, *wanted[0])
            for at, (c, i) in enumerate(wanted):
                with self._clock.phase("load"):
                    weight = coming.result()
                if at + 1 < len(wanted):
                    coming = reader.submit(self._fetch, *wanted[at + 1])
                else:
                    del coming
                yield c, i, weight
                del weight

    def _fetch(self, checkpoint: int, layer: int) -> Tensor:
        """Runs in the reader's thread; on a GPU the copy has a stream of its own, beside the products."""
        weight = self._loads[checkpoint](layer)
        if tuple(weight.shape) != self.shape or weight.dtype != self.dtype:
            found = f"{weight.dtype} of shape {tuple(weight.shape)}"
            raise UserError(f"layer {layer}: found {found}, expected {self.dtype} of shape {self.shape}")
        if self._copies is None:
            self._look_at(checkpoint, layer, weight)
            return weight
        with torch.cuda.stream(self._copies):
            weight = weight.to(self.device)
            self._look_at(checkpoint, layer, weight)
        self._copies.synchronize()
        weight.record_stream(torch.cuda.default_stream(self.device))  # its memory was taken here and is used there
        return weight

    def _look_at(self, checkpoint: int, layer: int, weight: Tensor) -> None:
        if not math.isnan(float(self.squares[checkpoint, layer])):
            return
        square = square_norm(weight)
        if not math.isfinite(square):  # one pass, no mask; above 1e18 a float32 cannot hold the squares
            raise UserError(f"layer {layer}: holds NaN or Inf or entries above 1e18; the weights must be finite")
        self.squares[checkpoint, layer] = square


def row_blocks(rows: int) -> Iterator[slice]:
    """Rows at a time, so that what is computed of a large matrix takes little memory beside it."""
    for start in range(0, rows, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, rows))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Coefficients are float32, or float64 where the weights are."""
    return torch.float64 if dtype == torch.float64 else torch.float32
