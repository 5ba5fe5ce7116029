"""Hand a command to a Ray cluster as a job, follow its log, and end as it ended.

Ray's own client (`JobSubmissionClient`) does the work, not the `ray job submit` command: that one ends with 1 whatever
the job ended with, so wrong input could not be told from a fault of the machine.

The job gets this project's code as it is now (less what `.gitignore` and `.rayignore` name), other files of the
project that the command names, and the YAML files that it names, wherever they are: Ray reads all of it into memory,
here and on the head, so models and results that lie in the checkout stay. Of this process's environment it gets only
where the stores are (`PASSED_ON`). Ray shows a job's environment and command in its logs and dashboard, so no
credential goes that way: nodes have a role.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import ray
from ray._private.runtime_env.packaging import _dir_travel
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from lesa_ray.distributed.start import without_secrets
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import explain
from lesa_ray.places import shown
from lesa_ray.sizes import size

DASHBOARD = "http://127.0.0.1:8265"
"""Where `ray start`, `ray dashboard` and `kubectl port-forward` put a cluster's dashboard on this machine."""
_ATTEMPTS = 30  # to hand in a job, and to reach a cluster again while following one, which goes on meanwhile
_CONNECTIONS = 6  # to reach it first
_PAUSE_SECONDS = 2.0
_SILENT_SECONDS = 60.0  # without a piece of log; then the job is asked after, and its log from the start
_ANSWER_SECONDS = 20.0
_NO_AGENT = "No available agent"  # of Ray's answer (python/ray/dashboard/modules/job/job_head.py)
_PACKAGES = ("lesa_ray", "pipelines")
_IGNORE_FILES = (".gitignore", ".rayignore")
_MOST_BYTES = 100_000_000  # of files that travel; the code has one or two million


def submit(command: Sequence[str], address: str | None = None, cpus: float = 1, wait: bool = True) -> int:
    """Run `command` on the cluster at `address`; the job's own exit code, or 0 at once without `wait`.

    address: the URL of the cluster's dashboard; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or `DASHBOARD`.
    cpus: what the command itself takes of a node, beside its tasks; with 0 it runs on the head.
    Standard output is the job's log, or its name without `wait`; standard error says what becomes of it.
    Raises: UserError if there is no command, the address is not a dashboard's, the cluster asks for a token, or its Ray
    or Python is another one. MachineError if the cluster cannot be reached, or the job ended otherwise than by itself.
    """
    if not command:
        raise UserError("COMMAND: missing; for example: lesa-ray submit -- python -m pipelines.expand --config FILE")
    if cpus < 0:
        raise UserError(f"--cpus {cpus:g}: must be 0 or more")
    url = _dashboard(address)
    where = shown(url)
    logging.getLogger("ray").setLevel(logging.WARNING)  # it would tell of every file that stays here
    logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)  # and of each connection that ends
    with _faults_of(url):
        os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray's client takes the variable even where it is given an address
        client = _connected(url)
        _check_versions(client, where)
        with packaged(command) as (folder, entrypoint):
            job = _submitted(
                client,
                entrypoint=shlex.join(entrypoint),
                runtime_env={"working_dir": folder, "env_vars": without_secrets()},
                entrypoint_num_cpus=cpus,
            )
    if not wait:
        sys.stdout.write(f"{job}\n")
        return 0
    _say(f"{job} on {where}")
    try:
        return _follow(client, job, url)
    except KeyboardInterrupt:
        _say(f"{job} goes on; {_command(url, 'logs --follow', job)} shows it, {_command(url, 'stop', job)} ends it")
        return 130


def _dashboard(address: str | None) -> str:
    """Where the job goes. RAY_ADDRESS may be Ray's own HOST:PORT (KubeRay sets it in its pods): Ray's client asks there
    for the dashboard, and is told the address by which the head knows it.

    Raises: UserError for what else is no URL."""
    url = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if url and "://" not in url and url not in ("auto", "local"):
        given = f"{'--address' if address else 'RAY_API_SERVER_ADDRESS'} {url.rpartition('@')[2]}"
        raise UserError(f"{given}: is not the URL of a dashboard, which takes jobs; expected http://HOST:8265")
    url = url or os.environ.get("RAY_ADDRESS") or "local"
    return url if url != "local" else DASHBOARD  # start_ray's word for no cluster


