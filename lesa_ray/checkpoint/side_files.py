"""What lies beside a checkpoint's weights and goes along when they change: tokenizer, generation settings, chat
template, modelling code, licence. What does not: other formats of the weights, what was true of the old ones only."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from lesa_ray.checkpoint.reader import INDEX_FILE
from lesa_ray.checkpoint.storage import Storage

CARD_FILE = "README.md"
WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".pdparams", ".nemo"),
    *(".gguf", "imatrix.dat", ".tflite", ".onnx", ".onnx_data", ".onnx.data"),
)
"""How the names of weights end, in whatever format, and of what holds for quantising these alone."""
_TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps chat templates beside the first."""
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


def copy_side_files(source: Storage, target: Storage, files: Iterable[str]) -> None:
    """Copy those of a checkpoint's `files` that hold for other weights too, and what it has in folders beside them."""
    _copy(source, target, [*side_files(files), *_more_templates(source)])


def _more_templates(storage: Storage) -> list[str]:
    """Chat templates in a folder of their own, as names from the checkpoint's."""
    return [f"{_TEMPLATES}/{name}" for name in storage.within(_TEMPLATES).list() if name.endswith(".jinja")]


def _copy(source: Storage, target: Storage, names: Iterable[str]) -> None:
    """Copy files that fit in memory, several at a time."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: target.write(name, source.read(name)), names))
