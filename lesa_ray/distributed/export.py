"""A checkpoint of a training run becomes a Hugging Face folder, also long after, elsewhere, and of a step that is not
the last. One export at a time works at an OUT: two of different steps would mix their files."""

from __future__ import annotations

from typing import Any

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.config import validated
from lesa_ray.distributed.tenancy import tenancy
from lesa_ray.errors import UserError
from lesa_ray.expansion.runner import Listener, Silent
from lesa_ray.faults import reaching, taken_up_again
from lesa_ray.training.checkpoints import Record, best_of, find_complete
from lesa_ray.training.export import Exported, export, is_exported
from lesa_ray.training.finish import export_plan, facts
from lesa_ray.training.identity import CONTENTS, in_words
from lesa_ray.training.metrics import metrics_rows
from lesa_ray.training.run import LEASE_DIR, RUN_FILE, Run, prepare, read_json
from lesa_ray.training.train_settings import TrainConfig


def export_checkpoint(
    url: str,
    out: str,
    which: str,
    base: str | None = None,
    data: str | None = None,
    listener: Listener | None = None,
) -> Exported:
    """Write a checkpoint of the run at `url` as a Hugging Face folder at `out`.

    which: `last`, `best` (the least held-out loss) or a step. base, data: where the checkpoint that the training began
    from and its token blocks lie now, if not where they were.
    Raises: UserError if there is no such run or checkpoint, or OUT cannot be written; MachineError."""
    with reaching(f"RUN {url}"):
        content = read_json(Storage(url), RUN_FILE)
        if content is None:
            raise UserError(f"RUN {url}: holds no training run (no {RUN_FILE})")
        records = find_complete(url, content["identity"])
    storage = Storage(out)
    with reaching(f"OUT {out}", "cannot be written"):
        storage.try_writing()
    record = _chosen(records, which, url)
    run = _run_of(content, url, base, data)
    rows = {row["step"]: row for row in metrics_rows(url, ("heldout_loss",)) if row.get("heldout_loss") is not None}
    told = {
        "steps": record.step,
        "tokens": record.tokens,
        "heldout_before": rows.get(0, {}).get("heldout_loss"),
        "heldout_after": record.heldout_loss,
    }
    if run.insertion is not None and record.step < run.insertion.steps:
        inserted = run.insertion.share(record.step)
        raise UserError(
            f"RUN {url}: at step {record.step} new layers were {100 * inserted:.0f} % inserted; an exported checkpoint "
            f"has no gates, so it would be another model; export one of step {run.insertion.steps} or later"
        )
    plan = export_plan(run, record, out)
    if is_exported(plan):
        if storage.url != Storage(url).url:
            storage.remove_tree(LEASE_DIR)  # of one that was killed with its work done
        return Exported(out, plan.nbytes, 0, reused=True)
    listener = listener or Silent()
    with tenancy(out, LEASE_DIR, listener):
        listener.phase("writing the checkpoint", 0)
        try:
            with taken_up_again(f"OUT {out}"):
                exported = export(plan, facts(run, told))
        except UserError:
            storage.remove_tree(LEASE_DIR)
            storage.within("training").remove_if_empty()
            storage.remove_if_empty()
            raise
        storage.remove_tree(LEASE_DIR)
        return exported


def _chosen(records: list[Record], which: str, url: str) -> Record:
    """The checkpoint that `which` names. Raises: UserError."""
    if not records:
        raise UserError(f"RUN {url}: has no complete checkpoint yet")
    if which == "last":
        return records[-1]
    if which == "best":
        best = best_of(records)
        if best is None:
            raise UserError(f"RUN {url}: none of its checkpoints has a held-out loss; give last or a step")
        return best
    found = [record for record in records if str(record.step) == which]
    if not found:
        steps = ", ".join(str(record.step) for record in records)
        raise UserError(f"RUN {url}: has no checkpoint {which}; there are {steps}, last and best")
    return found[0]


def _run_of(record: dict[str, Any], url: str, base: str | None, data: str | None) -> Run:
    """The run of a record. Raises: UserError if what an export reads is not there, or has changed since; MachineError.

    Settings do not count, which this version may know others of, nor do the data where only their name is told."""
    given = {name: value for name, value in record["config"].items() if name in TrainConfig.model_fields}
    moved = {"checkpoint": base, "data": data or _in_new_place(given["data"], given["out"], url)}
    given |= {"out": url, **{name: place for name, place in moved.items() if place is not None}}
    before = record.get("counted", {})
    if "steps" in before:
        given |= {"steps": before["steps"], "tokens": None, "epochs": None}
    try:
        run = prepare(validated(TrainConfig, given, "its settings"), gpus=False)
    except UserError as error:
        hint = "; if they were moved, say where they are: --base, --data" if base is None or data is None else ""
        raise UserError(f"RUN {url}: what it was made of cannot be read ({error}){hint}") from error
    copied = run.checkpoint is not None and run.blocks.kind != "chat"
    read = ["config", "weights", "trained", *([] if copied else ["data"])]
    if changed := [name for name in read if before.get(name) != run.counted[name]]:
        why = in_words(record, [CONTENTS[name] for name in changed])
        raise UserError(f"RUN {url}: what it was made of has changed since ({why})")
    return run


def _in_new_place(data: str, before: str, now: str) -> str:
    """Token blocks that lie in a run's own folder, which may have been moved."""
    inside = data.removeprefix(f"{before}/")
    return data if inside == data else f"{now.rstrip('/')}/{inside}"
