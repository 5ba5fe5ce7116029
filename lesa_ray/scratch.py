"""Scratch space on this machine's own disk: where it lies, and folders there that do not outlive who made them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRATCH_VARIABLE = "LESA_RAY_SCRATCH"
_LOCK = "in-use.lock"


def scratch_dir() -> str:
    """The folder for what fits in no memory and for copies: LESA_RAY_SCRATCH, else that for temporary files. Each
    machine has its own; it is no part of a run's settings."""
    return os.environ.get(SCRATCH_VARIABLE, tempfile.gettempdir())


@contextmanager
def held_folder(prefix: str) -> Iterator[str]:
    """A folder in scratch, named `prefix` and more, which goes when the block ends.

    This process holds it by a lock on a file in it: the kernel lets go of that however the process ends. Folders of the
    prefix that nobody holds any more are removed first."""
    parent = scratch_dir()
    os.makedirs(parent, exist_ok=True)
    for left in Path(parent).glob(f"{prefix}*"):
        with contextlib.suppress(OSError), open(left / _LOCK, "rb+") as file:  # held, gone by now, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as folder,
        tempfile.NamedTemporaryFile(dir=folder, delete=False) as file,
    ):
        fcntl.flock(file, fcntl.LOCK_EX)
        os.rename(file.name, os.path.join(folder, _LOCK))  # locked before it has the name that others look for
        yield folder
