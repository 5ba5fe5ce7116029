"""Would each layer of the deeper model be what it should: an old one the same, a new one like that below it?

Settings that tie a layer to its place are known by name (`lesa_ray.checkpoint.depth`), and a family may bring others.
So the base and the deeper model are built from their configurations, without weights, and each layer is compared with
the one of the base whose settings it takes: its parameters' names and shapes, and the plain numbers and words that its
modules keep."""

from __future__ import annotations

from typing import Any

from lesa_ray.checkpoint.brought_code import for_transformers
from lesa_ray.checkpoint.depth import BY_INDEX
from lesa_ray.checkpoint.names import layer_of
from lesa_ray.errors import UserError


def check_same_layers(raw: dict[str, Any], deeper: dict[str, Any], places: dict[int, int], base: str) -> None:
    """Compare the models of two configurations, layer by layer; none is compared where transformers cannot build them.

    raw, deeper: config.json of the base and of the result. places: for each layer's index in the result that in the
    base. Raises: UserError naming what would be different."""
    try:
        before, after = _layers(raw), _layers(deeper)
    except Exception:  # an unknown family, or one that needs more than its configuration
        return
    for index, origin in places.items():
        old, new = before.get(origin, {}), after.get(index, {})
        for name in sorted(old.keys() | new.keys()):
            was, is_now = old.get(name), new.get(name)
            if name.endswith((".layer_idx", ".training")):  # its place in the cache; what every module says
                continue
            if was != is_now and (was, is_now) not in ((origin, index), (len(before), len(after))):
                raise UserError(
                    f"BASE {base}: layer {origin} would be another as layer {index} of a deeper model: {name} would be "
                    f"{_shown(is_now)}, not {_shown(was)}; {_why(raw)}"
                )


def _layers(raw: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What each layer of a configuration's model is made of, by names within the layer."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from lesa_ray.layerwise.register import register

    register()
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(for_transformers(raw))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    found: dict[int, dict[str, Any]] = {}

    def keep(name: str, value: Any) -> None:
        index = layer_of(name)
        if index is not None:
            found.setdefault(index, {})[name.split(f".{index}.", 1)[1]] = value

    for name, parameter in model.named_parameters():
        keep(name, tuple(parameter.shape))
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and isinstance(value, bool | int | float | str):
                keep(f"{name}.{key}", value)
    return found


def _why(raw: dict[str, Any]) -> str:
    """Why a layer would be another, as far as config.json tells."""
    rules = [f"{key} = {raw[key]}" for key in BY_INDEX if type(raw.get(key)) is int and raw[key] > 1]
    if not rules:
        return "how config.json should change is not known; please report this model"
    return (
        f"config.json says by a rule which layer is of which kind ({', '.join(rules)}), and the plan does not follow "
        "it; solar does where layers move by a whole period"
    )


def _shown(value: object) -> str:
    return "absent" if value is None else str(list(value) if isinstance(value, tuple) else value)
