"""A budget of host memory that was stated, and work that needs more."""

from __future__ import annotations

from lesa_ray.errors import RoomError
from lesa_ray.sizes import size


def require_budget(budget: int | None, needed: int, what: str, instead: str) -> None:
    """Raises: RoomError if the budget (bytes; None: none was stated) is smaller than what `what` needs.

    instead: what else would do, such as "or …"."""
    if budget is not None and needed > budget:
        raise RoomError(f"--memory-budget {size(budget)}: {what} needs {size(needed)}; give that much, {instead}")
