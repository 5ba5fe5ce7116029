"""A training run before it begins: everything that can be wrong is looked at here, from headers alone.

What a run is, its identity: a hash over the checkpoint's digests (or the architecture), the token blocks' digest, the
parameters that are trained and every setting that counts. OUT belongs to one run:

    OUT/training/run.json       whose OUT this is; written first
    OUT/training/…              metrics.jsonl, tensorboard/, checkpoints/, result.json
    OUT/…, OUT/config.json      the trained checkpoint; config.json is written last, from then on the run is done
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, Literal

from lesa_ray import __version__
from lesa_ray.checkpoint.manifest import Manifest, own_manifest
from lesa_ray.checkpoint.reader import Checkpoint, open_checkpoint
from lesa_ray.checkpoint.settings import longest_window
from lesa_ray.checkpoint.storage import Storage, read_file
from lesa_ray.errors import UserError
from lesa_ray.faults import explain, reaching
from lesa_ray.training.conversion import Conversion, plan_conversions
from lesa_ray.training.identity import counted, differences, identity_of, in_words
from lesa_ray.training.insertion import Insertion, plan_insertion
from lesa_ray.training.tied import check_tied
from lesa_ray.training.tokens import TokenBlocks, open_blocks
from lesa_ray.training.train_settings import TrainConfig

RUN_FILE = "training/run.json"
RESULT_FILE = "training/result.json"
LEASE_DIR = "training/lease"
"""Says who is at work at OUT."""
FORMAT = 1

State = Literal["fresh", "resume", "done"]


@dataclass(frozen=True)
class Run:
    """A run that can begin. Holds no weights; picklable, so that workers can carry it."""

    config: TrainConfig
    checkpoint: Checkpoint | None
    conversions: tuple[Conversion, ...]
    """How its tensors make up the model's."""
    manifest: Manifest | None
    architecture: dict[str, Any]
    """The content of the model's config.json."""
    blocks: TokenBlocks
    trained: tuple[str, ...]
    """Names of the trained parameters."""
    lowest: int | None
    """The lowest trained layer; None if something below the layers is trained."""
    steps: int
    bf16: bool
    parameters: int
    trained_parameters: int
    insertion: Insertion | None
    """How new layers come in; None if they are in at once."""
    counted: dict[str, Any]
    """What the result depends on (`lesa_ray.training.identity`)."""
    identity: str

    @property
    def name(self) -> str:
        """What messages call the model."""
        return f"checkpoint {self.checkpoint.base}" if self.checkpoint is not None else "architecture"

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.config.batch * self.blocks.seq_len


def prepare(config: TrainConfig, *, gpus: bool) -> Run:
    """Look at everything. gpus: whether workers will have GPUs (decides `precision: auto`).

    Raises: UserError, with one line that says what is wrong; MachineError if a store does not answer."""
    from lesa_ray.training.freeze import default_choice, freeze, trained_names
    from lesa_ray.training.loop import total_steps
    from lesa_ray.training.model import build, layers_of
    from lesa_ray.training.packing_check import check_packing

    config = config.model_copy(update={"out": Storage(config.out).url})  # workers run in folders of their own
    blocks = open_blocks(config.data)
    checkpoint = manifest = None
    if config.checkpoint is not None:
        where = f"checkpoint {config.checkpoint}"
        checkpoint = open_checkpoint(config.checkpoint, where)
        architecture = checkpoint.config
    else:
        architecture, where = read_architecture(config), "architecture"
    model = build(architecture, where)
    layers = len(layers_of(model))
    if checkpoint is not None:
        with reaching(where):
            manifest = own_manifest(checkpoint.storage, layers, where, needed=config.needs_manifest)
    conversions: tuple[Conversion, ...] = ()
    if checkpoint is not None:
        conversions = tuple(plan_conversions(model, checkpoint.tensors, where))
        check_tied(model, checkpoint, conversions, where)
    check_data(blocks, architecture, model.config.get_text_config(), where)
    if blocks.kind == "chat":
        check_packing(architecture, where, blocks.seq_len)
    chosen = config.train or (("all",) if checkpoint is None else default_choice(manifest, str(config.checkpoint)))
    trained = trained_names(model, chosen, manifest, where)
    lowest = freeze(model, trained)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    bf16 = use_bf16(config, gpus)
    steps = total_steps(config, blocks.train, blocks.seq_len)
    insertion = plan_insertion(config, manifest, steps, where)
    content = counted(config, checkpoint, architecture, blocks, trained, steps, bf16)
    return Run(
        config, checkpoint, conversions, manifest, architecture, blocks, trained, lowest, steps, bf16,
        sum(sizes.values()), sum(sizes[name] for name in trained), insertion, content, _identity(config, content),
    )  # fmt: skip


def _identity(config: TrainConfig, content: dict[str, Any]) -> str:
    """That of the run at OUT, if it is this one: its checkpoints bear it."""
    record = _record(config.out)
    before = None if record is None or differences(record, content, config) else record.get("identity")
    return str(before or identity_of(content))


