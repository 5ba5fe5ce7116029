"""Everything that can be decided, or refused, before any work. `inspect` and `--dry-run` show what it returns."""

from __future__ import annotations

from dataclasses import replace

from lesa_ray.config import ExpandConfig
from lesa_ray.expansion.auto import AUTO, first_possible
from lesa_ray.expansion.layout import Expansion, lay_out
from lesa_ray.expansion.rehearsal import rehearse


def prepare(config: ExpandConfig) -> Expansion:
    """Decide and lay out an expansion from the headers of its base; writes nothing. Raises: UserError."""
    if config.method != AUTO:
        return lay_out(config)
    choice, expansion = first_possible(config, _rehearsed)
    return replace(expansion, chosen=choice.reason)


def _rehearsed(config: ExpandConfig) -> Expansion:
    """Laid out, and whether a function that is to be kept is, which headers do not show. Raises: UserError."""
    expansion = lay_out(config)
    if not expansion.job.zero_init:
        return expansion
    rehearse(expansion)
    return replace(expansion, rehearsed=True)
