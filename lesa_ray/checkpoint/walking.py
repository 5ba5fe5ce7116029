"""The files of a folder or pattern, to the bottom: what `fsspec` finds, and behind links to folders too, which it
leaves out.

Many a collection is put together of links. Each folder is looked at once, under its own name if it has one here; of
several links to one folder the first by name counts. A link that leads back up, out of the folder too, is left out:
what lies beside the data is none. Hidden files and folders are left out. Only local folders have links.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from lesa_ray.errors import UserError


def visible_files(fs: Any, folder: str, *, local: bool) -> dict[str, dict[str, Any] | None]:
    """Path → what the filesystem said of the file when it listed it; None of a local one, which has not been asked.

    fs: an fsspec filesystem. Raises: as `fs` does."""
    if local:
        return dict.fromkeys(_local_files(folder))
    entries: dict[str, dict[str, Any] | None] = fs.find(folder, detail=True)
    below = len(folder.rstrip("/")) + 1
    return {path: entry for path, entry in entries.items() if not _hidden(path[below:])}


def matching_files(fs: Any, pattern: str, *, local: bool) -> dict[str, dict[str, Any] | None]:
    """The same of what a pattern (`*`, `?`, `[…]`) stands for: files, and folders to the bottom. Hidden ones are left
    out here too, unless the pattern itself names one."""
    entries = fs.glob(pattern, detail=True)  # with the details, or each file is asked for on its own
    below = pattern.rfind("/", 0, min(pattern.index(sign) for sign in "*?[" if sign in pattern)) + 1
    hidden_too = _hidden(pattern[below:])
    files: dict[str, dict[str, Any] | None] = {}
    folders: set[str] = set()
    for path in sorted(path.rstrip("/") for path in entries):  # a folder before what is in it
        if (not hidden_too and _hidden(path[below:])) or (folders and any(one in folders for one in above(path))):
            continue
        if os.path.isdir(path) if local else entries.get(path, {}).get("type") != "file":
            folders.add(path)
            files |= visible_files(fs, path, local=local)
        else:
            files[path] = None if local else entries[path]
    return files


def file_info(fs: Any, path: str, where: str) -> dict[str, Any]:
    """What the filesystem says of a file. where: as messages call the place. Raises: UserError for a link that leads
    nowhere."""
    try:
        info: dict[str, Any] = fs.info(path)
    except FileNotFoundError:
        raise UserError(f"{where}: {path} is a link that leads nowhere; mend or remove it") from None
    return info


def above(path: str) -> Iterator[str]:
    """The folders that a path lies in, the innermost first."""
    while path := path.rpartition("/")[0]:
        yield path


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
