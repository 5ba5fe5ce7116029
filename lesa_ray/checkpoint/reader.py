"""Read a safetensors checkpoint: headers first, then only the bytes that are needed.

Opening a checkpoint costs one small read per shard (the header: names, dtypes, shapes, offsets), whatever its size. A
tensor is then one range read. Nothing is memory-mapped, so what a process holds is what it asked for. Every way in
which a folder can be broken or unsuitable (missing or truncated shard, index that disagrees, pickled or quantised
weights) is found here, before any work."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.header import TORCH_NAMES, TensorEntry, raw_header, read_header
from lesa_ray.checkpoint.language_model import PROCESSORS, component, language_config, language_name
from lesa_ray.checkpoint.names import item_of, layer_of
from lesa_ray.checkpoint.pages import empty_bytes
from lesa_ray.checkpoint.ranges import read_into
from lesa_ray.checkpoint.samples import samples
from lesa_ray.checkpoint.shards import INDEX_FILE, SINGLE_FILE
from lesa_ray.checkpoint.storage import ON_THE_HUB, Storage, resolve_base
from lesa_ray.errors import UserError, first_line
from lesa_ray.faults import reaching

if TYPE_CHECKING:
    import torch

_QUANTISED = "quantize_config.json"
"""Beside what AutoGPTQ wrote before config.json could say it."""
_ADAPTER = "adapter_config.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
SAMPLED = "sha256-of-samples:"
"""What digests begin with that no storage gave."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its configuration and where each tensor lies. Holds no weights; picklable."""

    base: str
    storage: Storage
    files: dict[str, int]
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    is_part: bool = False
    """Whether it is the language model of a larger one, with names of its own for what lies in the files."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Bytes of the parts that see or hear then, by name."""

    @property
    def parameters(self) -> int:
        """Number of elements of all float tensors (tied embeddings count once, buffers of integers not)."""
        return sum(entry.elements for entry in self.tensors.values() if entry.is_float)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    @cached_property
    def shards(self) -> tuple[str, ...]:
        return tuple(sorted({entry.file for entry in self.tensors.values()}))

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor, or what lies at an index of its first axis (`x[3]`), lies."""
        item = item_of(name)
        return self.tensors[name] if item is None or name in self.tensors else self.tensors[item[0]].item(item[1])

    def read(self, name: str) -> torch.Tensor:
        """One float tensor, or what lies at an index of its first axis, in its dtype and shape, on the CPU."""
        import torch

        entry = self.entry(name)
        buffer = empty_bytes(entry.nbytes)
        read_into(self.storage, entry.file, entry.offset, buffer.numpy().data)
        return buffer.view(getattr(torch, TORCH_NAMES[entry.dtype])).reshape(entry.shape)

    def digests(self) -> dict[str, dict[str, Any]]:
        """What identifies each shard without reading it whole: its size and a digest.

        The digest is the storage's own ETag where there is one, else a SHA-256 over the header and a little of each
        tensor (`lesa_ray.checkpoint.samples`).
        """
        of_file: dict[str, list[TensorEntry]] = {}
        for entry in self.tensors.values():
            of_file.setdefault(entry.file, []).append(entry)

        def digest(file: str) -> dict[str, Any]:
            size = self.files[file]
            tag = None if self.storage.is_local else self.storage.etag(file)
            if tag is None:
                sha = hashlib.sha256(raw_header(self.storage, file, size))
                for sample in samples(self.storage, file, of_file[file]):
                    sha.update(sample)
                tag = f"{SAMPLED}{sha.hexdigest()}"
            return {"bytes": size, "digest": tag}

        with ThreadPoolExecutor(8) as pool:
            return dict(zip(self.shards, pool.map(digest, self.shards), strict=True))


def open_checkpoint(base: str, where: str = "") -> Checkpoint:
    """Open a checkpoint by its headers alone.

    base: a local folder, a Hugging Face repo id (`org/name`, `org/name@revision`) or an fsspec URL.
    where: what messages call it, if not `BASE …`.
    Raises: UserError, with one line that says what is wrong with which file and what to do; MachineError if its store
    does not answer.
    """
    where = where or f"BASE {base}"
    storage = Storage(resolve_base(base, where))
    with _reaching(where, storage, "cannot be listed"):
        files = storage.list()
    if not files:
        raise UserError(f"{where}: there is nothing at {storage.url}")
    if _ADAPTER in files:
        raise UserError(
            f"{where}: holds an adapter ({_ADAPTER}), which transformers loads on another checkpoint; merge it into "
            f"that one (PEFT's merge_and_unload), or remove {_ADAPTER} if it is left over"
        )
    if "config.json" not in files:
        raise UserError(f"{where}: not a checkpoint, there is no config.json in it")
    config = _read_json(where, storage, "config.json")
    if quantised := _QUANTISED if _QUANTISED in files else _quantised_by(config):
        raise UserError(f"{where}: is quantised ({quantised}); expand the unquantised checkpoint, quantise the result")
    weight_map = _weight_map(where, storage, files)
    shards = sorted(set(weight_map.values())) if weight_map else [_single_file(where, files)]
    for shard in shards:
        if shard not in files:
            raise UserError(f"{where}: {INDEX_FILE} names {shard}, which is not there; download it again")

    def header_of(shard: str) -> list[TensorEntry]:
        with _reaching(where, storage, f"{shard} cannot be read"):
            return read_header(where, storage, shard, files[shard])

    with ThreadPoolExecutor(16) as pool:
        headers = list(pool.map(header_of, shards))
    tensors = _all_tensors(where, [entry for header in headers for entry in header], weight_map)
    if not tensors:
        raise UserError(f"{where}: its safetensors files hold no tensor")
    for entry in tensors.values():
        if _is_packed(entry):
            raise UserError(
                f"{where}: tensor {entry.name} has dtype {entry.dtype}, so the checkpoint is quantised; "
                f"expand one in {', '.join(TORCH_NAMES.values())}"
            )
    return _language_model(Checkpoint(base=base, storage=storage, files=files, config=config, tensors=tensors), where)


def _language_model(whole: Checkpoint, where: str) -> Checkpoint:
    """The checkpoint, of its language model alone if it is of more (`lesa_ray.checkpoint.language_model`)."""
    config = language_config(whole.config, where)
    if config is None:
        return whole
    named = {name: language_name(name) for name in whole.tensors}
    if not any(name is not None and layer_of(name) is not None for name in named.values()):
        return whole
    tensors = {new: replace(whole.tensors[old], name=new) for old, new in named.items() if new is not None}
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    left_out: dict[str, int] = {}
    for name in (old for old, new in named.items() if new is None):
        left_out[component(name)] = left_out.get(component(name), 0) + whole.tensors[name].nbytes
    files = {name: nbytes for name, nbytes in whole.files.items() if name not in PROCESSORS}
    return replace(whole, files=files, config=config, tensors=tensors, is_part=True, left_out=left_out)


def _reaching(where: str, storage: Storage, refused: str) -> AbstractContextManager[None]:
    return reaching(where, refused, ON_THE_HUB) if storage.url.startswith("hf://") else reaching(where, refused)


def _weight_map(where: str, storage: Storage, files: dict[str, int]) -> dict[str, str]:
    if SINGLE_FILE in files or INDEX_FILE not in files:  # transformers takes the single file, index or not
        return {}
    weight_map = _read_json(where, storage, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{where}: {INDEX_FILE} has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or "/" in shard or shard.startswith(".."):
            raise UserError(f"{where}: {INDEX_FILE} names the shard {shard!r}, which is not a file of this folder")
    return weight_map


def _all_tensors(where: str, entries: list[TensorEntry], weight_map: dict[str, str]) -> dict[str, TensorEntry]:
    """What the shards hold, as transformers loads it: an index finds shards, and may leave out tensors of theirs. Of a
    tensor that lies in two shards, the one that the index names.

    Raises: UserError if a layer lacks a tensor that the index places. Elsewhere its name may be one of old times."""
    found = {entry.name: entry for entry in entries}
    found |= {entry.name: entry for entry in entries if weight_map.get(entry.name) == entry.file}
    for name, shard in weight_map.items():
        if name not in found and layer_of(name) is not None:
            raise UserError(f"{where}: {shard} lacks the tensor {name}, which {INDEX_FILE} places in it")
    return found


def _quantised_by(config: dict[str, Any]) -> str | None:
    """The method, if config.json says that there was one."""
    quantised = config.get("quantization_config")
    if not quantised:
        return None
    return str(quantised.get("quant_method", "unknown")) if isinstance(quantised, dict) else "unknown"


def _is_packed(entry: TensorEntry) -> bool:
    """Whether it is a matrix in a type of quantised weights: of whatever name in a layer (GPTQ: `qweight`, `qzeros`),
    where masks are of booleans and tables of indices of 64 bits."""
    if entry.is_float or len(entry.shape) != 2:
        return False
    return entry.name.endswith(".weight") or (layer_of(entry.name) is not None and entry.dtype not in ("BOOL", "I64"))


def _single_file(where: str, files: dict[str, int]) -> str:
    candidates = [name for name in sorted(files) if name.endswith(".safetensors")]
    if SINGLE_FILE in candidates:
        return SINGLE_FILE
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UserError(f"{where}: {len(candidates)} safetensors files but no {INDEX_FILE}; add the index")
    pickled = [name for name in sorted(files) if name.endswith(_PICKLED)]
    if pickled:
        raise UserError(
            f"{where}: only {pickled[0]} and no safetensors; load it with transformers and save_pretrained() it"
        )
    raise UserError(f"{where}: there is no safetensors file in it")


def _read_json(where: str, storage: Storage, name: str) -> dict[str, Any]:
    with _reaching(where, storage, f"{name} cannot be read"):
        content = storage.read(name)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{storage.url}/{name}: is not JSON ({first_line(error)})") from error
    if not isinstance(data, dict):
        raise UserError(f"{storage.url}/{name}: expected a JSON object, found {type(data).__name__}")
    return data
