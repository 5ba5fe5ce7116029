"""Where one unit is worked on: tensors come in from the base or from earlier units, and go out to the unit's own file.

The workbench is the only place that knows both methods and files. It turns matrices the way methods want them (outputs
× inputs), looks for NaN and Inf in what comes in, and finishes a unit by writing its record after its tensors: a unit
whose record is there is done, whoever asks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.finite import assert_finite
from lesa_ray.checkpoint.header import TensorEntry, read_entries
from lesa_ray.checkpoint.reader import Checkpoint
from lesa_ray.checkpoint.shards import OutTensor
from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.checkpoint.writer import TensorFileWriter
from lesa_ray.expansion.memory import default_budget, return_freed_memory
from lesa_ray.expansion.method import Copy, Device, Job, Progress, RunContext, Unit
from lesa_ray.expansion.methods.resizing import run_resizing
from lesa_ray.expansion.methods.slots import VECTORS_UNIT, run_vectors
from lesa_ray.gpu import full_gpu_is_a_fault, gpu_memory, keep_float32
from lesa_ray.scratch import scratch_dir

if TYPE_CHECKING:
    import torch

UNITS_DIR = f"{WORK_DIR}/units"


def units_storage(out: str) -> Storage:
    """The folder below OUT where units leave their files."""
    return Storage(f"{Storage(out).url}/{UNITS_DIR}")


def made_name(slot: int, weight_type: str, *, sized: bool = False) -> str:
    """The name of a slot's tensor in its unit's file; `sized`: in the slot's own width."""
    return f"{slot}.{weight_type}" + (".sized" if sized else "")


def unit_tensors(job: Job, unit: Unit) -> tuple[OutTensor, ...]:
    """What a unit's file holds, in order: in the base's shapes or the slots' own, in the dtype of the result."""
    planned = [OutTensor(kept.name, "F64", kept.shape, None) for kept in unit.keeps]
    for slot, name in unit.makes:
        weight_type = job.anatomy.types[name]
        shape = job.shape(job.slot(slot), weight_type) if unit.sized else weight_type.shape
        file_name = made_name(slot, name, sized=unit.sized)
        planned.append(OutTensor(file_name, result_dtype(job, weight_type.dtype), shape, None))
    return tuple(planned)


def result_dtype(job: Job, dtype: str) -> str:
    """The dtype (as safetensors spells it) that a tensor of the base has in the result."""
    from lesa_ray.checkpoint.header import FLOAT_BYTES, FORMAT_NAMES

    return FORMAT_NAMES[job.config.dtype] if job.config.dtype and dtype in FLOAT_BYTES else dtype


def finished_record(job: Job, unit: Unit, out: str) -> dict[str, Any] | None:
    """The record of a unit that is done, or None."""
    storage = units_storage(out)
    if not storage.exists(record_file(unit)):
        return None
    record: dict[str, Any] = json.loads(storage.read(record_file(unit)))
    return record if storage.size(unit.file) == record["bytes"] else None


def record_file(unit: Unit) -> str:
    return unit.file.removesuffix(".safetensors") + ".json"


def run_unit(
    job: Job,
    unit: Unit,
    units: dict[str, str],
    checkpoints: Sequence[Checkpoint],
    out: str,
    *,
    device: Device = "cpu",
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Work on one unit from start to end and return its record.

    units: for each tensor that an earlier unit made (`made_name`) or kept, the file it is in.
    checkpoints: the base, and its variants.
    threads: cores used; part of what determines the bytes of the result, as sums over threads round differently.
    Raises: MachineError where a GPU's memory is full.
    """
    import torch

    torch.set_num_threads(threads)
    keep_float32()
    return_freed_memory()
    storage = units_storage(out)
    with storage.create(unit.file) as file:
        writer = TensorFileWriter(file, unit_tensors(job, unit))
        tensors = _Bench(job, checkpoints, storage, units, writer, sized=unit.sized)
        if unit.name == VECTORS_UNIT:
            report: dict[str, Any] = {}
            run_vectors(unit, job, tensors)
        elif unit.sized:
            report = run_resizing(unit, job, tensors)
        else:
            context = RunContext(
                device=device,
                device_memory=gpu_memory(job.config.gpus_per_task) if device == "cuda" else 0,
                scratch_dir=scratch_dir(),
                memory_budget=job.config.memory_budget or default_budget(),
                progress=progress,
            )
            with full_gpu_is_a_fault(f"unit {unit.name}", "--gpus-per-task 0"):
                report = job.method.run(unit, job, tensors, context)
        writer.finish()
    record = {"unit": unit.name, "bytes": storage.size(unit.file), "report": report}
    storage.write(record_file(unit), (json.dumps(record, allow_nan=False) + "\n").encode())
    return record


class _Bench:
    """Implements `lesa_ray.expansion.method.Tensors` on files."""

    def __init__(
        self,
        job: Job,
        checkpoints: Sequence[Checkpoint],
        storage: Storage,
        units: dict[str, str],
        writer: TensorFileWriter,
        *,
        sized: bool,
    ) -> None:
        self._job, self._checkpoints, self._storage, self._units = job, checkpoints, storage, units
        self._writer, self._sized = writer, sized
        self._made: dict[str, dict[str, TensorEntry]] = {}

    def read(self, layer: int, weight_type: str, variant: int | None = None) -> torch.Tensor:
        name = self.name(layer, weight_type)
        if variant is not None:
            tensor = self._checkpoints[1 + variant].read(name)
        elif layer < self._job.plan.base_layers:
            tensor = self._checkpoints[0].read(name)
        else:
            substance = self._job.substance(self._job.slot(layer), self._job.anatomy.types[weight_type])
            if isinstance(substance, Copy):
                return self.read(substance.layer, weight_type)
            tensor = self._read_made(made_name(layer, weight_type))
        assert_finite(tensor, name if variant is None else f"{name} of {self._job.config.variants[variant]}")
        if self._job.widths is not None and layer < self._job.plan.base_layers:
            tensor = self._job.widths.padded(weight_type, layer, tensor)
        return tensor.T.contiguous() if self._job.anatomy.types[weight_type].transposed else tensor

    def write(self, slot: int, weight_type: str, tensor: torch.Tensor) -> None:
        stored = tensor.T if self._job.anatomy.types[weight_type].transposed else tensor
        self._writer.write(made_name(slot, weight_type, sized=self._sized), stored)

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        self._writer.write(name, tensor)

    def kept(self, name: str) -> torch.Tensor:
        return self._read_made(name)

    def name(self, layer: int, weight_type: str) -> str:
        return self._job.anatomy.name(layer, weight_type)

    def _read_made(self, name: str) -> torch.Tensor:
        file = self._units[name]
        if file not in self._made:
            self._made[file] = {entry.name: entry for entry in read_entries(self._storage, file)}
        return Checkpoint("", self._storage, {}, {}, self._made[file]).read(name)
