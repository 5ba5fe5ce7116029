"""Room on the disk for what is to be written, looked for before the work."""

from __future__ import annotations

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError
from lesa_ray.sizes import size

MARGIN = 64 * 2**20
"""Bytes to ask for beside: small files, and what the file system itself takes."""


def check_free(out: str, needed: int, *, held: int = 0, use: str = "", hint: str = "") -> None:
    """Raises: MachineError if OUT is on a local disk with fewer bytes free.

    held: bytes there that count as free. use, hint: said after the bytes, and at the end."""
    free = Storage(out).free_bytes()
    if free is not None and free + held < needed:
        raise MachineError(f"OUT {out}: needs {size(needed)}{use}, the disk has {size(free + held)} free{hint}")
