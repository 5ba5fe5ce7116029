"""The life of OUT: claimed, filled, valid at one moment.

While an expansion is under way OUT holds `.lesa-ray/run.json` (whose work this is) and no `config.json`; so nothing
can mistake it for a checkpoint. Shards take their names when they are whole. Then come the tokenizer and the like,
the model card, the index and the manifest, and `config.json` last: from that moment OUT is a checkpoint. A run that
finds its own fingerprint goes on where the last one stopped; any other content is left alone and refused."""

from __future__ import annotations

import json
import os
from typing import Any, Literal

from lesa_ray import __version__
from lesa_ray.checkpoint.manifest import FORMAT, MANIFEST_FILE, LayerRecord, Manifest, manifest_bytes, read_manifest
from lesa_ray.checkpoint.mark import is_free, mark, marked_by
from lesa_ray.checkpoint.room import MARGIN, check_free
from lesa_ray.checkpoint.shards import INDEX_FILE, Shard, index_bytes
from lesa_ray.checkpoint.side_files import CARD_FILE, copy_side_files
from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.errors import UserError
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.plan import Old
from lesa_ray.expansion.widths import RULE
from lesa_ray.expansion.workbench import units_storage
from lesa_ray.faults import reaching
from lesa_ray.layerwise.folder import has_our_code, naming_our_code, write_code
from lesa_ray.places import shown

State = Literal["fresh", "resume", "done"]


def check_out(base: str, out: str) -> None:
    """Raises: UserError if OUT is BASE, or lies inside it, or is a file, or a link that leads nowhere."""
    base, out = os.path.expanduser(base), os.path.expanduser(out)
    if "://" in out or not os.path.isdir(base):
        if "://" in out and (out.rstrip("/") + "/").startswith(base.rstrip("/") + "/"):
            raise UserError(f"OUT {out}: lies inside BASE; give a place of its own")
    else:
        inner, outer = os.path.realpath(out), os.path.realpath(base)
        if os.path.commonpath([inner, outer]) == outer:
            raise UserError(f"OUT {out}: lies inside BASE; give a folder of its own")
    if os.path.isfile(out):
        raise UserError(f"OUT {out}: is a file; give a folder that is empty or not there yet")
    if os.path.islink(out) and not os.path.exists(out):
        raise UserError(f"OUT {out}: is a link to {os.readlink(out)}, which is not there; make that folder")


def out_state(expansion: Expansion) -> State:
    """What OUT is to this expansion. Raises: UserError if it holds anything else, or cannot be read; MachineError."""
    out = expansion.job.config.out
    storage = Storage(out)
    with reaching(f"OUT {out}"):
        if is_free(storage):
            return "fresh"
        if storage.exists("config.json"):
            manifest = read_manifest(storage)
            if manifest is not None and manifest.get("fingerprint") == expansion.fingerprint:
                return "done"
            what = "another expansion, or one of other inputs or settings" if manifest else "a checkpoint"
            version = manifest["identity"].get("lesa_ray") if manifest and "identity" in manifest else __version__
            if version != __version__:
                what += f", made by lesa-ray {version} (this is {__version__})"
            raise UserError(f"OUT {out}: holds {what}; give a new place, or remove it")
        whose = marked_by(storage, f"OUT {out}")
        if whose == expansion.fingerprint:
            return "resume"
        if whose is not None:
            raise UserError(
                f"OUT {out}: holds an unfinished expansion of other inputs or settings; repeat that command, or "
                "remove it"
            )
        raise UserError(f"OUT {out}: is not empty; give a new place, or empty it")


def check_room(expansion: Expansion) -> None:
    """Raises: MachineError if the disk has no room for what is missing; nothing is written."""
    out = expansion.job.config.out
    if not Storage(out).is_local:
        return
    there = units_storage(out).list()
    unmade = expansion.left_by(unit for unit in expansion.units if unit.file not in there)
    check_free(out, sum(shard.nbytes for shard in missing_shards(expansion)) + unmade + MARGIN)


