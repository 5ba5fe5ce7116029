"""From a training checkpoint to a Hugging Face folder: frozen weights copied as bytes, trained ones written.

    plan_export (headers) ▸ begin_export (OUT is claimed) ▸ write_file, one a file ▸ finish_export (config.json last)

Decides
- The result has the base's files: names, index, order of tensors, dtypes; of the language model of a larger one, its
  part of them. A file without a trained tensor is copied whole; in others the untouched tensors are copied as bytes,
  and each trained one is read from the training checkpoint, rounded to the base's dtype, and written. Memory is bounded
  by the largest trained tensor (where the model fuses the experts of a layer: by two of those).
- Without a base (a model trained from random weights) all tensors come from the training checkpoint; tied weights are
  written once, names are those that transformers gives tensors in files.
- OUT may hold the run's own `training/`. `training/export.json` names the export whose files lie there: the same export
  keeps the files that are whole, another one begins again. OUT becomes a checkpoint when `config.json` is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lesa_ray import __version__
from lesa_ray.checkpoint.header import TORCH_NAMES, TensorEntry
from lesa_ray.checkpoint.manifest import own_manifest
from lesa_ray.checkpoint.reader import Checkpoint
from lesa_ray.checkpoint.room import MARGIN, check_free
from lesa_ray.checkpoint.settings import config_depth
from lesa_ray.checkpoint.shards import (
    INDEX_FILE,
    SINGLE_FILE,
    OutTensor,
    Shard,
    Span,
    index_bytes,
    plan_shards,
    shard_limit,
)
from lesa_ray.checkpoint.side_files import CARD_FILE, copy_side_files
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.checkpoint.writer import copy_file, write_shard
from lesa_ray.config import DtypeName
from lesa_ray.errors import UserError
from lesa_ray.layerwise.folder import has_our_code, naming_our_code, write_code
from lesa_ray.report.training_card import training_card
from lesa_ray.training.trained_state import TrainedState

if TYPE_CHECKING:
    from lesa_ray.training.export_sources import Sources

RECORD_FILE = "training/export.json"
FORMAT = 1
_TRAINED_BYTES = 4
"""Of an element of what is trained: float32."""
_GENERATION = "generation_config.json"
_WEIGHTS = re.compile(r"[^/]+\.safetensors")
_TEXT_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class OutFile:
    """One file of weights of the result. `shard` None: the base's file as it is."""

    name: str
    nbytes: int
    shard: Shard | None


