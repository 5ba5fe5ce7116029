"""From settings to a laid-out expansion: the base is opened by its headers, its anatomy read, the layers planned, the
method's work split into units, and every file of the result laid out to the byte. Nothing is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lesa_ray import __version__
from lesa_ray.checkpoint.anatomy import Anatomy, Differ, WeightType, read_anatomy
from lesa_ray.checkpoint.depth import deeper_config
from lesa_ray.checkpoint.header import FLOAT_BYTES, TensorEntry
from lesa_ray.checkpoint.names import LAYER
from lesa_ray.checkpoint.reader import Checkpoint, open_checkpoint
from lesa_ray.checkpoint.shards import OutTensor, Shard, Span, header_bytes, plan_shards, shard_limit
from lesa_ray.config import ExpandConfig
from lesa_ray.errors import MachineError, UserError
from lesa_ray.expansion.importance import read_importance
from lesa_ray.expansion.method import Copy, Job, Method, Unit, Zero, check_settings, make_job
from lesa_ray.expansion.methods.resizing import resizing_units
from lesa_ray.expansion.methods.slots import vectors_unit
from lesa_ray.expansion.plan import New, Old
from lesa_ray.expansion.registry import get_method
from lesa_ray.expansion.widths import WHOLE_LAYERS, plan_widths
from lesa_ray.expansion.workbench import made_name, result_dtype, unit_tensors, units_storage
from lesa_ray.layerwise.conversion import as_layerwise, require_convertible, with_layer_widths
from lesa_ray.layerwise.names import MODEL_TYPE

_PLACEMENT_SETTINGS = {"base", "out", "gpus_per_task", "memory_budget", "importance"}
"""Settings that do not count for what the result is; where a file lies does not, its content does."""


@dataclass(frozen=True)
class Expansion:
    """An expansion, decided and laid out. Picklable, holds no weights."""

    job: Job
    checkpoint: Checkpoint
    variants: tuple[Checkpoint, ...]
    units: tuple[Unit, ...]
    shards: tuple[Shard, ...]
    config: dict[str, Any]
    """config.json of the result."""
    importance: str | None = None
    """SHA-256 of the analysis.json from which the position follows."""
    chosen: str | None = None
    """Why `--method auto` took the method; None where the method was named."""
    rehearsed: bool = False
    """Whether it was tried on a miniature that the function is kept."""

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The base, and its variants."""
        return self.checkpoint, *self.variants

    @property
    def parameters(self) -> int:
        """Elements of all float tensors of the result."""
        return sum(
            tensor.nbytes // FLOAT_BYTES[tensor.dtype]
            for shard in self.shards
            for tensor in shard.tensors
            if tensor.dtype in FLOAT_BYTES
        )

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that units leave below OUT until the result is assembled."""
        return self.left_by(self.units)

    def left_by(self, units: Iterable[Unit]) -> int:
        """Those of some units."""
        return sum(tensor.nbytes for unit in units for tensor in unit_tensors(self.job, unit))

    @property
    def made_in(self) -> dict[str, str]:
        """For each tensor that a unit makes or keeps, the unit's file."""
        return {tensor.name: unit.file for unit in self.units for tensor in unit_tensors(self.job, unit)}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything the result's bytes depend on: settings that count, the base, the variants, the code's version."""
        settings = self.job.config.model_dump(mode="json", exclude=_PLACEMENT_SETTINGS)
        variants = {variant: open_checkpoint(variant).digests() for variant in self.job.config.variants}
        raw_config = self.checkpoint.storage.read("config.json")
        return {
            "lesa_ray": __version__,
            "settings": settings,
            "choices": self.job.method.choices(self.job),
            "base": self.checkpoint.digests(),
            "base_config": hashlib.sha256(raw_config).hexdigest(),
            "variants": variants,
            **({"importance": self.importance} if self.importance is not None else {}),
            **self._heads,
        }

    def check_unchanged(self) -> None:
        """At the end of the work. Raises: UserError if weights of the base or a variant are others than at its
        beginning: the result would hold parts of both; MachineError if they are away."""
        variants = self.identity["variants"]
        before = [self.identity["base"], *(variants[variant] for variant in self.job.config.variants)]
        for checkpoint, digests in zip(self.checkpoints, before, strict=True):
            files = checkpoint.storage.list()
            if away := sorted(set(checkpoint.shards) - set(files)):
                raise MachineError(f"checkpoint {checkpoint.base}: {away[0]} was there and is not any more")
            same_sizes = all(files.get(file) == checkpoint.files[file] for file in checkpoint.shards)
            if not same_sizes or checkpoint.digests() != digests:
                raise UserError(
                    f"checkpoint {checkpoint.base}: its weights changed during the run, and OUT would hold parts of "
                    "both; take a copy that nobody writes to"
                )

    @property
    def _heads(self) -> dict[str, Any]:
        """The slots' heads where these are a tenth or more too few: until they were the nearest multiple such slots got
        one more for each KV head, and a result of that time is another."""
        widths = self.job.widths
        if widths is None:
            return {}
        heads = [slot.heads for slot in widths.slots]
        enough = all(10 * n > 9 * asked for n, asked in zip(heads, widths.asked_heads, strict=True))
        return {} if enough else {"heads": heads}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `identity`: two runs with the same one give the same bytes."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()


def lay_out(config: ExpandConfig) -> Expansion:
    """Decide and lay out an expansion by a named method from the headers of its base. Raises: UserError."""
    limit = shard_limit(config.shard_size)
    method = get_method(config.method)
    check_settings(config, method)
    checkpoint = open_checkpoint(config.base)
    if config.new_width is not None:
        require_convertible(checkpoint.config, config.base)
    differ = _may_differ(method, checkpoint)
    anatomy = read_anatomy(checkpoint, differ=differ, hint=WHOLE_LAYERS)
    variants = tuple(_open_variant(checkpoint, anatomy, variant, differ) for variant in config.variants)
    importance = read_importance(config, checkpoint, anatomy)
    job = make_job(config, anatomy, method, importance.influence if importance is not None else None)
    job = _with_widths(job, checkpoint)
    _check_supported(job)
    _check_vectors(job, checkpoint)
    units = list(method.units(job))
    if (vectors := vectors_unit(job)) is not None:
        units.append(vectors)
    units.extend(resizing_units(job, units))
    groups = [_old_tensors(job, checkpoint), _new_tensors(job, checkpoint, units)]
    return Expansion(
        job=job,
        checkpoint=checkpoint,
        variants=variants,
        units=tuple(units),
        shards=tuple(plan_shards(groups, limit)),
        config=_result_config(job, checkpoint),
        importance=importance.digest if importance is not None else None,
    )


def _may_differ(method: Method, checkpoint: Checkpoint) -> Differ:
    """What the method can take of layers that differ."""
    if method.copies:
        return "tensors"
    return "shapes" if method.pads and checkpoint.config.get("model_type") == MODEL_TYPE else "below"


def _with_widths(job: Job, checkpoint: Checkpoint) -> Job:
    """The job with the widths of its layers, if they differ or are to."""
    factors = job.config.new_width
    if factors is None and (job.method.copies or job.anatomy.family != MODEL_TYPE):
        return job
    widths = plan_widths(checkpoint, job.anatomy, job.plan, factors)
    if widths.are_even:
        return job
    return replace(job, widths=widths, anatomy=replace(job.anatomy, types=widths.padded_types(job.anatomy.types)))


def _result_config(job: Job, checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of the result."""
    base, layers = job.config.base, job.anatomy.depth
    raw = checkpoint.config if job.widths is None else as_layerwise(checkpoint.config, base, layers)
    config = deeper_config(raw, job.whole_plan.origins, layers, base, job.config.dtype)
    if job.widths is None:
        return config
    widths = [job.widths.of(output.id) for output in job.plan.outputs]
    return with_layer_widths(config, [width.neurons for width in widths], [width.heads for width in widths])


