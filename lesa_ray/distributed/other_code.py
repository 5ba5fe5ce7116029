"""Machines of a cluster that have no lesa_ray, or another version of it.

A worker there cannot load what it is to run, which Ray tells by a traceback. Whoever started the work has loaded all of
it, so what names this package in such an error is the other machine's lack."""

from __future__ import annotations

import re

from lesa_ray.errors import UnsharedError

_LACK = re.compile(
    r"No module named 'lesa_ray[\w.]*'"
    r"|cannot import name '\w+' from (?:partially initialized module )?'lesa_ray[\w.]*'"
    r"|Can't get attribute '\w+' on <module 'lesa_ray[\w.]*'"
    r"|module 'lesa_ray[\w.]*' has no attribute '\w+'"
)


def other_code(error: BaseException, what: str) -> UnsharedError | None:
    """What to raise where an error of Ray's tells that a machine's code is not this one; else None.

    what: the work, as a message calls it."""
    found = _LACK.search(str(error))
    if found is None:
        return None
    return UnsharedError(
        f"{what}: a machine of the cluster has not this lesa_ray ({found[0]}); install the same version on all, or let "
        "`lesa-ray submit` take the code along"
    )
