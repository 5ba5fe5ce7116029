"""Does zeroing these tensors really keep the function? Try it on a miniature of the same architecture.

Names alone can mislead: an output projection under an unexpected name, or a norm after the addition (BERT), and the
function is silently lost. So before a method that promises to keep it touches a checkpoint, a model of the same class
and settings but two layers (one of each kind, where layers differ), few heads and a small vocabulary is made with
random weights, expanded by the code that expands the real one, loaded, and the logits before and after are
compared: they must be equal to the last bit. Where new layers have widths of their own, so have the miniature's, so
that its change of class is tried too. It costs 5 to 10 s, most of it the import of transformers, and no weight of the
base is read."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import Any

from lesa_ray.checkpoint.anatomy import Anatomy
from lesa_ray.checkpoint.depth import NO_LISTS, completed_config
from lesa_ray.checkpoint.reader import Checkpoint
from lesa_ray.checkpoint.residual import residual_writers
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.checkpoint.writer import write_shard
from lesa_ray.config import ExpandConfig
from lesa_ray.errors import MachineError, UserError
from lesa_ray.expansion.layout import Expansion, lay_out
from lesa_ray.expansion.method import Job
from lesa_ray.expansion.miniature import miniature, narrow, quiet_transformers, shake
from lesa_ray.expansion.out import finish, make_manifest
from lesa_ray.expansion.same_layers import check_same_layers
from lesa_ray.expansion.workbench import run_unit
from lesa_ray.faults import explain, is_disk

_ALONE = threading.Lock()
"""transformers patches itself while a model is made, for all threads."""
_WIDTHS = (0.5, 2.0)
"""Of the miniature's new layers, where those of the real model get widths of their own: one is cut, one widened."""


def check_function(expansion: Expansion) -> None:
    """Try all that headers do not show: that old layers stay the same, and that the function is kept if that is
    promised and not tried yet. Raises: UserError."""
    check_layers(expansion)
    if expansion.job.zero_init and not expansion.rehearsed:
        rehearse(expansion)


def check_layers(expansion: Expansion) -> None:
    """Raises: UserError if an old layer would be another in the deeper model (`lesa_ray.expansion.same_layers`), or if
    the language model of a larger one cannot be loaded by itself.

    Families whose settings are all known, and layers with widths of their own, are taken as they are."""
    job = expansion.job
    if expansion.checkpoint.left_out:
        _check_loads(expansion.checkpoint)
    if job.anatomy.family in NO_LISTS or job.widths is not None:
        return
    places = dict(enumerate(job.whole_plan.origins))
    with _ALONE, quiet_transformers():
        check_same_layers(expansion.checkpoint.config, expansion.config, places, job.config.base)


def _check_loads(checkpoint: Checkpoint) -> None:
    """Raises: UserError if its tensors are not those of its model."""
    from lesa_ray.training.conversion import plan_conversions
    from lesa_ray.training.model import build

    where = f"BASE {checkpoint.base}: its language model by itself, {checkpoint.config['model_type']}"
    with _ALONE, quiet_transformers():
        plan_conversions(build(checkpoint.config, where), checkpoint.tensors, where)