def _open_variant(checkpoint: Checkpoint, anatomy: Anatomy, variant: str, differ: Differ) -> Checkpoint:
    """Raises: UserError if its layers are not like the base's."""
    base, opened = checkpoint.base, open_checkpoint(variant)
    other = read_anatomy(opened, differ=differ)
    mine = {name: t.shape for name, t in anatomy.types.items()}
    theirs = {name: t.shape for name, t in other.types.items()}
    if other.depth != anatomy.depth:
        raise UserError(f"--variants {variant}: has {other.depth} layers, BASE {base} has {anatomy.depth}")
    if other.below != anatomy.below:
        raise UserError(
            f"--variants {variant}: its layers are alike from layer {other.below} on, those of BASE {base} from layer "
            f"{anatomy.below} on"
        )
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            found, expected = (list(s) if s else "absent" for s in (theirs.get(name), mine.get(name)))
            raise UserError(f"--variants {variant}: {name} is {found}, in BASE {base} it is {expected}")
    if other.stack != anatomy.stack:
        raise UserError(f"--variants {variant}: names its layers {other.stack}*, BASE {base} {anatomy.stack}*")
    for name in () if differ != "shapes" else (anatomy.name(layer, t) for layer in range(anatomy.layers) for t in mine):
        found, expected = (list(one.tensors[name].shape) for one in (opened, checkpoint))
        if found != expected:
            raise UserError(f"--variants {variant}: {name} is {found}, in BASE {base} it is {expected}")
    return opened


def _check_supported(job: Job) -> None:
    unknown = f"cannot tell which tensors of a {job.anatomy.family} layer write into the residual stream"
    if job.zero_init and not job.zeroed:
        raise UserError(
            f"{job.method.name}: {unknown}, so they cannot be zeroed; "
            "use --no-zero-init if the new layers may change the function"
        )
    if job.output_scale != 1 and not job.scaled:
        raise UserError(f"output_scale {job.output_scale:g}: {unknown}; leave it out")
    if job.method.copies:
        return
    for weight_type in job.anatomy.types.values():
        if weight_type.kind == "other" and len(weight_type.shape) == 3 and weight_type.dtype in FLOAT_BYTES:
            raise UserError(
                f"{job.method.name}: {weight_type.name} is a 3-D tensor {list(weight_type.shape)}, which only "
                "llama-pro and solar can expand"
            )


