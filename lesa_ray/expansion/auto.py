"""`--method auto`: what measurements favour, of what the base can have, and why.

Decides
- The order is that of `pipelines/study_small.yaml` (README, Measured): three small bases, three seeds each. In the mean
  over the bases `llama-pro` ended lowest, `avg-deus` next; of methods that are not told apart the one that keeps the
  base's function, and costs no more than a copy, comes first. It says nothing certain of models 1,000 times larger;
  `pipelines/study_cluster.yaml` asks them.
- The first choice that the base can have is taken. Settings that the user gave stay; LESA's own are refused, since
  whether LESA is taken at all is not known beforehand.
- The result is the same, byte for byte, as if the method had been named.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from lesa_ray.config import ExpandConfig, LesaSettings
from lesa_ray.errors import UserError

AUTO = "auto"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Choice:
    """A method, and the measurement that speaks for it."""

    method: str
    reason: str


CHOICES: tuple[Choice, ...] = (
    Choice(
        "llama-pro",
        "after training it ended lowest in the mean over three small bases, three seeds each, if not told apart from "
        "four others, and it keeps the base's function; lesa ended 0.004 to 0.006 nats above it",
    ),
    Choice(
        "avg-deus",
        "after training it was not told apart from llama-pro, which this base cannot have, on three small bases",
    ),
)
"""The best first. The last is taken by every base that can be grown at all."""


def first_possible(config: ExpandConfig, attempt: Callable[[ExpandConfig], Result]) -> tuple[Choice, Result]:
    """The first choice for which `attempt` (of the settings with that method) raises no UserError, and its result.

    Raises: UserError for settings that only a named method can have, or that of the last attempt."""
    given = config.model_fields_set
    if "variants" in given or (config.lesa != LesaSettings() and "lesa" in given):
        raise UserError("--method auto: decides LESA's settings itself; leave out lesa and variants, or name a method")
    if config.zero_init is False or config.output_scale:
        raise UserError(
            "--method auto: new layers that write at once were not what measured best; leave out --no-zero-init and "
            "output_scale, or name a method"
        )

    def tried(choice: Choice) -> tuple[Choice, Result]:
        named = {**config.model_dump(exclude_unset=True), "method": choice.method}
        return choice, attempt(ExpandConfig.model_validate(named))

    *better, last = CHOICES
    for choice in better:
        with suppress(UserError):
            return tried(choice)
    return tried(last)