def claim(expansion: Expansion) -> None:
    """Mark OUT as this expansion's."""
    mark(Storage(expansion.job.config.out), expansion.fingerprint, base=shown(expansion.job.config.base))


def take_up(expansion: Expansion) -> None:
    """Remove what tries that were killed left half-written, where nobody else is at work. Raises: MachineError if the
    disk has no room for what is missing."""
    out = expansion.job.config.out
    for storage in (Storage(out), units_storage(out)):
        storage.remove_leftovers()
    check_room(expansion)


def missing_shards(expansion: Expansion) -> list[Shard]:
    """The files of the result that are not there yet."""
    sizes = Storage(expansion.job.config.out).list()
    return [shard for shard in expansion.shards if sizes.get(shard.file) != shard.nbytes]


def finish(expansion: Expansion, manifest: Manifest, card: str) -> None:
    """Add what a checkpoint has beside its shards; OUT is valid from the last write on."""
    storage = Storage(expansion.job.config.out)
    source = expansion.checkpoint
    beside = {name: nbytes for name, nbytes in source.files.items() if name != MANIFEST_FILE}
    copy_side_files(source.storage, storage, beside, code=not has_our_code(expansion.config))
    write_code(storage, expansion.config)
    storage.write(CARD_FILE, card.encode())
    if len(expansion.shards) > 1:
        storage.write(INDEX_FILE, index_bytes(list(expansion.shards)))
    storage.write(MANIFEST_FILE, manifest_bytes(manifest))
    storage.remove_leftovers()
    config = naming_our_code(expansion.config)
    storage.write("config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    storage.remove_tree(WORK_DIR)


def abandon(expansion: Expansion) -> None:
    """Remove what this expansion wrote (and OUT itself, if nothing else is in it): the input turned out to be wrong."""
    storage = Storage(expansion.job.config.out)
    storage.remove_tree(WORK_DIR)
    for shard in expansion.shards:
        storage.remove(shard.file)
    storage.remove_leftovers()
    storage.remove_if_empty()


def make_manifest(expansion: Expansion, reports: dict[str, Any]) -> Manifest:
    """reports: what each unit reported, by its name."""
    job = expansion.job
    plan = job.whole_plan
    index_of = {output.id: index for index, output in enumerate(plan.outputs)}
    layers: list[LayerRecord] = []
    for index, output in enumerate(plan.outputs):
        if isinstance(output, Old):
            layers.append(LayerRecord(index=index, kind="old", base_layers=[output.id], neighbours=[]))
            continue
        above = [] if job.method.copies or output.upper is None else [output.upper]
        sources = [output.lower, *above]
        layers.append(
            LayerRecord(
                index=index,
                kind="copy" if job.method.copies else "new",
                base_layers=[plan.origin(source) for source in sources],
                neighbours=[index_of[source] for source in sources],
            )
        )
    sized = {unit.name: index_of[unit.makes[0][0]] for unit in expansion.units if unit.sized}
    manifest = Manifest(
        format=FORMAT,
        fingerprint=expansion.fingerprint,
        base=shown(job.config.base),
        family=job.anatomy.family,
        method=job.method.name,
        paper=job.method.paper,
        identity=expansion.identity,
        layers=layers,
        zeroed=sorted({job.anatomy.types[name].tensor for name in job.zeroed}),
        train=job.method.trains,
        new_layers=[layer["index"] for layer in layers if layer["kind"] != "old"],
        parameters={"base": expansion.checkpoint.parameters, "result": expansion.parameters},
        fit={name: report for name, report in sorted(_by_fit(reports).items()) if report and name not in sized},
    )
    if job.widths is not None:
        kept = {str(index): reports[name] for name, index in sorted(sized.items(), key=lambda item: item[1])}
        manifest["widths"] = {"rule": RULE, "multiple": job.widths.multiple, "new": kept}
    return manifest


def _by_fit(reports: dict[str, Any]) -> dict[str, Any]:
    """Units' reports, those of several fits (`Method.run`) one by one."""
    return {name: fit for unit, report in reports.items() for name, fit in report.get("fits", {unit: report}).items()}