def _check_vectors(job: Job, checkpoint: Checkpoint) -> None:
    """Raises: UserError if vectors are to come from layers in which they have another length."""
    if job.vectors == "lower" or job.widths is not None:
        return
    first = job.anatomy.below
    for weight_type in job.anatomy.vectors:
        for layer in range(job.anatomy.layers):
            name = job.anatomy.name(layer, weight_type.name)
            if not job.anatomy.has(layer, weight_type.name):
                raise UserError(f"--vectors {job.vectors}: not every layer has it: {name}; use --vectors lower")
            entry = checkpoint.entry(name)
            if entry.shape != weight_type.shape:
                raise UserError(
                    f"--vectors {job.vectors}: {name} has {entry.shape[0]} entries, in layer {first} it has "
                    f"{weight_type.shape[0]}; use --vectors lower"
                )


def _old_tensors(job: Job, checkpoint: Checkpoint) -> list[OutTensor]:
    """The base's tensors under their names in the result, in the order of their bytes in the base."""
    renamed = {
        job.anatomy.name(output.id, name): job.anatomy.name(index, name)
        for index, output in enumerate(job.plan.outputs)
        if isinstance(output, Old)
        for name in job.anatomy.stored(output.id)
    }
    renamed |= {name: _moved_above(job, name) for name in job.anatomy.outside}
    entries = sorted(checkpoint.tensors.values(), key=lambda entry: (entry.file, entry.offset))
    return [_copied(job, checkpoint, entry, renamed.get(entry.name, entry.name), check=True) for entry in entries]


def _moved_above(job: Job, name: str) -> str:
    """What a tensor outside the stack is called in the result: layers above it stay above."""
    match = LAYER.match(name)
    if match is None or int(match["index"]) < job.anatomy.depth:
        return name
    return f"{match['stack']}{int(match['index']) + len(job.plan.slots)}.{match['type']}"


def _new_tensors(job: Job, checkpoint: Checkpoint, units: list[Unit]) -> list[OutTensor]:
    """The new layers' tensors, layer by layer, with the place of their bytes: base, unit's file, or nowhere (zeros)."""
    made: dict[str, Span] = {}
    url = units_storage(job.config.out).url
    for unit in units:
        planned = unit_tensors(job, unit)
        offset = len(header_bytes(planned))
        for tensor in planned:
            made[tensor.name] = Span(url, unit.file, offset, tensor.nbytes, tensor.dtype, tensor.name)
            offset += tensor.nbytes
    tensors: list[OutTensor] = []
    for index, output in enumerate(job.plan.outputs):
        if not isinstance(output, New):
            continue
        for name, types in job.anatomy.stored(job.plan.origin(output.lower)).items():
            parts = tuple(_new_tensor(job, checkpoint, made, output, index, weight_type) for weight_type in types)
            if types[0].name == name:
                tensors.extend(parts)
            else:
                shape = (len(parts), *parts[0].shape)
                tensors.append(OutTensor(job.anatomy.name(index, name), parts[0].dtype, shape, None, parts))
    return tensors


def _new_tensor(
    job: Job, checkpoint: Checkpoint, made: dict[str, Span], slot: New, index: int, weight_type: WeightType
) -> OutTensor:
    """A weight type of the new layer at `index`. made: where what units make lies, by its name there."""
    name = job.anatomy.name(index, weight_type.name)
    content = job.content(slot, weight_type)
    scale = job.output_scale if weight_type.name in job.scaled else 1.0
    sized = job.resizes(slot, weight_type)
    if isinstance(content, Copy) and not sized:
        entry = checkpoint.entry(job.anatomy.name(content.layer, weight_type.name))
        return _copied(job, checkpoint, entry, name, check=False, scale=scale)
    source = None if isinstance(content, Zero) else made[made_name(slot.id, weight_type.name, sized=sized)]
    source = source and replace(source, scale=scale)
    shape, dtype = job.shape(slot, weight_type), weight_type.dtype
    if job.widths is None:  # where layers differ, whole ones are copied: as in the layer it comes from
        like = checkpoint.entry(job.anatomy.name(job.plan.origin(slot.lower), weight_type.name))
        shape, dtype = like.shape, like.dtype
    return OutTensor(name, result_dtype(job, dtype), shape, source)


def _copied(
    job: Job, checkpoint: Checkpoint, entry: TensorEntry, name: str, *, check: bool, scale: float = 1.0
) -> OutTensor:
    source = Span(
        checkpoint.storage.url,
        entry.file,
        entry.offset,
        entry.nbytes,
        entry.dtype,
        entry.name,
        check and entry.is_float,
        scale,
    )
    return OutTensor(name, result_dtype(job, entry.dtype), entry.shape, source)
