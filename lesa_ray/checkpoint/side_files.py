"""What lies beside a checkpoint's weights and goes along when they change: tokenizer, generation settings, chat
template, modelling code, licence. What does not: other formats of the weights, what was true of the old ones only."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from lesa_ray.checkpoint.brought_code import without_code
from lesa_ray.checkpoint.shards import INDEX_FILE
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.checkpoint.writer import copy_file

_LOG = logging.getLogger(__name__)
CARD_FILE = "README.md"
WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".pdparams", ".nemo"),
    *(".gguf", "imatrix.dat", ".tflite", ".onnx", ".onnx_data", ".onnx.data"),
)
"""How the names of weights end, in whatever format, and of what holds for quantising these alone."""
_TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps chat templates beside the first."""
_CONFIGURATIONS = "_config.json"
"""How the names of those end that may name code: the tokenizer's, a processor's."""
_OF_A_CHECKPOINT = ("config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.model")
"""One of them is in every folder that a model or a tokenizer is loaded from."""
_TRAINING_RECORDS = (
    "trainer_state.json",
    "pretrain.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "stage.json",  # the artifact store's (lesa_ray.store.record)
)
"""What says how the weights came about."""
_WRITTEN_ANEW = frozenset({CARD_FILE, "config.json", INDEX_FILE, *_TRAINING_RECORDS})


def side_files(files: Iterable[str]) -> list[str]:
    """Those of a checkpoint's files that hold for other weights too. `expansion.json` is one of them."""
    return [name for name in files if name not in _WRITTEN_ANEW and not name.endswith(WEIGHTS) and name[0] != "."]


def copy_side_files(source: Storage, target: Storage, files: Mapping[str, int], *, code: bool = True) -> None:
    """Copy those of a checkpoint's `files` (name → bytes) that hold for other weights too, and what it has in folders
    beside them. Without `code`, what Python files there are stays behind, and what names them (`auto_map`).

    A link in a local checkpoint that leads to no checkpoint's file is left out, with a warning: a clone from a stranger
    may link to what its user would not publish (`LICENSE -> ~/.ssh/id_rsa`)."""
    wanted = {name: files[name] for name in side_files(files) if code or not name.endswith(".py")}
    wanted |= _more_templates(source)
    if source.is_local:
        for name in [name for name in wanted if not _is_a_checkpoints(source.root, name)]:
            del wanted[name]
            _LOG.warning("%s: %r is not copied: it is a link to what is no checkpoint's", source.url, name)

    def copy(name: str) -> None:
        if not code and name.endswith(_CONFIGURATIONS) and (plain := _without_code(source.read(name))) is not None:
            target.write(name, plain)
        else:
            copy_file(source, target, name, wanted[name])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(copy, wanted))


def _without_code(content: bytes) -> bytes | None:
    """A configuration that names no code; None if it is one already, or none that can be read."""
    try:
        configuration = json.loads(content)
    except (ValueError, RecursionError):
        return None
    plain = without_code(configuration)
    return None if plain == configuration else (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


def _more_templates(storage: Storage) -> dict[str, int]:
    """Chat templates in a folder of their own, as names from the checkpoint's, and their bytes."""
    found = storage.within(_TEMPLATES).list()
    return {f"{_TEMPLATES}/{name}": size for name, size in found.items() if name.endswith(".jinja")}


def _is_a_checkpoints(root: str, name: str) -> bool:
    """Whether a file of a local folder, behind its links, lies in that folder; or in the hub's cache, as that of a
    snapshot does (`snapshots/<commit>/tokenizer.json -> ../../blobs/<digest>`), or with git-annex in its repository; or
    is the file of that name of another checkpoint, as in a folder of links to one."""
    folder, place = f"{os.path.realpath(root)}/", os.path.realpath(os.path.join(root, name))
    if place.startswith(folder):
        return True
    above = os.path.dirname(place)
    if os.path.basename(above) == "blobs" and os.path.isdir(os.path.join(os.path.dirname(above), "snapshots")):
        return True
    repository, annexed, _ = place.rpartition("/.git/annex/objects/")
    if annexed and folder.startswith(f"{repository}/"):
        return True
    other = place.removesuffix(f"/{name}")
    return other != place and any(os.path.exists(os.path.join(other, one)) for one in _OF_A_CHECKPOINT)
