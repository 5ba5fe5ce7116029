"""What RAY_ADDRESS may say, looked at before anything is claimed or started.

Ray's own job client takes the variable for the dashboard's URL, `ray.init` for the cluster's HOST:PORT. Here it is the
latter; `lesa-ray submit`, which is such a client, has RAY_API_SERVER_ADDRESS for the dashboard and takes either."""

from __future__ import annotations

import os

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
