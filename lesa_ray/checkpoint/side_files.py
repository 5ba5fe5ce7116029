"""What lies beside a checkpoint's weights and goes along when they change: tokenizer, generation settings, chat
template, modelling code, licence. What does not: other formats of the weights, what was true of the old ones only."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from lesa_ray.checkpoint.reader import INDEX_FILE
from lesa_ray.checkpoint.storage import Storage

CARD_FILE = "README.md"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
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
    return [name for name in files if name not in _WRITTEN_ANEW and not name.endswith(_WEIGHTS) and name[0] != "."]


def copy_small_files(source: Storage, target: Storage, names: Iterable[str]) -> None:
    """Copy files that fit in memory, several at a time."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: target.write(name, source.read(name)), names))
