"""Copies within S3 that the server makes: whether they can be made, and of what.

Both ends must be reached through the same client (the same endpoint, the same credentials). Whether the server then
makes copies of ranges, and whether it may from this bucket to that one, is only known by asking: a refusal is
remembered for the life of the process, and everything goes through this machine instead.
"""

from __future__ import annotations

import logging

from lesa_ray.checkpoint.part_plan import Source
from lesa_ray.checkpoint.s3_upload import CopyRefused, http_status
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError

_LOG = logging.getLogger(__name__)
_NOT_REFUSALS = frozenset({408, 429})
"""Request Timeout and Too Many Requests: the server is busy, which says nothing about what it can."""
_Pair = tuple[str, str, str]
_refused: set[_Pair] = set()


class ServerCopies:
    """What the server can copy into one folder."""

    def __init__(self, target: Storage) -> None:
        self._target = target
        self._sources: dict[tuple[str, str], tuple[Source, int]] = {}
        self._pairs: set[_Pair] = set()

    def source(self, storage: Storage, file: str, offset: int, nbytes: int) -> Source | None:
        """Where the server can copy these bytes from; None if it cannot. One request a file.

        Raises: UserError if the file ends before them.
        """
        if not (storage.is_s3 and self._target.is_s3):
            return None
        fs = storage.fs
        if fs.storage_options != self._target.fs.storage_options or getattr(fs, "fixed_upload_size", False):
            return None
        bucket, key, _ = fs.split_path(storage.path(file))
        pair = (str(fs.s3.meta.endpoint_url), bucket, self._target.fs.split_path(self._target.root)[0])
        if pair in _refused:
            return None
        if (bucket, key) not in self._sources:
            info = storage.info(file)
            self._sources[bucket, key] = Source(bucket, key, str(info["ETag"]), 0), int(info["size"])
        start, size = self._sources[bucket, key]
        if size < offset + nbytes:
            raise UserError(f"{storage.url}/{file}: ends before its header says; it changed during the run")
        self._pairs.add(pair)
        return start.after(offset)

    def refused(self, error: Exception) -> bool:
        """Whether an error means that the server makes no such copies. If so it is not asked again."""
        status = http_status(error)
        denied = status == 501 or (400 <= status < 500 and status not in _NOT_REFUSALS)
        if denied or isinstance(error, CopyRefused):
            _LOG.debug("no server-side copies into %s: %s", self._target.url, error)
            _refused.update(self._pairs)
            return True
        return False
