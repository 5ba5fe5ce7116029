"""Code that a checkpoint brings along is never run.

`auto_map` in config.json and tokenizer_config.json names classes in Python files that lie beside it, or in any
repository of the hub. Where transformers has no class of its own for what is asked, it asks whoever sits at the
terminal whether to run them; of a configuration within the configuration (of a model of text and pictures) too, and
that whatever `trust_remote_code` says of the outer one. So the classes of transformers do not get to see it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.special_floats import decoded
from lesa_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AUTO_MAP_KEY = "auto_map"


def without_code(value: Any) -> Any:
    """A copy of what such a file holds, without what names code, at every depth."""
    if isinstance(value, dict):
        return {name: without_code(inner) for name, inner in value.items() if name != AUTO_MAP_KEY}
    return [without_code(inner) for inner in value] if isinstance(value, list) else value


def for_transformers(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json as the classes of transformers get to see it."""
    plain: dict[str, Any] = decoded(without_code(raw))
    return plain


def known_config(raw: dict[str, Any], where: str) -> PreTrainedConfig | None:
    """A config.json as transformers' own class for it; None for families it does not know.

    Raises: UserError if the class refuses the values."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if raw.get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[raw["model_type"]].from_dict(for_transformers(raw))
    except Exception as error:  # each family validates in its own way
        raise UserError(
            f"{where}: config.json: transformers refuses it ({' '.join(str(error).split())[:200]})"
        ) from error
    return config


def forget_code(config: PreTrainedConfig) -> None:
    """The same for a configuration that is read already, in place."""
    from transformers import PreTrainedConfig

    vars(config).pop(AUTO_MAP_KEY, None)
    for inner in vars(config).values():
        if isinstance(inner, PreTrainedConfig):
            forget_code(inner)
