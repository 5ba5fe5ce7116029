"""The files of a folder, to the bottom: what `fsspec` finds, and behind links to folders too, which it leaves out.

Many a collection is put together of links. Each folder is looked at once, under its own name if it has one here; of
several links to one folder the first by name counts. A link that leads back up, out of the folder too, is left out:
what lies beside the data is none. Hidden files and folders are left out. Only local folders have links.
"""

from __future__ import annotations

import os
from typing import Any

from lesa_ray.errors import UserError


def visible_files(fs: Any, folder: str, ends: tuple[str, ...], where: str, *, local: bool) -> dict[str, dict[str, Any]]:
    """Path → what the filesystem says of the file, by path, of those whose names end so.

    fs: an fsspec filesystem. where: as messages call the folder. Raises: as `fs` does; UserError for a link that leads
    nowhere."""
    if local:
        return {path: _info(fs, path, where) for path in sorted(_local_files(folder)) if path.endswith(ends)}
    entries: dict[str, dict[str, Any]] = fs.find(folder, detail=True)
    below = len(folder.rstrip("/")) + 1
    return {path: entries[path] for path in sorted(entries) if path.endswith(ends) and not _hidden(path[below:])}


def _info(fs: Any, path: str, where: str) -> dict[str, Any]:
    try:
        info: dict[str, Any] = fs.info(path)
    except FileNotFoundError:
        raise UserError(f"{where}: {path} is a link that leads nowhere; mend or remove it") from None
    return info


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _holds(folder: str, below: str) -> bool:
    return below.startswith(f"{os.path.realpath(folder).rstrip('/')}/")


def _local_files(folder: str) -> list[str]:
    """Folders that lie here first, then those that links lead to, then those that links in these lead to."""
    files: list[str] = []
    seen: set[str] = set()
    waiting = [folder.rstrip("/") or "/"]
    above = f"{os.path.realpath(folder)}/"
    while waiting:
        links: list[str] = []
        for path in waiting:
            if os.path.realpath(path) in seen:
                continue
            for where, folders, names in os.walk(path):
                seen.add(os.path.realpath(where))
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                files += [os.path.join(where, name) for name in names if not name.startswith(".")]
                links += [
                    found
                    for name in folders
                    if os.path.islink(found := os.path.join(where, name)) and not _holds(found, above)
                ]
                folders[:] = [name for name in folders if os.path.realpath(os.path.join(where, name)) not in seen]
        waiting = sorted(links)
    return files
