"""Connect to Ray: the running cluster where there is one (RAY_ADDRESS, `ray start`, a submitted job), else an embedded
local one.

An embedded one has this process's environment. A cluster's machines have their own, and are given what says here where
stores are (`PASSED_ON`); no secrets, as Ray shows an environment that travels in its logs and dashboard."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import secrets
import shlex
import sys
from collections.abc import Iterable
from typing import Any

import ray

from lesa_ray.distributed.address import await_head, check_address, named_ray, session_root
from lesa_ray.distributed.cluster import EMBEDDED
from lesa_ray.distributed.hindrance import few_processes, hindrance, little_memory
from lesa_ray.errors import MachineError
from lesa_ray.faults import explain
from lesa_ray.gpu import unseeing
from lesa_ray.interrupt import as_before
from lesa_ray.job_folder import job_environment
from lesa_ray.places import shown

log = logging.getLogger(__name__)

PASSED_ON = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
)
"""Environment variables of this process that tasks on a cluster get."""
HEAD_SECONDS = 20.0
"""For a cluster's head to be reached: it may be coming up beside this process, or be started again."""


def start_ray() -> bool:
    """Connect to the running cluster, or start an embedded local Ray; nothing if Ray is up in this process.

    RAY_ADDRESS names the cluster, or is `local` for an embedded Ray beside a running cluster; without it, it is what
    `ray start` left on this machine. Returns whether this call started an embedded Ray.
    Raises: UserError if RAY_ADDRESS is no address; MachineError if the cluster cannot be reached, or none started.
    """
    if ray.is_initialized():
        return False
    check_address()
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = named_ray()
    try:
        if address not in ("local", None):
            await_head(address, HEAD_SECONDS)
            with as_before():
                ray.init(address=address, runtime_env=_passed_on(), **quiet)
            return False
    except (ray.exceptions.RayError, OSError, ValueError, RuntimeError) as error:
        left = "; `ray start` left its address here: run `ray stop` if it is gone, or set RAY_ADDRESS=local"
        hint = "; RAY_ADDRESS names it" if os.environ.get("RAY_ADDRESS") else left
        raise MachineError(f"Ray cluster {address}: cannot be reached ({explain(error)[:200]}){hint}") from error
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # workers share the cores: a thread that waits must not spin
    _own_token()
    for doubt in filter(None, (few_processes(), little_memory())):
        log.warning("%s", doubt)
    own = {**quiet, **_no_unseen_gpus()}
    for again in (True, False):
        try:
            with as_before():
                ray.init(address="local", include_dashboard=False, labels=EMBEDDED, runtime_env=_own_python(), **own)
            break
        except Exception as error:  # Ray has no class of its own for a node that does not come up
            # On a machine that is busy, one gives up on its agent after 15 seconds (ray-project/ray#65983).
            if not (again and "timed out during startup" in str(error)):
                why = hindrance(error, session_root())
                raise MachineError(f"Ray does not start on this machine ({explain(error)[:200]}){why}") from error
    return True


def _own_token() -> None:
    """Give an embedded Ray a token of its own, where none is set. Its ports are open to all interfaces, whatever
    address the node is given, so the token is what keeps others out.

    Ray would put one into the home folder, readable to all, and not start where there is no home or its disk is full or
    read-only (a container's user without a name, a quota, a service). Of the environment only this user's processes
    and the workers know. One that is in the home folder stays in use, as a cluster that this process connects to later
    may ask for it."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    folder = os.path.expanduser("~/.ray")
    if not os.access(os.path.join(folder, "auth_token"), os.R_OK):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        return
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)


def _no_unseen_gpus() -> dict[str, Any]:
    """Ray counts a machine's GPUs by its driver. Those that PyTorch does not see an embedded Ray is not to deal out."""
    if not glob.glob("/dev/nvidia[0-9]*"):
        return {}
    import torch

    if torch.cuda.is_available():
        return {}
    log.warning("this machine has a GPU that %s; work is done on its CPU", unseeing())
    return {"num_gpus": 0}


def _own_python() -> dict[str, Any]:
    """This interpreter, as Ray's runtime environment, where its path means something else to a shell.

    For workers with an environment of their own, as Ray Train's are, Ray puts the path into a shell's command as it is:
    with a space in it they never come up, and Ray tries for ever. A cluster's machines have paths of their own."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def _passed_on() -> dict[str, Any]:
    """What of this process's environment goes to a cluster, as Ray's runtime environment.

    What the submitted job's own names is left out: it is there already, and Ray refuses to hear it twice."""
    known = job_environment().get("env_vars") or {}
    passed = without_secrets(name for name in PASSED_ON if name not in known)
    return {"env_vars": passed} if passed else {}


def without_secrets(names: Iterable[str] = PASSED_ON) -> dict[str, str]:
    """Variables of this process, as far as they are set and hold no user or password: a warning tells what does."""
    passed = {}
    for name in names:
        value = os.environ.get(name)
        if value is None:
            continue
        if value != shown(value):
            log.warning(
                "%s: holds a user or a password, which Ray would show; the cluster's machines are not given it, set it "
                "in their own environment",
                name,
            )
            continue
        passed[name] = value
    return passed
