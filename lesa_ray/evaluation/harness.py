"""Tasks of EleutherAI's lm-evaluation-harness, on a model that is loaded already.

Decides
- A task is a name, group, tag or pattern that the harness knows, or a file of one (`.yaml`), which needs no hub. Its
  relative `data_files` are found from its own folder, not from where the command happens to run, and a group's tasks
  there too; on a cluster all machines must see it.
- Tasks, with their data, are loaded before any weights: a name or a file that is wrong costs seconds, not hours.
- Probabilities in float32 (the harness takes the model's own element type: in bfloat16 a sum of log-probabilities has
  three digits, and choices tie). Everything else is the harness's default, so that its published figures compare.
- The harness is an extra of the package, imported only where tasks are asked for: it brings some 30 others.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lesa_ray.errors import MachineError, UserError
from lesa_ray.evaluation.perplexity import LONGEST_WINDOW, fitting_batch
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.faults import explain
from lesa_ray.gpu import is_full

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILES = (".yaml", ".yml")
_MOST = 8  # requests at once, unless told


def resolve_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Task names (patterns written out) and absolute paths of task files; no data is read.

    Raises: UserError if the harness is not installed, or a task is not known."""
    if not tasks:
        return ()
    files = [task for task in tasks if task.endswith(_FILES) or os.sep in task]
    for task in files:
        if not os.path.isfile(task) or not task.endswith(_FILES):
            raise UserError(f"--tasks {task}: there is no such task file (.yaml)")
    manager = _manager_for(tasks)
    names: list[str] = []
    for task in tasks:
        matches = [os.path.abspath(task)] if task in files else manager.match_tasks([task])
        if not matches:
            raise UserError(
                f"--tasks {task}: lm-evaluation-harness knows no such task; `lm_eval ls tasks` lists them, a task "
                "file is given by its path"
            )
        names += [name for name in matches if name not in names]
    return tuple(names)


def load_tasks(tasks: Sequence[str]) -> list[Any]:
    """The harness's own objects for `tasks` (as `resolve_tasks` gives them), with their data.

    Raises: UserError if one cannot be loaded; MachineError if its data cannot be fetched for now."""
    manager = _manager_for(tasks)
    indexed = {str(entry.yaml_path): name for name, entry in manager.task_index.items()}
    loaded: list[Any] = []
    for task in tasks:
        with _explained(f"--tasks {task}: cannot be loaded"), _inside(os.path.dirname(task)):
            # of groups, the harness (0.4.13) loads by path only those that it has found by itself
            built = manager.load([indexed.get(task, task)])
            # a group goes in whole, with its aggregates; what stands alone, as itself
            loaded += list(built["groups"].values())[:1] or list(built["tasks"].values())
    with _explained(f"--tasks {','.join(tasks)}"):
        manager.load(loaded)  # refuses a task that is there twice, alone and in a group
    return loaded


def run_tasks(
    checkpoint: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    config: EvaluateConfig,
    progress: Callable[[int], None] = lambda answers: None,
) -> dict[str, Any]:
    """The metrics of `tasks` (from `load_tasks`), by task, as JSON values. `progress` is called with the number of
    questions the model has answered.

    Raises: UserError if a task fails."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=config.batch_size or min(_MOST, fitting_batch(model, LONGEST_WINDOW)),
        max_length=config.window,
        softmax_dtype=torch.float32,
    )
    harness.set_cache_hook(_Counter(progress))
    with _explained(f"checkpoint {checkpoint}: tasks {', '.join(config.tasks)} failed"):
        results = simple_evaluate(
            harness,
            tasks=tasks,
            num_fewshot=config.fewshot,
            limit=config.limit,
            log_samples=False,
            task_manager=_manager_for(config.tasks),
        )
    assert results is not None  # None only on the other ranks of a distributed run
    return {name: {**_record(name, results), "window": harness.max_length} for name in results["results"]}


def _record(name: str, results: Any) -> dict[str, Any]:
    """One task's metrics. The harness names them `metric,filter` and `metric_stderr,filter`."""
    found, better = results["results"][name], results.get("higher_is_better", {}).get(name, {})
    metrics = {}
    for key, value in found.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = found.get(f"{metric}_stderr,{chosen}")
            metrics[metric if chosen == "none" else key] = {
                "value": _finite(value),
                "stderr": _finite(error),
                "higher_is_better": better.get(metric),
            }
    return {
        "metrics": metrics,
        "examples": results.get("n-samples", {}).get(name, {}).get("effective"),
        "fewshot": results.get("n-shot", {}).get(name),
        "version": results.get("versions", {}).get(name),
    }


def _finite(value: object) -> float | None:
    """A number that JSON can hold; the harness says "N/A" where there is no error."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


class _Counter:
    """Counts the answers that the harness would give to its cache."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress, self._answers = progress, 0

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        self._answers += 1
        self._progress(self._answers)


def _manager_for(tasks: Sequence[str]) -> Any:
    """The harness's index of what `tasks` need. All of its own 14,000 take 8 s to read; a task file by itself none."""
    folders = set()
    own = False
    for task in tasks:
        if task.endswith(_FILES):
            with open(task, encoding="utf-8", errors="replace") as file:
                if re.search(r"^group\s*:", file.read(), re.MULTILINE):  # its tasks are in its folder or the harness's
                    folders.add(os.path.dirname(os.path.abspath(task)))
                    own = True
        else:
            own = True
    return _manager(tuple(sorted(folders)), own)


@functools.cache
def _manager(folders: tuple[str, ...], own: bool) -> Any:
    try:
        import accelerate  # noqa: F401  (lm_eval's Hugging Face model imports it, its package does not require it)
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-evaluation-harness ({error}): pip install 'lesa-ray[eval]', on every machine that works"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=list(folders) or None, include_defaults=own)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raises: in place of whatever a task, its data set or the hub raise, an error that says `what` failed."""
    try:
        yield
    except (UserError, MachineError):
        raise
    except (ConnectionError, TimeoutError) as error:
        raise MachineError(f"{what} ({explain(error)[:200]})") from error
    except Exception as error:
        if is_full(error):
            raise
        raise UserError(f"{what} ({explain(error)[:300]})") from error


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    """The working folder is `folder` while the block runs; unchanged if that is empty."""
    with contextlib.chdir(folder) if folder else contextlib.nullcontext():
        yield