@dataclass(frozen=True)
class ExportPlan:
    """An export, decided and laid out. Picklable, holds no weights."""

    out: str
    base: Checkpoint | None
    state: TrainedState
    files: tuple[OutFile, ...]
    sources: Sources
    """For each tensor that is written anew, the trained parameters it comes from."""
    config: dict[str, Any]
    """config.json of the result."""
    tokenizer: str | None
    """A folder whose files go into the result, over those of the base."""
    stop: int | None = None
    """A token at which generation is to stop, beside those at which the base stops."""

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @cached_property
    def identity(self) -> str:
        """SHA-256 over everything the weights' bytes depend on."""
        content = {
            "lesa_ray": __version__,
            "base": self.base.digests() if self.base else None,
            "state": self.state.digest(),
            "files": [[file.name, file.nbytes] for file in self.files],
            "config": self.config,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Exported:
    """What an export gave. `written`: files of weights made by this call; the others were there already."""

    out: str
    nbytes: int
    written: int
    reused: bool
    """OUT was complete already."""


def plan_export(
    base: Checkpoint | None,
    state: str,
    out: str,
    *,
    config: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    dtype: DtypeName = "bfloat16",
    shard_size: str = "5GB",
    stop: int | None = None,
) -> ExportPlan:
    """Decide and lay out an export, from headers and metadata alone. Writes nothing.

    base: the checkpoint that was trained on; None: trained from random weights, then `config` (content of config.json),
    `dtype` and `shard_size` say what the result is like. state: URL of the training checkpoint (a DCP folder).
    tokenizer: a folder whose files go into the result, over those of the base. stop: a token at which generation is to
    stop, beside the base's (what ends an answer after fine-tuning).
    Raises: UserError if state and base do not belong together; MachineError if a store does not answer.
    """
    trained = TrainedState(state)
    if not trained.shapes:
        raise UserError(f"training checkpoint {state}: holds no trained parameter (model.*)")
    from lesa_ray.training.export_sources import sources_of_base, sources_of_scratch

    if base is not None:
        sources = sources_of_base(base, trained)
        files = _files_of_base(base, sources)
        return ExportPlan(out, base, trained, files, sources, _trained_config(base), tokenizer, stop)
    if config is None:
        raise UserError(f"training checkpoint {state}: without a base the model's configuration is needed")
    limit = shard_limit(shard_size)
    sources, tensors, model = sources_of_scratch(config, trained, dtype)
    files = tuple(OutFile(shard.file, shard.nbytes, shard) for shard in plan_shards([tensors], limit))
    content = {"architectures": [model], **config, "dtype": dtype, "use_cache": True}
    content.pop("torch_dtype", None)  # its old name
    return ExportPlan(out, None, trained, files, sources, content, tokenizer, stop)


def is_exported(plan: ExportPlan) -> bool:
    """Whether OUT is this export, complete. Writes nothing.

    Raises: UserError if OUT holds a checkpoint of something else."""
    here, _ = _found(plan, Storage(plan.out))
    return here is not None and "config.json" in here and not _missing(plan, here)


def begin_export(plan: ExportPlan) -> list[OutFile]:
    """Claim OUT and return the files of weights that are not there yet; all of them, unless this export was begun
    before. Raises: UserError if OUT holds a checkpoint of something else; MachineError if the disk has no room."""
    storage = Storage(plan.out)
    here, unwanted = _found(plan, storage)
    for name in unwanted:
        storage.remove(name)
    for folder in (storage, storage.within(RECORD_FILE.rpartition("/")[0])):
        folder.remove_leftovers()  # first, as they take room
    missing = _missing(plan, here or {})
    if missing:
        check_free(plan.out, sum(file.nbytes for file in missing) + MARGIN)
    if here is None:
        files = [file.name for file in plan.files]
        content = {"format": FORMAT, "lesa_ray": __version__, "identity": plan.identity, "files": files}
        storage.write(RECORD_FILE, (json.dumps(content) + "\n").encode())
    return missing


def state_of(plan: ExportPlan, file: OutFile) -> TrainedState:
    """What of the training checkpoint one file of weights is made of."""
    tensors = file.shard.tensors if file.shard is not None else ()
    conversions = [plan.sources[tensor.name] for tensor in tensors if tensor.name in plan.sources]
    return plan.state.of(dict.fromkeys(target for conversion in conversions for target in conversion.targets))


def write_file(plan: ExportPlan, file: OutFile, state: TrainedState | None = None) -> None:
    """Write one file of weights; it appears whole or not at all. Files may be written at once, by any machines.

    state: by default the plan's, of which that of the file (`state_of`) is enough.

    Raises: UserError if a trained tensor holds NaN or Inf, or does not fit the base's dtype; MachineError."""
    storage = Storage(plan.out)
    if file.shard is None:
        assert plan.base is not None
        copy_file(plan.base.storage, storage, file.name, file.nbytes)
        return
    from lesa_ray.training.export_sources import Maker

    write_shard(storage, file.shard, make=Maker(state or plan.state, plan.sources, plan.base, plan.config))


def export_memory(plan: ExportPlan, file: OutFile) -> int:
    """Bytes that `write_file` takes at most, roughly: a trained parameter and as much on its way into the file; of
    experts that the model fuses two parameters, and a third while it is taken apart."""
    if file.shard is None:
        return 0
    largest = 0
    for tensor in file.shard.tensors:
        if (conversion := plan.sources.get(tensor.name)) is not None:
            elements = sum(math.prod(plan.state.shapes.get(target, ())) for target in conversion.targets)
            largest = max(largest, _TRAINED_BYTES * elements * (2 if conversion.plain else 4))
    return largest


def finish_export(plan: ExportPlan, facts: Mapping[str, object]) -> None:
    """Add what a checkpoint has beside its weights; OUT is valid from the last write on.

    facts: for the model card, see `lesa_ray.report.training_card`."""
    storage = Storage(plan.out)
    if plan.base is not None:
        copy_side_files(plan.base.storage, storage, plan.base.files, code=not has_our_code(plan.config))
    if plan.tokenizer is not None:
        tokenizer = Storage(plan.tokenizer)
        copy_side_files(tokenizer, storage, tokenizer.list(), code=not has_our_code(plan.config))
    write_code(storage, plan.config)
    if plan.stop is not None:
        _add_stop(storage, plan.config, plan.stop)
    depth = config_depth(plan.config)
    manifest = own_manifest(plan.base.storage, depth[1], plan.out, needed=False) if plan.base and depth else None
    storage.write(CARD_FILE, training_card(plan.base, manifest, plan.config, facts).encode())
    if len(plan.files) > 1:
        if plan.base is not None and not plan.base.is_part:
            storage.write(INDEX_FILE, plan.base.storage.read(INDEX_FILE))
        else:
            storage.write(INDEX_FILE, index_bytes([file.shard for file in plan.files if file.shard]))
    storage.remove_leftovers()
    config = naming_our_code(plan.config)
    storage.write("config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def export(
    plan: ExportPlan,
    facts: Mapping[str, object],
    run: Callable[[ExportPlan, Sequence[OutFile]], None] | None = None,
) -> Exported:
    """Export from start to end; the same call goes on after a kill.

    run: calls `write_file` for each of the files, on whatever machines; by default this process does, one file at a
    time on a local disk, four at a time on a store. Raises: UserError, and then nothing of the export is left;
    MachineError."""
    storage = Storage(plan.out)
    missing = begin_export(plan)
    if not missing and storage.exists("config.json"):
        return Exported(plan.out, plan.nbytes, 0, reused=True)
    storage.remove("config.json")  # if a file of a finished export has gone, it is not a checkpoint until it is back
    try:
        (run or _run_here)(plan, missing)
    except UserError:
        abandon_export(plan)
        raise
    finish_export(plan, facts)
    return Exported(plan.out, plan.nbytes, len(missing), reused=False)


def abandon_export(plan: ExportPlan) -> None:
    """Remove the weights that this export wrote, and its record: the input turned out to be wrong."""
    storage = Storage(plan.out)
    for name in (*(file.name for file in plan.files), RECORD_FILE):
        storage.remove(name)
    storage.remove_leftovers()


def _run_here(plan: ExportPlan, files: Sequence[OutFile]) -> None:
    with ThreadPoolExecutor(1 if Storage(plan.out).is_local else 4) as pool:
        list(pool.map(lambda file: write_file(plan, file), files))


def _add_stop(storage: Storage, config: Mapping[str, Any], stop: int) -> None:
    """Let generation stop at `stop` too: a base model stops at the end of a text, not of an answer."""
    try:
        content = json.loads(storage.read(_GENERATION))
    except FileNotFoundError:  # then transformers takes these from config.json
        content = {key: config[key] for key in _TEXT_TOKENS if config.get(key) is not None}
    there = content.get("eos_token_id")
    stops = there if isinstance(there, list) else [] if there is None else [there]
    if stop not in stops:
        content["eos_token_id"] = [stop, *stops] if stops else stop
        storage.write(_GENERATION, (json.dumps(content, indent=2) + "\n").encode())


def _files_of_base(base: Checkpoint, sources: Sources) -> tuple[OutFile, ...]:
    """The base's files, those with a tensor that is written anew laid out again."""
    files = []
    for file in base.shards:
        entries = sorted((e for e in base.tensors.values() if e.file == file), key=lambda entry: entry.offset)
        if not base.is_part and not any(entry.name in sources for entry in entries):
            files.append(OutFile(file, base.files[file], None))
            continue
        name = SINGLE_FILE if len(base.shards) == 1 else file
        shard = Shard(name, tuple(_out_tensor(base, entry, entry.name in sources) for entry in entries))
        files.append(OutFile(name, shard.nbytes, shard))
    return tuple(files)


def _out_tensor(base: Checkpoint, entry: TensorEntry, is_trained: bool) -> OutTensor:
    span = Span(base.storage.url, entry.file, entry.offset, entry.nbytes, entry.dtype, entry.name)
    return OutTensor(entry.name, entry.dtype, entry.shape, None if is_trained else span)


def _trained_config(base: Checkpoint) -> dict[str, Any]:
    """The base's configuration, ready for use: with the cache that training switches off, and the files' dtype."""
    config = {**base.config, "use_cache": True}
    if not (config.get("dtype") or config.get("torch_dtype")):
        sizes: Counter[str] = Counter()
        for entry in base.tensors.values():
            if entry.is_float:
                sizes[entry.dtype] += entry.nbytes
        config["dtype"] = TORCH_NAMES[sizes.most_common(1)[0][0]]
    return config


def _found(plan: ExportPlan, storage: Storage) -> tuple[dict[str, int] | None, list[str]]:
    """What lies at OUT: sizes of files by name if this export was begun there, else None; the weights of another that
    was not finished and is no longer wanted. Raises: UserError if OUT holds a checkpoint of something else."""
    record, here = _read_record(storage), storage.list()
    if record is not None and record.get("identity") == plan.identity:
        return here, []
    if "config.json" in here:
        what = "a checkpoint" if record is None else "an export of another training checkpoint"
        if record is not None and record.get("lesa_ray") not in (None, __version__):
            what = f"an export by lesa-ray {record['lesa_ray']}, this is {__version__}"
        raise UserError(f"OUT {plan.out}: holds {what}; give a new place, or remove it")
    unwanted = [name for name in record["files"] if name in here] if record else []
    if foreign := [name for name in here if name.endswith((".safetensors", ".bin")) and name not in unwanted]:
        raise UserError(f"OUT {plan.out}: holds weights that are not its own ({foreign[0]}); give a new place")
    return None, unwanted


def _missing(plan: ExportPlan, here: Mapping[str, int]) -> list[OutFile]:
    return [file for file in plan.files if here.get(file.name) != file.nbytes]


def _read_record(storage: Storage) -> dict[str, Any] | None:
    """What the last export to OUT was, or None."""
    try:
        record = json.loads(storage.read(RECORD_FILE))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("files"), list):
        return None
    # what is named here is removed, and the record may have come with somebody else's folder
    mine = [name for name in record["files"] if isinstance(name, str) and _WEIGHTS.fullmatch(name)]
    return {**record, "files": mine}
