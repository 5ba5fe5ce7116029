"""What one worker does, from a process group to the last checkpoint. Knows nothing of Ray.

build ▸ freeze ▸ gates of new layers ▸ shard ▸ load (or initialise) ▸ take up the last checkpoint ▸ loop
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lesa_ray.training import checkpoints
from lesa_ray.training.buffers import persistent_buffers
from lesa_ray.training.conversion import Conversion
from lesa_ray.training.flops import peak_flops, step_flops
from lesa_ray.training.freeze import freeze
from lesa_ray.training.gates import Gates
from lesa_ray.training.loop import Loop, Place, Progress, Trainer, make_optimizer
from lesa_ray.training.metrics import MetricsLog
from lesa_ray.training.model import build, initialise, layers_of, load, shard, stored_types, trained_parameters
from lesa_ray.training.run import Run


def set_up(run: Run, device: torch.device, *, fresh: bool = False) -> tuple[Trainer, int, float]:
    """The trainer of this worker, as the last complete checkpoint left it; the steps done; model FLOPs of a step.

    fresh: look for no checkpoint. The process group must be up. Raises: UserError, MachineError."""
    config = run.config
    place = Place(dist.get_rank(), dist.get_world_size(), device)
    model = build(run.architecture, run.name)
    freeze(model, run.trained)
    gates = None if run.insertion is None else Gates(layers_of(model), run.insertion, device)
    seq_len = run.blocks.seq_len
    flops = step_flops(model, tokens=config.batch * seq_len, seq_len=seq_len, lowest_layer=run.lowest)
    shard(
        model,
        init_device_mesh(device.type, (place.workers,)),
        bf16=run.bf16,
        stored={} if run.checkpoint is None else stored_types(run.checkpoint, run.conversions),
        lowest=run.lowest,
        activation_checkpointing=config.activation_checkpointing,
        compiled=config.compile,
        cpu_offload=config.cpu_offload,
    )
    trained = trained_parameters(model, run.trained)
    optimizer = make_optimizer(trained, config)
    checkpoints.init_optimizer_state(optimizer)
    last = None if fresh else _last_checkpoint(run)
    if run.checkpoint is not None:
        load(model, run.checkpoint, run.conversions if last is None else _not_trained(run.conversions, trained))
    elif last is None:
        initialise(model, run.architecture, config.seed)
    if last is not None:
        checkpoints.load(config.out, last, trained, optimizer, _kept_buffers(run, model))
    scored = config.batch * (seq_len - 1) if run.blocks.kind == "text" else None
    trainer = Trainer(model, trained, optimizer, config, place, run.steps, seq_len, scored, gates)
    return trainer, last.step if last is not None else 0, flops


def train(run: Run, device: torch.device, tell: Callable[[Progress], None]) -> None:
    """Train from the last complete checkpoint (or the start) to the end. The process group must be up.

    tell: is called on rank 0 now and then. Raises: UserError, MachineError."""
    config = run.config
    trainer, first, flops = set_up(run, device)
    kept = _kept_buffers(run, trainer.model)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "one of all the workers, so each is in it"
    saver = checkpoints.Saver(config.out, run.identity, config.keep, group, kept, first)
    metrics = None
    if trainer.place.rank == 0:
        metrics = MetricsLog(
            config.out,
            config.loggers,
            resume_step=first,
            run_name=os.path.basename(config.out.rstrip("/")),
            settings=config.model_dump(mode="json"),
        )
    try:
        peak = None
        if device.type == "cuda" and run.bf16:
            peak = peak_flops(torch.cuda.get_device_name(device), torch.bfloat16)
        Loop(trainer, run.blocks, saver, metrics, tell, flops, peak).run(first)
    finally:
        if metrics is not None:
            metrics.close()


def _kept_buffers(run: Run, model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that training checkpoints hold: those that no base does."""
    return {} if run.checkpoint is not None else persistent_buffers(model)


def _not_trained(conversions: Iterable[Conversion], trained: Container[str]) -> list[Conversion]:
    """Those that make something that no training checkpoint holds: a frozen parameter or a buffer."""
    return [conversion for conversion in conversions if not all(name in trained for name in conversion.targets)]


def _last_checkpoint(run: Run) -> checkpoints.Record | None:
    """The last complete checkpoint, the same one for all workers: rank 0 looks."""
    found: list[checkpoints.Record | None] = [None]
    if dist.get_rank() == 0:
        records = checkpoints.find_complete(run.config.out, run.identity)
        found = [records[-1] if records else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]