def _record(out: str) -> dict[str, Any] | None:
    with reaching(f"OUT {out}"):
        return read_json(Storage(out), RUN_FILE)


def read_architecture(config: TrainConfig) -> dict[str, Any]:
    """The config.json to begin from. Raises: UserError; MachineError if its store does not answer."""
    given = config.architecture
    if isinstance(given, dict):
        return given
    assert given is not None
    where = f"architecture {given}"
    text = read_file(given if given.endswith(".json") else f"{given}/config.json", where)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({explain(error)[:200]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: is not a JSON object")
    return content


def check_data(blocks: TokenBlocks, architecture: dict[str, Any], text_config: Any, where: str) -> None:
    """Raises: UserError if the token blocks do not suit the model."""
    if not blocks.train.rows:
        raise UserError(f"data {blocks.url}: there is no row to train on")
    positions = longest_window(text_config)
    if positions is not None and positions < blocks.seq_len:
        raise UserError(
            f"data {blocks.url}: its rows have {blocks.seq_len} tokens, {where} was made for {positions}; tokenize "
            f"with --seq-len {positions}"
        )
    size = int(text_config.vocab_size)
    if blocks.largest_id >= size:
        raise UserError(
            f"data {blocks.url}: its tokens go up to {blocks.largest_id}, the vocabulary of {where} has {size}; "
            "tokenize with the model's own tokenizer"
        )


def use_bf16(config: TrainConfig, gpus: bool) -> bool:
    """Whether matrix products run in bfloat16; `auto` is what the run at OUT has decided already, if there is one."""
    if config.precision != "auto":
        return config.precision == "bf16"
    record = _record(config.out)
    if record is not None and isinstance(record.get("bf16"), bool):
        return bool(record["bf16"])
    if gpus:
        return True
    import torch

    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def gpus_before(config: TrainConfig) -> float | None:
    """GPUs of each worker: as asked for, else what the run at OUT had, so that machines with GPUs that were lost are
    waited for; None where nothing says so."""
    if config.gpus_per_worker is not None:
        return config.gpus_per_worker
    before = (_record(config.out) or {}).get("gpus_per_worker")
    return max(1.0, before) if isinstance(before, int | float) and before > 0 else None


def read_json(storage: Storage, name: str) -> dict[str, Any] | None:
    """A JSON object, or None where there is none."""
    try:
        content = json.loads(storage.read(name))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def out_state(run: Run) -> State:
    """What OUT is to this run. Raises: UserError if it holds anything else."""
    out = run.config.out
    storage = Storage(out)
    record = read_json(storage, RUN_FILE)
    if record is None:
        check_place(storage, out)
        return "fresh"
    if record.get("identity") != run.identity:
        different = differences(record, run.counted, run.config)
        raise UserError(
            f"OUT {out}: holds a run of other inputs or settings ({in_words(record, different)}); give a new place, or "
            "remove it"
        )
    return "done" if is_done(storage) else "resume"


def is_done(storage: Storage) -> bool:
    """Whether a run has ended at a place, whichever it was."""
    return storage.exists("config.json") and storage.exists(RESULT_FILE)


def check_place(storage: Storage, out: str) -> None:
    """Raises: UserError if OUT holds anything but token blocks that were made for this run (`training/data`), and the
    lease of who made them."""
    ours = storage.within("training")
    files = [name for name in (*storage.list(), *ours.list()) if not name.endswith(".tmp")]  # a killed write's
    if files or set(storage.folders()) - {"training"} or set(ours.folders()) - {"data", "lease"}:
        raise UserError(f"OUT {out}: is not empty; give a new place, or empty it")


def summary(run: Run) -> dict[str, Any]:
    """What a person would compare two runs by."""
    shown = run.config.model_dump(
        mode="json", exclude=run.config.not_counted | {"architecture", "train", "tokens", "epochs", "precision"}
    )
    return {**shown, "steps": run.steps, "trained_parameters": run.trained_parameters, "bf16": run.bf16}


def _found_anywhere(config: TrainConfig) -> dict[str, str]:
    """Local places that the run reads, by their whole paths: who exports it may work in another folder."""
    places = {"data": config.data, "checkpoint": config.checkpoint, "architecture": config.architecture}
    return {
        name: os.path.abspath(os.path.expanduser(place))
        for name, place in places.items()
        if isinstance(place, str) and "://" not in place and os.path.exists(os.path.expanduser(place))
    }


def claim(run: Run, gpus_per_worker: float = 0.0) -> None:
    """Mark OUT as this run's. gpus_per_worker: what its workers get, and get again when it goes on (`gpus_before`)."""
    content = {
        "format": FORMAT,
        "lesa_ray": __version__,
        "identity": run.identity,
        "counted": run.counted,
        "bf16": run.bf16,
        "gpus_per_worker": gpus_per_worker,
        "summary": summary(run),
        "data": run.blocks.digest,
        "config": run.config.model_copy(update=_found_anywhere(run.config)).model_dump(mode="json"),
    }
    Storage(run.config.out).write(RUN_FILE, (json.dumps(content, indent=1) + "\n").encode())