def rehearse(expansion: Expansion) -> None:
    """Raises: UserError if a zero-initialised expansion of this architecture changes its function, or cannot be
    tried; MachineError if the machine lacks what it takes to try."""
    job = expansion.job
    full = completed_config(expansion.checkpoint.config, job.config.base)
    hint = "use --no-zero-init if the new layers may change the function"
    if full is None:
        raise UserError(
            f"{job.method.name}: {job.anatomy.family} is not known to transformers, so it cannot be tried whether "
            f"zeroed output projections keep its function; {hint}"
        )
    with _ALONE, tempfile.TemporaryDirectory(prefix="lesa-ray-") as folder, quiet_transformers():
        failure: Exception | None = None
        bounds = narrow(full)
        for at, also in enumerate([bounds, {}] if bounds else [{}]):  # some cannot be made narrow
            try:
                difference = _difference(full, os.path.join(folder, str(at)), job, also)
                break
            except (UserError, MachineError):
                raise
            except Exception as error:
                if _is_machines(error):
                    raise MachineError(
                        f"{job.method.name}: could not be tried on a miniature, whose files lie in "
                        f"{tempfile.gettempdir()}: {explain(error)}"
                    ) from error
                failure = error  # a miniature of an unusual architecture can fail in ways of its own
        else:
            raise UserError(
                f"{job.method.name}: a miniature of {job.anatomy.family} could not be built to try whether its "
                f"function is kept ({type(failure).__name__}: {' '.join(str(failure).split())[:160]}); {hint}"
            ) from failure
    if difference != 0:
        raise UserError(
            f"{job.method.name}: zero-initialised layers do not keep the function of {job.anatomy.family}: its layers "
            f"do more than add to the residual stream (outputs of a miniature differ by {difference:.2g}); {hint}"
        )


def _is_machines(error: Exception) -> bool:
    """Whether the machine lacks room, memory or threads; safetensors and Python say so in words alone."""
    lacking = "No space left", "Disk quota exceeded", "can't start new thread"
    return is_disk(error) or isinstance(error, MemoryError) or any(said in str(error) for said in lacking)


def _difference(full: dict[str, Any], folder: str, job: Job, also: dict[str, int]) -> float:
    """Largest difference of the miniature's outputs before and after; NaN counts as infinite."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.set_num_threads(1)  # as `run_unit` leaves it: sums of other threads differ in their last bits
    keep = _of_each_kind(job.anatomy)
    raw = miniature(full, keep=keep, also=also)
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    base, out = os.path.join(folder, "base"), os.path.join(folder, "out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _new_model(full, config)
        shake(model)
    tokens = torch.arange(2, 34).reshape(2, 16)
    model = model.eval()
    with torch.no_grad():
        before = model(tokens)[0]
    model.save_pretrained(base)
    del model
    new_width = None if job.config.new_width is None else _WIDTHS
    small = lay_out(ExpandConfig(base=base, out=out, method="llama-pro", layers=2 * len(keep), new_width=new_width))
    if lacking := _writers(job.anatomy) - _writers(small.job.anatomy):
        raise ValueError(f"its layers have no {min(lacking)}")
    for unit in small.units:
        run_unit(small.job, unit, small.made_in, small.checkpoints, out)
    for shard in small.shards:
        write_shard(Storage(out), shard)
    finish(small, make_manifest(small, {unit.name: {} for unit in small.units}), card="")
    deeper = _model_class(small.config).from_pretrained(out, local_files_only=True, trust_remote_code=False).eval()
    with torch.no_grad():
        after = deeper(tokens)[0]
    worst = (before - after).abs().max().item()
    return worst if worst == worst else float("inf")


def _of_each_kind(anatomy: Anatomy) -> list[int]:
    """Layers of the model, two at least, among which each kind of those worked on is."""
    if anatomy.own is None:
        return [anatomy.below, anatomy.below + 1]
    kinds = [anatomy.own.index(kind) for kind in dict.fromkeys(anatomy.own)]
    return sorted(anatomy.below + kind for kind in kinds)


def _writers(anatomy: Anatomy) -> set[str]:
    """What writes into the residual stream, where experts lie in one tensor as where each has its own."""
    types = (anatomy.types[name] for name in residual_writers(anatomy.types))
    return {t.of_its_kind.replace("experts.*.", "experts.").removesuffix("[*]").removesuffix(".weight") for t in types}


def _new_model(full: dict[str, Any], config: Any) -> Any:
    """A model with random weights, of the class that config.json names."""
    cls = _model_class(full)
    return cls.from_config(config, trust_remote_code=False) if cls.__name__.startswith("Auto") else cls(config)


def _model_class(full: dict[str, Any]) -> Any:
    """The class that config.json names, or the Auto class for causal language models."""
    import transformers

    names = full.get("architectures") or [""]
    return getattr(transformers, names[0], transformers.AutoModelForCausalLM)
