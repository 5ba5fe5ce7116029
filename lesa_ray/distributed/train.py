"""`pretrain`: a training run on Ray Train, from looking at the input to the checkpoint that comes of it.

prepare (headers) ▸ room on the cluster ▸ lease and claim OUT ▸ Ray Train: workers train ▸ export ▸ config.json
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import ray

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed.cluster import machines
from lesa_ray.distributed.health import Health
from lesa_ray.distributed.room_for_workers import wait_for_room
from lesa_ray.distributed.rounds import train_in_rounds
from lesa_ray.distributed.start import start_ray
from lesa_ray.distributed.tasks import Tasks
from lesa_ray.distributed.tenancy import Tenant, tenancy
from lesa_ray.expansion.memory import INTERPRETER_BYTES
from lesa_ray.expansion.runner import Listener, Silent
from lesa_ray.faults import reaching, taken_up_again
from lesa_ray.machines import SHARE_OF_MEMORY
from lesa_ray.training.disk import check_disk
from lesa_ray.training.export import ExportPlan, OutFile, export_memory, state_of, write_file
from lesa_ray.training.finish import Trained, finish_run, is_trained, trained_result
from lesa_ray.training.lineage import replayed
from lesa_ray.training.metrics import check_loggers
from lesa_ray.training.run import LEASE_DIR, Run, claim, gpus_before, out_state, prepare
from lesa_ray.training.train_settings import TrainConfig

log = logging.getLogger(__name__)


def pretrain(config: TrainConfig, listener: Listener | None = None, *, tenant: Tenant | None = None) -> Trained:
    """Train, or go on training, or find that it is done; the result lies at `config.out`.

    tenant: who may work there, if the caller has seen to it; by default this call does.
    Raises: UserError for wrong input; MachineError for a fault, after which the same call goes on."""
    listener = listener or Silent()
    check_loggers(config.loggers)
    listener.phase("reading the headers", 0)
    run = prepare(config, gpus=False)  # wrong input, and a run that is done, are found before Ray is started
    with reaching(f"OUT {config.out}", "cannot be written"):
        state = out_state(run)
    if state == "done":
        return trained_result(run, reused=True)
    with reaching(f"OUT {config.out}", "cannot be written"):
        trained = state == "resume" and is_trained(run)
        if not trained:
            check_disk(run)
    listener.phase("starting Ray", 0)
    start_ray()
    if state == "fresh" and config.precision == "auto" and machines().gpus_each(config.gpus_per_worker):
        run = prepare(config, gpus=True)
    resources = None
    if not trained:
        if (warning := replayed(run)) is not None:
            log.warning(warning)
        resources = wait_for_room(config.model_copy(update={"gpus_per_worker": gpus_before(config)}), listener)
    with tenancy(config.out, LEASE_DIR, listener, tenant) as tenant:
        with reaching(f"OUT {config.out}", "cannot be written"):
            state = out_state(run)  # as whoever was at work there until now left it
        if state == "done":
            return trained_result(run, reused=True)
        if resources is not None:
            with reaching(f"OUT {config.out}", "cannot be written"):
                claim(run, resources.gpus)
            train_in_rounds(run, resources, listener)
        tenant.confirm()
        with taken_up_again(f"OUT {config.out}"):
            finish_run(run, listener, _export_by_tasks if _is_shared(run) else None)
    return trained_result(run, resumed=state == "resume")


def _is_shared(run: Run) -> bool:
    """Whether more machines than this one can write at OUT."""
    return not Storage(run.config.out).is_local or len(machines().nodes) > 1


def _export_by_tasks(plan: ExportPlan, files: Sequence[OutFile]) -> None:
    """Write files of weights as Ray tasks, each on a core of its own and with the memory that it takes, as far as a
    machine has that. Raises: UserError, MachineError."""
    health = Health(plan.out, "train")
    shared = ray.put(plan)
    sizes = {file.name: file.nbytes for file in files}
    most = int(SHARE_OF_MEMORY * machines().most("memory"))
    with Tasks[str](write_file) as tasks:
        for file in files:
            memory = min(export_memory(plan, file) + INTERPRETER_BYTES, most)
            tasks.start(file.name, file.name, shared, file, state_of(plan, file), num_cpus=1, memory=memory)
        while tasks:
            for name, _ in tasks.ended():
                health.task_ended(sizes[name])
