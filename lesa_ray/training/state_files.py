"""The files of PyTorch's distributed checkpoint (DCP), through this project's own door to storage.

Decides
- PyTorch plans who writes and reads what, and encodes it; `Storage` moves the bytes. So a file appears whole or not at
  all, a store that refuses now and then is asked again, and one that is away is a MachineError. PyTorch's own fsspec
  classes publish what was written before a fault, rename by copying, and sync all disks of the machine for an object.
- A shard is fetched whole, exactly its bytes, a long one in pieces side by side: unpacking it in place would seek, and
  each seek be a request.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter

from lesa_ray.checkpoint.ranges import read_into
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError

METADATA_FILE = ".metadata"


class StateReader(FileSystemReader):
    """Reads the checkpoint in a folder of any storage."""

    def __init__(self, storage: Storage) -> None:
        super().__init__("")
        self.fs: Any = _Files(storage)
        self.path: Any = ""

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        shard = io.BytesIO(bytes(sinfo.length))
        try:
            with shard.getbuffer() as view:
                read_into(file.storage, file.name, sinfo.offset, view)
        except UserError as error:  # PyTorch's own words for a file that is not whole
            raise EOFError(str(error)) from error
        return shard


class StateWriter(FileSystemWriter):
    """Writes a checkpoint into a folder of any storage."""

    def __init__(self, storage: Storage) -> None:
        super().__init__("", sync_files=False)  # `Storage` does
        self.fs: Any = _Files(storage)
        self.path: Any = ""


class _Files(FileSystemBase):
    """What PyTorch asks of a filesystem. Paths are names in the folder."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode == "rb":
            yield _Stored(self._storage, str(path))
            return
        with self._storage.create(_final(path)) as file:
            yield _Unclosed(file)

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{path}/{suffix}" if path else suffix

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Nothing: it was written under its last name, where it appeared whole."""
        assert _final(path) == new_path, (path, new_path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Nothing: a file makes its folder."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """No: a checkpoint is written into a folder that was emptied, and its metadata last."""
        return False

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        raise NotImplementedError("nothing is replaced")


def _final(path: str | os.PathLike[str]) -> str:
    """PyTorch writes `.metadata.tmp` and renames it."""
    return str(path).removesuffix(".tmp")


class _Stored(io.BytesIO):
    """A file at its storage. Read as a file it is fetched whole (the metadata); shards are ranges of it."""

    def __init__(self, storage: Storage, name: str) -> None:
        super().__init__(storage.read(name) if name == METADATA_FILE else b"")
        self.storage, self.name = storage, name


class _Unclosed(io.RawIOBase):
    """A new file, which PyTorch closes and `Storage` then publishes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None: ...
