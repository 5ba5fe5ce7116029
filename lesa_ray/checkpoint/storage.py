"""One door to storage: a local folder, `s3://…`, `hf://…` or any other fsspec URL.

Everything the tool reads or writes lies in a folder of some storage, so a `Storage` is a folder and names are relative
to it. Three promises hold on every backend: a file appears whole or not at all (local files are written beside their
place, synced and renamed; object stores publish an object when its upload completes); a listing is never served from
a cache, as other processes write here too; a store that still does not answer after the retries (503, time-outs) is a
MachineError, whatever its library calls it. Paths are `str`: `pathlib` collapses `s3://`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lesa_ray.checkpoint.part_plan import UPLOADED, Part
from lesa_ray.checkpoint.s3_upload import S3Upload
from lesa_ray.errors import UserError
from lesa_ray.faults import reaching, unanswered

WORK_DIR = ".lesa-ray"
"""Folder inside OUT that holds unfinished work; it goes when the result is complete."""

_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "hf"})
"""Where an object is seen only when its upload completes; elsewhere a file is written beside its place and moved."""
_PROBE = ".lesa-ray.tmp"
ON_THE_HUB = "is it a folder, is the network up, and may you read it (`hf auth login`)?"
"""What to do where a repository of the hub cannot be read: its name may also be a folder's, mistyped."""
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?$")


def resolve_base(base: str, where: str = "") -> str:
    """Turn BASE into a URL: an existing local folder wins, then a URL as it is, then a Hugging Face repo id.

    where: what messages call it, if not `BASE …`. Raises: UserError if it is none of these.
    """
    where = where or f"BASE {base}"
    if "://" in base:
        return base
    local = os.path.expanduser(base)
    if os.path.isdir(local):
        return os.path.abspath(local)
    if os.path.exists(local):
        raise UserError(f"{where}: is a file; give the folder that holds config.json and the weights")
    if _HUB_ID.match(base):
        return f"hf://{base}"
    raise UserError(f"{where}: no such folder; give a folder, a Hugging Face repo id or a URL such as s3://…")


