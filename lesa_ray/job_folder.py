"""The folder in which a submitted job runs: a copy that Ray unpacks on one machine, and removes with it.

A relative OUT would lie there, and with the machine the result would be gone, of a job that had ended well."""

from __future__ import annotations

import json
import os
from typing import Any

from lesa_ray.errors import UserError


def job_environment() -> dict[str, Any]:
    """The runtime environment that this process was submitted with; empty if it was started otherwise."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")  # that is its name
    return job.get("runtime_env") or {}


def check_kept(what: str, place: str | None) -> None:
    """Raises: UserError if `place`, to which `what` is to be written, would go with the folder of a submitted job."""
    if place is None or "://" in place or not job_environment().get("working_dir"):
        return
    here, there = os.path.realpath(os.getcwd()), os.path.realpath(os.path.expanduser(place))
    if os.path.commonpath([here, there]) == here:
        raise UserError(
            f"{what} {place}: lies in the folder that Ray unpacked for this job, and would go with it; give a URL such "
            "as s3://…, or a folder that all machines share"
        )
