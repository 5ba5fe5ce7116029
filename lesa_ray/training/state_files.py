"""The files of PyTorch's distributed checkpoint (DCP), through this project's own door to storage.

Decides
- PyTorch plans who writes and reads what, and encodes it; `Storage` moves the bytes. So a file appears whole or not at
  all, a store that refuses now and then is asked again, and one that is away is a MachineError. PyTorch's own fsspec
  classes publish what was written before a fault, rename by copying, and sync all disks of the machine for an object.
- A shard is fetched whole, exactly its bytes, a long one in pieces side by side: unpacking it in place would seek, and
  each seek be a request. The next shards are fetched by threads meanwhile, up to eight or 128 MiB; only the thread that
  asked unpacks them and fills tensors, for a planner of PyTorch's need not bear more.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from lesa_ray.checkpoint.ranges import read_into, side_by_side
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError
from lesa_ray.training.state_metadata import parse_metadata

METADATA_FILE = ".metadata"


class StateReader(FileSystemReader):
    """Reads the checkpoint in a folder of any storage."""

    def __init__(self, storage: Storage) -> None:
        super().__init__("")
        self.fs: Any = _Files(storage)
        self.path: Any = ""
        self._storage = storage
        self._coming: Iterator[tuple[Any, IO[bytes]]] = iter(())

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As PyTorch's, without what a pickle could do. Raises: as `parse_metadata`; FileNotFoundError."""
        if kwargs.get("rank") is not None:
            raise FileNotFoundError("no worker has metadata of its own")
        metadata = parse_metadata(self._storage.read(METADATA_FILE))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As PyTorch's, which asks for shards (`_slice_file`) file by file; they are fetched in that order."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            shard = self.storage_data[item.storage_index]
            by_file.setdefault(shard.relative_path, []).append(shard)
        fetches = (
            (shard.length, functools.partial(self._fetch, shard)) for shards in by_file.values() for shard in shards
        )
        with closing(side_by_side(fetches)) as self._coming:
            return super().read_data(plan, planner)

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        shard, content = next(self._coming)
        assert shard == sinfo, "PyTorch reads shards in another order than it plans them"
        return content

    def _fetch(self, shard: Any) -> tuple[Any, IO[bytes]]:
        content = io.BytesIO(bytes(shard.length))
        try:
            with content.getbuffer() as view:
                read_into(self._storage, shard.relative_path, shard.offset, view)
        except UserError as error:  # PyTorch's own words for a file that is not whole
            raise EOFError(str(error)) from error
        return shard, content


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
            yield io.BytesIO()  # what lies in files `StateReader` reads
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
