"""Which Ray is meant, and what RAY_ADDRESS may say, looked at before anything is claimed or started.

Ray's own job client takes the variable for the dashboard's URL, `ray.init` for the cluster's HOST:PORT. Here it is the
latter; `lesa-ray submit`, which is such a client, has RAY_API_SERVER_ADDRESS for the dashboard, and takes either."""

from __future__ import annotations

import os
import socket
import time

from lesa_ray.errors import UserError


def check_address() -> None:
    """Raises: UserError if RAY_ADDRESS cannot be that of a cluster."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS {address}: is a dashboard's; give the cluster's, HOST:6379, and name the dashboard to "
            "`lesa-ray submit` with RAY_API_SERVER_ADDRESS"
        )
    if "://" not in address and address not in ("local", "auto") and not address.rpartition(":")[2].isdigit():
        raise UserError(f"RAY_ADDRESS {address}: is no address; expected HOST:PORT, or local for a Ray of its own")


def named_ray() -> str | None:
    """The Ray to use, for every command alike: RAY_ADDRESS (`local` is one of this process's own), else what
    `ray start` left on this machine; None where there is neither, and small work may do without."""
    return os.environ.get("RAY_ADDRESS") or started_here()


def await_head(address: str, seconds: float) -> None:
    """Wait up to `seconds` until something listens where the cluster's head should be; Ray alone tries for a quarter of
    an hour, as each of its twenty tries takes 40 seconds where nothing answers.

    address: as `named_ray` tells it; what is no HOST:PORT is left to Ray. Raises: OSError if nothing does."""
    place = started_here() if address == "auto" else address
    host, _, port = (place or "").rpartition(":")
    if not port.isdigit() or "://" in host:
        return
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(seconds, 1.0)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(min(1.0, seconds))


def started_here() -> str | None:
    """The address that the last `ray start` on this machine wrote down; `ray stop` removes it.

    Ray's own `auto` would also take a Ray that is embedded in some other process, and end when that does. What another
    user wrote is not taken: in a folder for all (`/tmp`) anybody could name a cluster that is to get this one's work.
    """
    try:
        with open(os.path.join(session_root(), "ray", "ray_current_cluster"), encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_uid not in (os.getuid(), 0):
                return None
            return file.read().strip() or None
    except OSError:
        return None


def session_root() -> str:
    """The folder in which a Ray on this machine keeps its sessions, as `ray`."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
