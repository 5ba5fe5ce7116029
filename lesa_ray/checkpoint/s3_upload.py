"""One object written to S3 in parts, several of them on their way at once, through s3fs's own client.

s3fs writes a file's parts one after another, and reads and uploads take turns. Here up to four uploaded parts are in
flight while the next is filled, so memory is bounded by five parts of 16 MiB and what the event loop copies of them
(some 250 MB measured), and up to eight parts are copied by the server at the same time, of which no byte passes through
this machine. Credentials, endpoint and retries are s3fs's.

The object appears when the upload is completed. An upload that fails is aborted after its parts in flight have ended,
as S3 would keep (and bill) a part that arrives later.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import Future
from itertools import count
from typing import Any

from lesa_ray.checkpoint.part_plan import UPLOADED, Part, Source
from lesa_ray.errors import UserError

_UPLOADS_IN_FLIGHT = 4
_COPIES_IN_FLIGHT = 8


class CopyRefused(Exception):
    """The server answered a copy as if it had been something else."""


class S3Upload(io.BufferedIOBase):
    """A file to write to. Its bytes are uploaded in parts; parts that the plan copies take no bytes."""

    def __init__(self, fs: Any, path: str, plan: Iterable[Part] | None = None) -> None:
        """fs: an s3fs filesystem. plan: the object's parts, in order; without it the size may be anything up to 320 GB.

        With a plan `write` is to be given exactly the bytes of the parts that are not copied, in order.
        """
        self._fs = fs
        self._path = path
        bucket, key, _ = fs.split_path(path)
        self._object: dict[str, str] = {"Bucket": bucket, "Key": key}
        self._planned = plan is not None
        self._plan: Iterator[Part] = iter(plan) if plan is not None else _endless()
        self._next = next(self._plan, None)
        self._upload: dict[str, str] = {}
        self._buffer = bytearray()
        self._position = 0
        self._sent: list[Future[str]] = []
        self._failure: BaseException | None = None
        self._uploads = threading.Semaphore(_UPLOADS_IN_FLIGHT)
        self._copies = threading.Semaphore(_COPIES_IN_FLIGHT)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        """Bytes of the file so far, copied ones included."""
        return self._position

    def write(self, data: Any, /) -> int:
        """Take the next bytes; waits while enough parts are in flight. Raises: what an earlier part's upload did."""
        view = memoryview(data).cast("B")
        nbytes = len(view)
        while view:
            self._begin_copies()
            assert self._next is not None, "more bytes than the plan has"
            taken = view[: self._next.nbytes - len(self._buffer)]
            self._buffer += taken
            self._position += len(taken)
            view = view[len(taken) :]
            if len(self._buffer) == self._next.nbytes:
                self._send_buffer()
        self._begin_copies()
        return nbytes

    def finish(self) -> None:
        """Wait for all parts and publish the object. Raises: CopyRefused if the server copied something else."""
        self._begin_copies()
        if not self._upload and not self._planned:
            self._fs.call_s3("put_object", **self._object, Body=self._buffer)
        else:
            if self._buffer and not self._planned:
                self._send_buffer()
            assert not self._buffer, "fewer bytes than the plan has"
            parts = [{"PartNumber": n, "ETag": future.result()} for n, future in enumerate(self._sent, start=1)]
            self._fs.call_s3("complete_multipart_upload", **self._upload, MultipartUpload={"Parts": parts})
        self._fs.invalidate_cache(self._path)
        if self._planned and (size := self._fs.info(self._path)["size"]) != self._position:
            self._fs.rm_file(self._path)
            raise CopyRefused(f"the object became {size} bytes, not {self._position}")

    def abort(self) -> None:
        """Leave nothing behind: wait for the parts in flight, then remove them."""
        for future in self._sent:
            with contextlib.suppress(Exception):
                future.result()
        if self._upload:
            self._fs.call_s3("abort_multipart_upload", **self._upload)

    def _begin_copies(self) -> None:
        while self._next is not None and self._next.source is not None:
            self._position += self._next.nbytes
            self._send(self._copies, self._copy_part(len(self._sent) + 1, self._next.source, self._next.nbytes))
            self._next = next(self._plan, None)

    def _send_buffer(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        self._send(self._uploads, self._upload_part(len(self._sent) + 1, data))
        self._next = next(self._plan, None)

    def _send(self, room: threading.Semaphore, part: Coroutine[Any, Any, str]) -> None:
        def landed(future: Future[str]) -> None:
            self._failure = self._failure or future.exception()
            room.release()

        try:
            if not self._upload:
                answer = self._fs.call_s3("create_multipart_upload", **self._object)
                self._upload = {**self._object, "UploadId": answer["UploadId"]}
            room.acquire()
            if self._failure:
                raise self._failure
        except BaseException:
            part.close()
            raise
        future = asyncio.run_coroutine_threadsafe(part, self._fs.loop)
        future.add_done_callback(landed)
        self._sent.append(future)

    async def _upload_part(self, number: int, data: bytearray) -> str:
        answer = await self._fs._call_s3("upload_part", **self._upload, PartNumber=number, Body=data)
        etag: str = answer["ETag"]
        return etag

    async def _copy_part(self, number: int, source: Source, nbytes: int) -> str:
        try:
            answer = await self._fs._call_s3(
                "upload_part_copy",
                **self._upload,
                PartNumber=number,
                CopySource={"Bucket": source.bucket, "Key": source.key},
                CopySourceRange=f"bytes={source.offset}-{source.offset + nbytes - 1}",
                CopySourceIfMatch=source.etag,
            )
        except OSError as error:
            if http_status(error) == 412:
                name = source.key.rsplit("/", 1)[-1]
                raise UserError(f"{name} in s3://{source.bucket} changed while it was copied; start again") from error
            raise
        # A server that does not know the operation (rclone's) takes it for the upload of an empty part.
        etag: str | None = (answer.get("CopyPartResult") or {}).get("ETag")
        if etag is None:
            raise CopyRefused("the server took the copy for an upload of nothing")
        return etag


def http_status(error: BaseException) -> int:
    """The status that S3 answered with, behind an error that s3fs translated; 0 if it did not come from an answer."""
    response = getattr(error.__cause__, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def _endless() -> Iterator[Part]:
    """Parts for a file of unknown size: they double twice on the way to the 10,000th, which ends at 320 GB."""
    position = 0
    for number in count():
        nbytes = UPLOADED * 2 ** (number // 4000)
        yield Part(position, position + nbytes)
        position += nbytes
