"""The folder of a layer-wise scaled model: config.json, and the code with which it loads elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from lesa_ray.checkpoint.brought_code import without_code
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError
from lesa_ray.faults import reaching
from lesa_ray.layerwise.names import AUTO_MAP, CODE_FILES, MODEL_TYPE


def write_folder(out: str, architecture: Mapping[str, Any]) -> bool:
    """Write the folder that `lesa-ray pretrain --architecture` takes, config.json last.

    Returns whether it was there already. Raises: UserError if there is something else, or the place refuses;
    MachineError for a full disk, or a store that does not answer."""
    storage = Storage(out)
    content = (json.dumps(architecture, indent=2) + "\n").encode()
    with reaching(f"OUT {out}", "cannot be written"):
        if storage.exists("config.json") and storage.read("config.json") == content:
            return True
        if storage.folders() or any(name not in CODE_FILES and not name.endswith(".tmp") for name in storage.list()):
            raise UserError(f"OUT {out}: is not empty; give a new place, or empty it")
        write_code(storage, architecture)
        storage.write("config.json", content)
        return False


def has_our_code(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of this architecture. Our word is that it loads with `trust_remote_code=True`, so then no
    code but ours may lie beside it or be named in it. config: its config.json."""
    return config.get("model_type") == MODEL_TYPE


def naming_our_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of such a checkpoint with the classes that `write_code` puts beside it; others' as it is."""
    return {**without_code(config), "auto_map": dict(AUTO_MAP)} if has_our_code(config) else dict(config)


def write_code(storage: Storage, config: Mapping[str, Any]) -> None:
    """Put the model's code beside a checkpoint of this architecture; nothing for others. config: its config.json."""
    if has_our_code(config):
        for name in CODE_FILES:
            storage.write(name, files("lesa_ray.layerwise").joinpath(name).read_bytes())
