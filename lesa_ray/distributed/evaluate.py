"""`lesa_ray.distributed.evaluate.evaluate`: several checkpoints on the same data, side by side.

    headers of all checkpoints, files of the data, names of the tasks ▸ a Ray task each ▸ differences ▸ report

Whatever is wrong and can be seen in headers is found before anything is loaded. What is found later, in one checkpoint,
stops no other: the report has what was measured, and the error in place of the rest. One checkpoint on data alone is
measured in this process, since starting Ray would cost more, unless one is named (`address.named_ray`). Tasks always
run in a process of Ray's: lm-evaluation-harness prints to standard output as it pleases, where `--json` belongs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lesa_ray import __version__
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed.address import named_ray
from lesa_ray.distributed.report_file import try_place, write_report
from lesa_ray.distributed.shared import Landmark, check_landmarks, data_files, landmarks
from lesa_ray.errors import MachineError, SomeFailed, SomeWrong, UserError
from lesa_ray.evaluation.checkpoints import Bounds, read_bounds
from lesa_ray.evaluation.data import BlockData, TextData, open_data
from lesa_ray.evaluation.harness import resolve_tasks
from lesa_ray.evaluation.measure import Job, Outcome, make_job, measure
from lesa_ray.evaluation.paired import difference
from lesa_ray.evaluation.placement import require_accelerate
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.expansion.runner import Listener, Silent
from lesa_ray.training.tokens import MANIFEST

if TYPE_CHECKING:
    from lesa_ray.distributed.cluster import Share

End = Outcome | UserError | MachineError
"""What became of a checkpoint."""
FORMAT = 1
FILE = "evaluation.json"
_INTERPRETER_BYTES = 2 * 2**30  # a worker with torch and transformers, the logits of a batch


def evaluate(
    config: EvaluateConfig, listener: Listener | None = None, *, use_ray: bool | None = None
) -> dict[str, Any]:
    """Measure every checkpoint of `config`; the report as JSON values, which `config.out` gets too.

    use_ray: None decides by the number of checkpoints, tasks, and whether a Ray is named.
    Raises: UserError for wrong input, naming the checkpoint or the data; MachineError for a fault; SomeWrong or
    SomeFailed, with the report, which `config.out` has then too, if that is so of some checkpoints and not of others;
    NotWritten if the report was made but `config.out` does not take it."""
    listener, begin = listener or Silent(), time.monotonic()
    place = None if config.out is None else _place(config.out)
    listener.phase("reading the headers", 0)
    with ThreadPoolExecutor(8) as pool:
        bounds = list(pool.map(read_bounds, config.checkpoints))
    require_accelerate(config.gpus_per_task)
    config = config.model_copy(update={"tasks": resolve_tasks(config.tasks)})
    job = make_job(config, open_data(config), bounds)
    if use_ray is None:
        use_ray = len(bounds) > 1 or bool(config.tasks) or named_ray() is not None
    if use_ray:
        listener.phase("starting Ray", 0)
        ends = _side_by_side(job, bounds, listener)
    else:
        ends = _in_turn(job, bounds, listener)
    differences, ends = _compared(ends)
    errors = [end for end in ends if not isinstance(end, Outcome)]
    if len(errors) == len(ends):
        raise errors[0]
    report = _report(job, ends, differences, time.monotonic() - begin)
    if place is not None:
        write_report(report, *place)
    if errors:
        kind = SomeWrong if isinstance(errors[0], UserError) else SomeFailed
        rest = f" (and {len(errors) - 1} more that could not be measured)" if len(errors) > 1 else ""
        raise kind(f"{errors[0]}{rest}", report) from errors[0]
    return report


def _place(out: str) -> tuple[Storage, str]:
    """The folder and the name that `out`, a `.json` file or a folder for `FILE`, means. Raises: as `try_place`."""
    folder, name = out.rstrip("/"), FILE
    if folder.endswith(".json"):
        folder, _, name = folder.rpartition("/")
    return try_place(out, folder or ("/" if out.startswith("/") else ".")), name


def _in_turn(job: Job, bounds: list[Bounds], listener: Listener) -> list[End]:
    """One checkpoint after another in this process."""
    listener.phase(_title(job.config.checkpoints), len(bounds))
    ends: list[End] = []
    for bound in bounds:

        def progress(phase: str, share: float, bound: Bounds = bound) -> None:
            listener.progress(len(ends) + share, f"{bound.name}: {phase}")

        ends.append(_end_of(partial(measure, job, bound, progress)))
    return ends


def _end_of(outcome: Callable[[], Outcome]) -> End:
    try:
        return outcome()
    except (UserError, MachineError) as error:
        return error


def _side_by_side(job: Job, bounds: list[Bounds], listener: Listener) -> list[End]:
    """One Ray task for each checkpoint."""
    from lesa_ray.distributed.board import on_board, open_board
    from lesa_ray.distributed.cluster import share_of_task
    from lesa_ray.distributed.health import Health
    from lesa_ray.distributed.start import start_ray
    from lesa_ray.distributed.tasks import Tasks

    start_ray()
    names = job.config.checkpoints
    share = share_of_task(
        "a checkpoint",
        len(names),
        device=job.config.device,
        gpus=job.config.gpus_per_task,
        cpus=job.config.cpus_per_task,
        tell=lambda text: listener.phase(text, 0),
    )
    listener.phase(_title(names), len(names))
    health = Health(job.config.out or names[0], "evaluate")
    ends: dict[int, End] = {}
    data = landmarks(_data_folders(job))
    with open_board() as board, Tasks[int](_task) as tasks:
        for index, bound in enumerate(bounds):
            own = landmarks([(f"checkpoint {bound.name}", Storage(bound.url), "config.json")])
            tasks.start(
                index,
                f"evaluate {bound.name}",
                *(job, bound, share, str(index), board, (*own, *data)),
                **share.options(bound.weights(job.config.dtype) + _INTERPRETER_BYTES),
            )
        while tasks:
            for index, outcome in tasks.ends():
                ends[index] = _end_of(outcome)
                health.task_ended()
            state = on_board(board) or {}
            shares = [1.0 if i in ends else state.get(str(i), ("", 0.0))[1] for i in range(len(names))]
            busy = [f"{names[i]}: {state[str(i)][0]}" for i in tasks if str(i) in state]
            listener.progress(sum(shares), tasks.told(", ".join(busy[:2])))
    return [ends[index] for index in range(len(names))]


def _data_folders(job: Job) -> list[tuple[str, Storage, str]]:
    """A file of each folder of data, for `landmarks`."""
    if isinstance(job.data, BlockData):
        return [(f"DATA {job.data.name}", Storage(job.data.split.url), MANIFEST)]
    return data_files(job.data.files) if job.data is not None else []


def _task(job: Job, bound: Bounds, share: Share, key: str, board: Any, folders: tuple[Landmark, ...]) -> Outcome:
    from lesa_ray.distributed.board import posting

    check_landmarks(folders)
    post = posting(board, key)
    device = share.begin()
    if not share.gpus:
        job = replace(job, config=job.config.model_copy(update={"device": device}))
    return measure(job, bound, post)


def _title(names: tuple[str, ...]) -> str:
    return f"measuring {names[0]}" if len(names) == 1 else f"measuring {len(names)} checkpoints"


def _compared(ends: list[End]) -> tuple[list[dict[str, Any] | None], list[End]]:
    """How each differs from the first, and the ends: one that cannot be compared, as it read another text, failed."""
    first, found = ends[0], list(ends)
    differences: list[dict[str, Any] | None] = [None] * len(ends)
    for at, end in enumerate(ends[1:], 1):
        if not isinstance(first, Outcome) or not isinstance(end, Outcome):
            continue
        if end.scores is not None and first.scores is not None:
            try:
                differences[at] = difference(end.scores, first.scores, first.record["checkpoint"])
            except UserError as error:
                found[at] = UserError(f"checkpoint {end.record['checkpoint']}: {error}")
    return differences, found


def _report(job: Job, ends: list[End], differences: list[dict[str, Any] | None], seconds: float) -> dict[str, Any]:
    records: list[dict[str, Any]] = []
    for name, end, differs in zip(job.config.checkpoints, ends, differences, strict=True):
        if not isinstance(end, Outcome):
            records.append({"checkpoint": name, "error": " ".join(str(end).split())})
            continue
        records.append({**end.record, **({} if differs is None else {"difference": differs})})
    return {
        "format": FORMAT,
        "lesa_ray": __version__,
        "settings": job.config.model_dump(mode="json"),
        "data": _data_record(job.data),
        "window": job.window or None,
        "stride": job.stride or None,
        "checkpoints": records,
        "seconds": seconds,
    }


def _data_record(data: TextData | BlockData | None) -> dict[str, Any] | None:
    if data is None:
        return None
    if isinstance(data, TextData):
        return {
            "kind": "text",
            "name": data.name,
            "files": len(data.files),
            "file_bytes": data.total,
            "unread_files": data.unread,
        }
    return {
        "kind": "blocks",
        "name": data.name,
        "content": data.kind,
        "split": data.split.name,
        "seq_len": data.split.seq_len,
        "rows": data.split.rows,
        "digest": data.digest,
    }