def _connected(url: str) -> _Client:
    """A client of the dashboard there. One that refuses at once is tried again for some seconds: the forwarding of a
    port that was begun a moment ago (`kubectl port-forward`, `ray dashboard`) may not listen yet."""
    for attempt in range(_CONNECTIONS - 1):
        begin = time.monotonic()
        try:
            return _Client(url)
        except ConnectionError:
            if time.monotonic() - begin > _PAUSE_SECONDS:  # no answer at all, which more tries would wait for as long
                raise
            if attempt == 0:
                _say(f"nothing answers at {shown(url)} yet; waiting")
        time.sleep(_PAUSE_SECONDS)
    return _Client(url)


@contextlib.contextmanager
def packaged(command: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """A folder with what the job needs, and the command as it reads there; the folder is gone afterwards.

    The project is the checkout that the current folder lies in, else where this package lies. Of a checkout the
    packages travel, the Python files beside them, the package of a module that the command names (`-m`), and files that
    it names by their place in the checkout; of an installation the packages alone. YAML files of this machine that the
    command names go to `submitted/` beside it. Raises: UserError if that is too much.
    """
    root = _project(Path.cwd())
    is_checkout = _is_checkout(root)
    with tempfile.TemporaryDirectory(prefix="lesa-ray-submit-") as temporary:
        folder = Path(temporary)
        for name in _code(root, command) if is_checkout else _PACKAGES:
            (folder / name).symlink_to(root / name)  # Ray follows links when it packs, and reads the ignore files there
        entrypoint = list(command)
        for position, argument in enumerate(command):
            option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
            if value.endswith((".yaml", ".yml")) and os.path.isfile(value):
                travelled = f"submitted/{position}/{Path(value).name}"
                (folder / travelled).parent.mkdir(parents=True)
                (folder / travelled).symlink_to(Path(value).resolve())
                entrypoint[position] = f"{option}{equals}{travelled}"
            elif is_checkout and _lies_in(root, value) and not (folder / value).exists():
                (folder / value).parent.mkdir(parents=True, exist_ok=True)
                (folder / value).symlink_to(root / value)
        _check_size(folder)
        yield temporary, entrypoint


def _project(here: Path) -> Path:
    for folder in (here, *here.parents):
        if _is_checkout(folder):
            return folder
    return Path(__file__).parents[2]


def _is_checkout(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file() and all((folder / name).is_dir() for name in _PACKAGES)


def _code(root: Path, command: Sequence[str]) -> list[str]:
    modules = {module.partition(".")[0] for option, module in pairwise(command) if option == "-m"}
    taken = {*_PACKAGES, *_IGNORE_FILES, *modules}
    return [p.name for p in root.iterdir() if p.name in taken or (p.suffix == ".py" and not p.name.startswith("."))]


def _lies_in(root: Path, place: str) -> bool:
    """Whether `place` is a file of the project, and not a hidden one."""
    path = Path(place)
    hidden = any(part.startswith(".") for part in path.parts)  # `..` too
    return not path.is_absolute() and not hidden and os.path.isfile(root / path)


def _check_size(folder: Path) -> None:
    """Raises: UserError, naming what takes most, if more would travel than a cluster's head should hold."""
    sizes: Counter[str] = Counter()

    def add(path: Path) -> None:
        if path.is_file():
            sizes["/".join(path.relative_to(folder).parts[:2])] += path.stat().st_size

    _dir_travel(folder, [], add, include_gitignore=True)  # Ray's own way through the files that it packs
    if sizes.total() > _MOST_BYTES:
        largest, nbytes = sizes.most_common(1)[0]
        raise UserError(
            f"{largest}: {size(nbytes)} of the {size(sizes.total())} that would travel with the job, which may be "
            f"{size(_MOST_BYTES)}; move it out of the project, or name it in .rayignore"
        )


def _check_versions(client: JobSubmissionClient, where: str) -> None:
    """Raises: UserError if the cluster's Ray, or the first two numbers of its Python, are not this process's."""
    # Ray's client has both answers' addresses, and the token if one is asked for, but no public method for either.
    there = client._do_request("GET", "/api/version").json()["ray_version"]
    if there != ray.__version__:
        raise UserError(f"cluster {where}: runs Ray {there}, here is {ray.__version__}; install ray=={there} here")
    answer = client._do_request("GET", "/api/v0/cluster_metadata")
    python = str(answer.json()["data"]["pythonVersion"]) if answer.status_code == 200 else platform.python_version()
    if python.split(".")[:2] != platform.python_version().split(".")[:2]:
        raise UserError(
            f"cluster {where}: runs Python {python}, here is {platform.python_version()}; use the cluster's here"
        )


def _follow(client: JobSubmissionClient, job: str, url: str) -> int:
    """Show the job's log until it ends; its exit code. A connection that is lost is made again."""
    log = _Log()
    lost, over = 0, False
    while True:
        before = log.shown
        try:
            whole = asyncio.run(log.show(client, job))
            details = client.get_job_info(job)
            if details.status.is_terminal() and (whole or over):
                break
            lost, over = 0, details.status.is_terminal()  # the rest of the log is tried once more
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            if getattr(error, "status", 0) == 404 and _is_unknown(client, job):
                raise MachineError(
                    f"cluster {shown(url)}: does not know {job} any more, as its head was started anew; the "
                    "same command goes on from what the job had finished"
                ) from error
            lost = 1 if log.shown > before else lost + 1
            if lost == 1:
                _say(f"lost the connection to {shown(url)}, which {job} does not need; connecting again")
            if lost > _ATTEMPTS:
                raise MachineError(
                    f"cluster {shown(url)}: lost ({_reason(error, url)}); {job} may go on, "
                    f"{_command(url, 'logs --follow', job)} shows it"
                ) from error
        time.sleep(_PAUSE_SECONDS)
    if details.status == JobStatus.SUCCEEDED:
        return 0
    code = details.driver_exit_code
    if details.status == JobStatus.STOPPED or code is None:
        raise MachineError(f"{job}: {details.status.lower()}: {(details.message or 'no reason is given')[-500:]}")
    _say(f"{job} ended with exit code {code}")
    return int(code) if 0 < code < 256 else 1


def _is_unknown(client: JobSubmissionClient, job: str) -> bool:
    """Whether the cluster itself, and not a gateway before it, says that it has no such job: jobs go with a head that
    keeps its books nowhere else."""
    try:
        client.get_job_info(job)
    except (OSError, RuntimeError) as error:
        return f"{job} does not exist" in str(error)
    return False


def _command(url: str, verb: str, job: str) -> str:
    """A command of Ray's for a job, for any shell: where RAY_ADDRESS is set, Ray does not look at `--address`."""
    return f"`RAY_API_SERVER_ADDRESS={shown(url)} ray job {verb} {job}`"


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, which waits for an answer for ever: a connection may die without a word, as in a tunnel whose
    other end is gone. What hands in a file or a job may take as long as it takes."""

    def _do_request(self, method: str, endpoint: str, **given: Any) -> Any:
        limit = {"timeout": _ANSWER_SECONDS} if method == "GET" else {}
        return super()._do_request(method, endpoint, **limit, **given)


class _Log:
    """A job's log, as far as it was shown. Each connection sends it from the start."""

    def __init__(self) -> None:
        self.shown = 0

    async def show(self, client: JobSubmissionClient, job: str) -> bool:
        """Whether it came to its end. It did not where nothing comes any more: the job may have nothing to say, or
        the connection be dead. Ray's servers answer no ping, which would tell."""
        position = 0
        pieces = client.tail_job_logs(job)
        while True:
            try:
                text = await asyncio.wait_for(anext(pieces), _SILENT_SECONDS)
            except StopAsyncIteration:
                return True
            except TimeoutError:
                return False
            new = text[max(0, self.shown - position) :]
            position += len(text)
            if new:
                sys.stdout.write(new)
                sys.stdout.flush()
                self.shown = position


def _submitted(client: JobSubmissionClient, **job: Any) -> str:
    """A job's name. On a cluster that has just begun, or is busy, Ray answers for a while that no agent takes jobs."""
    for attempt in range(_ATTEMPTS - 1):
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if _NO_AGENT not in str(error):
                raise
        if attempt == 0:
            _say("the cluster takes no jobs yet; waiting")
        time.sleep(_PAUSE_SECONDS)
    return str(client.submit_job(**job))


@contextlib.contextmanager
def _faults_of(url: str) -> Iterator[None]:
    """What Ray's client raises until the job is there, in this package's two kinds."""
    where = shown(url)
    try:
        yield
    except UserError:
        raise
    except AuthenticationError as error:
        raise UserError(
            f"cluster {where}: asks for a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
            "or ~/.ray/auth_token to the cluster's"
        ) from error
    except (RayError, OSError, RuntimeError, ValueError, KeyError) as error:
        hint = "" if "://" in url else "; from outside the cluster give its dashboard's URL (--address)"
        raise MachineError(f"cluster {where}: no job was started ({_reason(error, url)}){hint}") from error


def _reason(error: BaseException, url: str) -> str:
    return explain(error).replace(url, shown(url))[:300]


def _say(line: str) -> None:
    sys.stderr.write(f"lesa-ray: {line}\n")
    sys.stderr.flush()