class Storage:
    """A folder on any filesystem. Picklable by its URL, so tasks can carry it to other machines."""

    def __init__(self, url: str) -> None:
        """url: a local path or an fsspec URL. Raises: UserError if no filesystem is installed for it, or an object
        store's has an empty name in it."""
        local = "://" not in url
        _check_names(url)
        self.url = os.path.abspath(os.path.expanduser(url)) if local else url.rstrip("/")
        try:
            self.fs, root = filesystem(self.url)
        except (ValueError, ImportError) as error:
            raise UserError(f"{url}: {error}") from error
        self.root: str = root.rstrip("/")
        self.is_local: bool = "file" in protocols(self.fs)
        self.is_s3: bool = "s3" in protocols(self.fs)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.url,)

    def path(self, name: str = "") -> str:
        """The filesystem's own path of a file in this folder."""
        return f"{self.root}/{name}" if name else self.root

    def list(self) -> dict[str, int]:
        """Names of the files directly in this folder and their sizes in bytes; empty if there is no such folder.

        Raises: UserError, as `folders`, if it is a file."""
        return {name: int(entry["size"] or 0) for name, entry in self._entries("file")}

    def folders(self) -> tuple[str, ...]:
        """Names of the folders directly in this folder, sorted; none if there is no such folder."""
        return tuple(sorted(name for name, _ in self._entries("directory")))

    def _entries(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            fresh = {} if self.is_local else {"refresh": True}
            with self._answering():
                entries = self.fs.ls(self.root, detail=True, **fresh)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise UserError(f"{self.url}: is a file; give a folder") from None
        for entry in entries:
            path = entry["name"].rstrip("/")
            if self.is_local and path == self.root:  # listed as what is in it
                raise UserError(f"{self.url}: is a file; give a folder")
            if entry.get("islink"):  # as all files are in the snapshots of the hub's cache
                try:
                    entry = self.fs.info(path)
                except OSError:  # it leads nowhere, or into a circle
                    continue
            if entry["type"] == kind and path != self.root:
                yield path.rsplit("/", 1)[-1], entry

    def within(self, name: str) -> Storage:
        """A folder below this one."""
        return Storage(f"{self.url}/{name}")

    def is_empty(self) -> bool:
        """Whether nothing at all, folders included, lies here."""
        try:
            with self._answering():
                return not [e for e in self.fs.ls(self.root, detail=False) if e.rstrip("/") != self.root]
        except FileNotFoundError:
            return True

    def exists(self, name: str = "") -> bool:
        with self._answering():
            return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int | None:
        """Bytes in a file, or None if it is not there."""
        try:
            with self._answering():
                return int(self.fs.info(self.path(name))["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file; the whole file by default."""
        if self.is_local:
            with open(self.path(name), "rb") as file:
                file.seek(start)
                return file.read(-1 if end is None else end - start)
        try:
            with self._answering():
                data: bytes = self.fs.cat_file(self.path(name), start=start, end=end)
        except OSError as error:
            if error.errno == errno.EINVAL and (self.size(name) or 0) <= start:
                return b""  # S3 calls it wrong to ask for a range of nothing
            raise
        return data

    def info(self, name: str) -> dict[str, Any]:
        """What the filesystem says of a file, in its own words. Raises: FileNotFoundError if it is not there."""
        with self._answering():
            info: dict[str, Any] = self.fs.info(self.path(name))
        return info

    def etag(self, name: str) -> str | None:
        """What the object store says identifies this content (ETag or the hub's blob id), if it says anything."""
        info = self.info(name)
        tag = info.get("ETag") or info.get("blob_id") or info.get("etag")
        return str(tag).strip('"') if tag else None

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; it appears whole or not at all."""
        with self.create(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def create(self, name: str, plan: Sequence[Part] | None = None) -> Iterator[IO[bytes]]:
        """Open a new file for writing. It takes its name when the block ends well; otherwise it never existed.

        plan (S3 only): the parts of the file; the block writes those that the server does not copy, in order.
        """
        target = self.path(name)
        folder, _, last = target.rpartition("/")
        temporary = f"{folder}/.{last}.{uuid.uuid4().hex[:8]}.tmp"
        if self.is_local:
            os.makedirs(folder, exist_ok=True)
            try:
                with open(temporary, "wb") as local_file:
                    yield local_file
                    local_file.flush()
                    os.fsync(local_file.fileno())
                os.replace(temporary, target)
            except BaseException as error:
                if isinstance(error, OSError) and error.filename is None:  # of a disk that is full or broken
                    error.filename = target
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
            return
        with self._answering():
            if self.is_s3:
                upload = S3Upload(self.fs, target, plan)
                try:
                    yield cast(IO[bytes], upload)
                    upload.finish()
                except BaseException:
                    with contextlib.suppress(Exception):  # what stopped it is what matters
                        upload.abort()
                    raise
                return
            if _OBJECT_STORES.intersection(protocols(self.fs)):
                file = self.fs.open(target, "wb", block_size=UPLOADED)
                try:
                    yield file
                except BaseException:
                    with contextlib.suppress(Exception):  # the upload's parts; what stopped it is what matters
                        file.discard()
                    file.closed = True  # close() would publish the part written so far
                    raise
                file.close()
                return
            try:
                with self.fs.open(temporary, "wb") as file:
                    yield file
                self.fs.mv(temporary, target)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm_file(temporary)
                raise

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError), self._answering():
            self.fs.rm_file(self.path(name))

    def remove_tree(self, name: str = "") -> None:
        """Remove a folder below this one (or this one) with all that is in it, if it is there."""
        if self.is_local:
            shutil.rmtree(self.path(name), ignore_errors=True)
        elif self.exists(name):
            with self._answering():
                self.fs.rm(self.path(name), recursive=True)

    def remove_if_empty(self) -> None:
        """Remove this folder if nothing at all lies in it; a store has none that are empty."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self.root)

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half-written in this folder."""
        if self.is_local:
            for name in self.list():
                if name.startswith(".") and name.endswith(".tmp"):
                    self.remove(name)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Raises: MachineError in place of what a backend raises when its store does not answer."""
        try:
            yield
        except Exception as error:
            fault = None if self.is_local else unanswered(self.url, error)
            if fault is None:
                raise
            raise fault from error

    def free_bytes(self) -> int | None:
        """Free space in bytes where this folder is or will be; None where storage has no such bound."""
        return shutil.disk_usage(self._lowest()).free if self.is_local else None

    def try_writing(self) -> None:
        """Write a little here, or where this folder will be made, and leave nothing behind; so what would refuse the
        result of long work refuses before it. Raises: what the backend raises."""
        if self.is_local:
            with tempfile.TemporaryFile(dir=self._lowest()) as file:
                file.write(bytes(4096))  # a full disk makes empty files
                file.flush()
                os.fsync(file.fileno())
            return
        self.write(_PROBE, b"")
        with contextlib.suppress(Exception):  # who may write but not remove has a place for results, too
            self.remove(_PROBE)

    def _lowest(self) -> str:
        """The folder that is there, of this one and those above it."""
        folder = self.root
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        return folder


def filesystem(url: str) -> tuple[Any, str]:
    """The filesystem behind a local path or a URL, and its own path there; its listings are never cached.

    Raises: ValueError or ImportError if there is none for it."""
    if "://" not in url:  # fsspec would take a path with `::` for a chain of filesystems
        return LocalFileSystem(), LocalFileSystem._strip_protocol(url)
    fs, path = fsspec.url_to_fs(url, use_listings_cache=False, **filesystem_options(url))
    return fs, path


def filesystem_options(url: str) -> dict[str, Any]:
    """Options of the filesystem behind a URL.

    S3: some servers (rclone's among them) send the whole object's checksum with a range of it, which botocore would
    compare with the range and refuse; so checksums are compared only where the protocol requires them. Connections:
    reads ahead, parts uploaded and parts copied run side by side.
    """
    if url.split("://", 1)[0] not in ("s3", "s3a"):
        return {}
    return {
        "config_kwargs": {
            "response_checksum_validation": "when_required",
            "request_checksum_calculation": "when_required",
            "max_pool_connections": 32,
            "retries": {"mode": "standard", "max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", "6"))},
        }
    }


def split_place(place: str) -> tuple[Storage, str]:
    """The folder and the name of a file that is named by its whole path or URL."""
    _check_names(place)
    folder, _, name = place.rpartition("/")
    return Storage(folder or ("/" if place.startswith("/") else ".")), name


def _check_names(url: str) -> None:
    """Raises: UserError if a URL of an object store lacks a bucket, or has an empty name between two slashes, which
    the store's client lists under other names than it writes. A variable that is empty makes such."""
    scheme, _, path = url.partition("://")
    if path != url and scheme in _OBJECT_STORES:
        names = path.rstrip("/").split("/")
        if not names[0]:
            raise UserError(f"{url}: names no bucket; write {scheme}://BUCKET/…")
        if "" in names:
            whole = "/".join(filter(None, names))
            raise UserError(f"{url}: has an empty name between two slashes; write {scheme}://{whole}")


def read_file(place: str, where: str) -> bytes:
    """A small file, a path or a URL. where: what messages call it. Raises: UserError if it cannot be read;
    MachineError."""
    storage, name = split_place(place)
    of_local = {"hint": "give a file that you may read"} if storage.is_local else {}
    with reaching(where, **of_local):
        try:
            return storage.read(name)
        except (FileNotFoundError, NotADirectoryError) as error:
            if storage.is_local:
                raise UserError(f"{where}: there is no such file") from error
            raise


def protocols(fs: Any) -> tuple[str, ...]:
    """The names by which URLs call for a filesystem of fsspec's."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
