"""What is to be measured: the settings of `lesa-ray evaluate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from lesa_ray.config import DtypeName, Settings, Several
from lesa_ray.machines import Gpus

SplitName = Literal["heldout", "train"]
DeviceName = Literal["cpu", "cuda"]


class EvaluateConfig(Settings):
    """One evaluation: checkpoints, each measured on the same data and tasks."""

    checkpoints: Several = Field(min_length=1)
    """Folders, Hugging Face repo ids or fsspec URLs; differences are to the first."""
    data: Several = ()
    """Text (files, folders, globs, URLs of what `tokenize` reads), each file or row a document; or one folder of token
    blocks."""
    split: SplitName = "heldout"
    """Which split of token blocks; text has none."""
    text_column: str = "text"
    """The column of rows that holds the text."""
    window: int | None = Field(default=None, ge=1)
    """Tokens a prediction may see at most. By default what all checkpoints allow, for text at most 2,048, for token
    blocks the length of their rows; for tasks what the checkpoint allows."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens from the start of a window to that of the next. By default the window: nothing is read twice."""
    batch_size: int | None = Field(default=None, ge=1)
    """Windows (and, for tasks, requests) at once. By default as many as keep the logits below a fixed size."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many documents or rows, and questions of each task: a trial run, not a result."""
    dtype: DtypeName | None = None
    """Element type to compute in. By default as stored."""
    device: DeviceName | None = None
    """By default a GPU where there is one."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, with commas between: names, groups, patterns, or task files (.yaml)."""
    fewshot: int | None = Field(default=None, ge=0)
    """Worked examples before each question of a task. By default as the task says."""
    out: str | None = None
    """Where the report goes as JSON: a `.json` file or a folder, local or a URL. By default nowhere."""
    gpus_per_task: Gpus | None = None
    """GPUs for one checkpoint, asked of Ray where it runs; over more than one its model is spread, layer by layer. By
    default one where there are GPUs, else none."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """CPU cores for one checkpoint. By default the cluster's, divided among the checkpoints."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        """`arc_easy,piqa` is two tasks."""
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return value
        return tuple(name.strip() for part in parts for name in str(part).split(",") if name.strip())

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateConfig:
        if not self.data and not self.tasks:
            raise ValueError("nothing to measure: give data, tasks or both")
        if self.stride is not None and not self.data:
            raise ValueError("stride: is for data; name some, or leave it out")
        if self.fewshot is not None and not self.tasks:
            raise ValueError("fewshot: is for tasks; name some, or leave it out")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise ValueError(
                f"stride {self.stride}: is longer than the window ({self.window}), so tokens would be left out"
            )
        return self
