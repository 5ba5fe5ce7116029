"""Which files of data there are behind a name: a file, a folder, a pattern, on any storage.

Decides: a folder is searched to the bottom, linked ones too, for files of the kinds wanted, hidden ones left out; a
pattern (`*`, `?`, `[…]`) is one only where no file has it as its name, and a folder that it matches is searched, too;
the order is that of the paths.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lesa_ray.checkpoint.storage import filesystem, protocols
from lesa_ray.checkpoint.walking import file_info, matching_files, visible_files
from lesa_ray.errors import UserError
from lesa_ray.faults import reaching
from lesa_ray.places import named

_SIGNS = "*?["


def find_files(
    name: str, kinds: Sequence[str], where: str, unread: set[str] | None = None
) -> dict[str, dict[str, Any]]:
    """The files by their paths or URLs, each with what its filesystem says of it; none if there is nothing at `name`.

    kinds: how their names end. where: what messages call the place, `--data NAME`. unread: files of other kinds, but
    for hidden ones, are added to it.
    Raises: UserError if it cannot be listed, holds none of these kinds, or is a file of another; MachineError if its
    store does not answer.
    """
    try:
        fs, path = filesystem(name)
    except (ValueError, ImportError) as error:
        raise UserError(f"{where}: {error}") from error
    known, local = tuple(kinds), "file" in protocols(fs)
    with reaching(where, "cannot be listed"):
        if fs.isdir(path):
            listed = visible_files(fs, path, local=local)
        elif fs.exists(path):
            if not named(path).endswith(known):
                raise UserError(f"{where}: is of no kind that is read here ({', '.join(kinds)})")
            return {_name(fs, path, local): fs.info(path)}
        elif any(sign in path for sign in _SIGNS):
            listed = matching_files(fs, path, local=local)
        else:
            return {}
        found = {}
        for path in sorted(path for path in listed if path.endswith(known)):
            info = listed[path]
            if info is None or info.get("size") is None:  # a page that lists files over HTTP does not say
                info = file_info(fs, path, where)
            found[path] = info
    if not found:
        raise UserError(f"{where}: no data found; expected files that end with {', '.join(kinds)}")
    if unread is not None:
        unread.update(_name(fs, path, local) for path in listed if path not in found)
    return {_name(fs, path, local): info for path, info in found.items()}


def is_pattern(name: str) -> bool:
    """Whether a name stands for what matches it; not where a file or folder here is called so."""
    return any(sign in name for sign in _SIGNS) and ("://" in name or not os.path.exists(os.path.expanduser(name)))


def _name(fs: Any, path: str, local: bool) -> str:
    return path if local else str(fs.unstrip_protocol(path))
