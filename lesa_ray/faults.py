"""Faults: what storage and machines raise, told apart from wrong requests and from errors of the program.

Every backend has classes of its own for a store that is away, a bucket that is not there and a key that may not be
used; here are the questions that the tool asks of them.
"""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

from lesa_ray.errors import MachineError, UserError
from lesa_ray.places import shown

_STORAGE_MODULES = frozenset(
    {"botocore", "aiobotocore", "aiohttp", "huggingface_hub", "fsspec", "s3fs", "httpx", "httpx2", "requests"}
    | {"gcsfs", "google.auth", "google.api_core", "adlfs", "azure"}
)
_OUTAGE_ERRNOS = frozenset({errno.EBUSY, errno.EREMOTEIO, errno.ETIMEDOUT})
"""As s3fs translates 503 SlowDown, 500 InternalError and RequestTimeout."""
_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE})
"""A disk that is full, broken or away."""
_LOST = frozenset(
    {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ClientConnectionError", "ClientPayloadError"}
)
"""What botocore and aiohttp call a connection that is refused, lost, or cut off in the middle of an answer."""
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})
"""What S3 and STS call credentials of a session that is over."""
_LOCKED = re.compile("object ?lock", re.IGNORECASE)
"""In what S3, or a server like it, answers where a bucket keeps its objects for some time: uploads want checksums."""
_PLACES = ("BASE ", "DATA ", "OUT ")
_GOES_ON = "; the same command goes on from here"
_SKEW_SECONDS = 14 * 60
"""S3 refuses what was signed by a clock that is a quarter of an hour off."""


def is_outage(error: BaseException) -> bool:
    """Whether a backend's error says that the store is away or overloaded, not that the request was wrong."""
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in _OUTAGE_ERRNOS:
        return True
    for kind in type(error).__mro__:
        if kind.__name__ in _LOST and kind.__module__.split(".")[0] in ("botocore", "aiohttp"):
            return True
    # the hub's client says of a 503 that a file is not in its cache, because of the 503
    statuses = _status(error), _status(error.__cause__)
    return any(status == 429 or (status >= 500 and status != 501) for status in statuses)  # 501: it cannot do that


def unanswered(where: str, error: BaseException) -> MachineError | None:
    """The fault that a backend's error tells of where the store at `where` is away, or does not take this machine's
    clock, or credentials that it took before; None for any other error."""
    if said := _clock_is_off(error):
        return MachineError(f"{where}: {said}")
    if _code(error) in _EXPIRED:
        return MachineError(f"{where}: the credentials have run out; renew them{_GOES_ON}")
    return MachineError(f"{where}: the store does not answer ({explain(error)[:200]})") if is_outage(error) else None


def _clock_is_off(error: BaseException) -> str:
    """What to say where S3 refused a request and this machine's clock, which signs them, is far from the server's.

    The server's own words are no help: to a request for an object's size it gives none."""
    answer = _answer(error).get("ResponseMetadata", {})
    date = answer.get("HTTPHeaders", {}).get("date")
    if answer.get("HTTPStatusCode") not in (400, 403) or not date:
        return ""
    ahead = time.time() - parsedate_to_datetime(date).timestamp()
    if abs(ahead) < _SKEW_SECONDS:
        return ""
    return (
        f"refuses requests, as the clock of the machine {socket.gethostname()} is {abs(ahead) / 60:.0f} minutes "
        f"{'ahead of' if ahead > 0 else 'behind'} the server's; set it"
    )


def _answer(error: BaseException) -> dict[str, Any]:
    """What S3 answered, as botocore has it, behind an error or what it came of; nothing if it did not."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(getattr(cause, "response", None), dict):
        cause = cause.__cause__ or cause.__context__
    return getattr(cause, "response", {})


def _code(error: BaseException) -> str:
    """S3's name for what was wrong; the HTTP status where it gave no reason, as to any request for a size."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException | None) -> int:
    """The HTTP status behind a backend's error; 0 if there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    else:  # aiohttp; requests and httpx; gcsfs and google's clients
        status = getattr(error, "status", None) or getattr(response, "status_code", None) or getattr(error, "code", 0)
    return status if isinstance(status, int) else 0


def is_disk(error: BaseException) -> bool:
    """Whether a disk is full, broken or away. s3fs calls an answer of the server that it does not know EIO, too."""
    return isinstance(error, OSError) and error.errno in _DISK_ERRNOS and not _status(error.__cause__)


def is_fault(error: BaseException) -> bool:
    """Whether an error is the machine's or its storage's, whatever that is, and not the program's."""
    parts = type(error).__module__.split(".")
    if isinstance(error, OSError | MachineError) or _STORAGE_MODULES & {parts[0], ".".join(parts[:2])}:
        return True
    of_ray = {kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "ray.exceptions"}
    return "RayError" in of_ray and "RayTaskError" not in of_ray  # that is whatever a task raised


@contextlib.contextmanager
def reaching(where: str, refused: str = "cannot be read", hint: str | None = None) -> Iterator[None]:
    """Around the first calls that touch a place, so that what its backend raises is one of two kinds.

    Around those only: later, when the place has answered, a refusal (credentials that ran out) is the machine's, and
    what was finished has to stay. `where`: the place as a message calls it, `OUT s3://…`; `refused`: what it is that
    fails; `hint`: what to do, if not to check the address and the credentials, or the path and its permissions.
    Raises: MachineError for a store that does not answer and a disk that is full, broken or away; UserError for all
    else. UserError and MachineError pass.
    """
    try:
        yield
    except (UserError, MachineError):
        raise
    except Exception as error:  # each backend has its own classes for "no such bucket" and "no access"
        if fault := unanswered(where, error):
            raise fault from error
        said = explain(error)[:200]
        if is_disk(error):
            raise MachineError(f"{where}: {said}{_GOES_ON}") from error
        if _LOCKED.search(explain(error)):  # AWS' own words, and a server's
            hint = "the bucket keeps what is put there (object lock), by default; give one that does not"
        if hint is None:
            here = isinstance(error, OSError) and error.filename  # which stores' errors have not
            hint = "check the path and its permissions" if here else "check the address and the credentials"
        raise UserError(f"{where}: {refused} ({said}){hint and f'; {hint}'}") from error


def going_on(where: str, error: BaseException) -> MachineError:
    """The fault that ends work which the same command takes up again. where: the place that is named, if `error` is not
    one that names its own."""
    said = explain(error)
    if not (isinstance(error, MachineError) and said.startswith(_PLACES)):
        said = f"{where}: {said}"
    return MachineError(f"{said.removesuffix(_GOES_ON)}{_GOES_ON}")


@contextlib.contextmanager
def taken_up_again(where: str) -> Iterator[None]:
    """Around work that the same command takes up again, where what a fault of it says does not name the command's own
    place yet. Raises: MachineError for a fault; all else passes."""
    try:
        yield
    except Exception as error:
        if is_fault(error) and not isinstance(error, MachineError):
            raise going_on(where, error) from error
        raise


def explain(error: BaseException) -> str:
    """One line that says what the machine or the storage refused."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the device ({error.filename or 'while writing'})"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return "a file is larger than this disk takes (FAT: 4 GiB), or than `ulimit -f` allows"
    text = " ".join(shown(str(error)).split()) or type(error).__name__
    if isinstance(error, UserError | MachineError):
        return text
    why = " without a reason; have the credentials run out?" if _code(error) == "400" else ""
    return f"{type(error).__name__}: {text}{why}"
