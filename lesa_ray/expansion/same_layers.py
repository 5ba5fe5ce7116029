"""Would an old layer still be the same layer in the deeper model?

Settings that tie a layer to its place are known by name (`lesa_ray.checkpoint.depth`), and a family may bring others.
So the base and the deeper model are built from their configurations, without weights, and each old layer is compared
with what it is in the base: its parameters' names and shapes, and the plain numbers and words that its modules keep."""

from __future__ import annotations

from typing import Any

from lesa_ray.checkpoint.brought_code import for_transformers
from lesa_ray.checkpoint.names import layer_of
from lesa_ray.errors import UserError


def check_old_layers(raw: dict[str, Any], deeper: dict[str, Any], places: dict[int, int], base: str) -> None:
    """Compare the models of two configurations, layer by layer; none is compared where transformers cannot build them.

    raw, deeper: config.json of the base and of the result. places: for each old layer's index in the result that in
    the base. Raises: UserError naming what would be different."""
    try:
        before, after = _layers(raw), _layers(deeper)
    except Exception:  # an unknown family, or one that needs more than its configuration
        return
    for index, origin in places.items():
        old, new = before.get(origin, {}), after.get(index, {})
        for name in sorted(old.keys() | new.keys()):
            was, is_now = old.get(name), new.get(name)
            if name.endswith(".layer_idx"):  # its place in the cache
                continue
            if was != is_now and (was, is_now) not in ((origin, index), (len(before), len(after))):
                raise UserError(
                    f"BASE {base}: layer {origin} would be another as layer {index} of a deeper model: {name} would be "
                    f"{_shown(is_now)}, not {_shown(was)}; how config.json should change is not known; please report "
                    "this model"
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


def _shown(value: object) -> str:
    return "absent" if value is None else str(list(value) if isinstance(value, tuple) else value)
