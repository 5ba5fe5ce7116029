"""What commonly keeps a Ray from starting on a machine. Ray itself says that a file or a node timed out, or nothing but
the length of a socket's path."""

from __future__ import annotations

import os
import resource
import shutil

from lesa_ray.limits import all_memory, free_memory
from lesa_ray.sizes import size

_LEAST_ROOM = 2**20
"""Bytes that a session's first files take."""
_PROCESSES = 1024
_MEMORY = 1.2e9
"""Bytes of Ray's own processes and this one's, about. With 0.7 GB it hung."""
_SHARED_MEMORY = "/dev/shm"
_LIMITS = (
    ("v", resource.RLIMIT_AS, 2**40), ("f", resource.RLIMIT_FSIZE, 2**40), ("u", resource.RLIMIT_NPROC, _PROCESSES)
)  # fmt: skip
"""`ulimit`'s letter, the limit, and what is no hindrance. Ray's processes map far more memory than they use."""


def few_processes() -> str:
    """What to say before Ray starts where its processes may be refused threads: it then waits for them for ever."""
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if os.geteuid() == 0 or not 0 <= limit < _PROCESSES:  # it does not bind root
        return ""
    return f"`ulimit -u` is {limit} here, which may be too few processes and threads for Ray: raise it if this hangs"


def little_memory() -> str:
    """What to say before Ray starts where its processes may be killed, one after another, for want of memory."""
    try:
        free = free_memory()
    except (OSError, StopIteration):  # a system that does not say
        return ""
    if free >= _MEMORY:
        return ""
    return (
        f"{size(free)} of memory are free here, of {size(all_memory())} that the machine or its container has, which "
        "may be too little for Ray: give it more if this hangs"
    )


def hindrance(error: BaseException, folder: str) -> str:
    """What may be behind Ray's error and what to do, to be said after it; empty where nothing is seen.

    folder: in which Ray makes that of its session."""
    elsewhere = "set RAY_TMPDIR to another folder"
    if "AF_UNIX" in str(error):
        return f"; {folder}: too long a path for Ray's sockets; set RAY_TMPDIR to a short one"
    if os.path.isdir(folder):
        if (isinstance(error, OSError) and not isinstance(error, BlockingIOError)) or not os.access(folder, os.W_OK):
            return f"; {folder}: Ray's session cannot be written there; {elsewhere}"
        if shutil.disk_usage(folder).free < _LEAST_ROOM:
            return f"; {folder}: the disk is full, and Ray's session lies there; {elsewhere}"
    if os.path.isdir(_SHARED_MEMORY) and not os.access(_SHARED_MEMORY, os.W_OK):
        return f"; {_SHARED_MEMORY} cannot be written, where Ray has its objects; mount it writable"
    for letter, limit, enough in _LIMITS:
        if 0 <= resource.getrlimit(limit)[0] < enough:
            return f"; it may be the limit `ulimit -{letter}`, which is set here; raise it"
    return ""
