"""What is to be looked at: the settings of `lesa-ray analyze`."""

from __future__ import annotations

from pydantic import Field, model_validator

from lesa_ray.config import DtypeName, LesaSettings, Seed, Settings, Several
from lesa_ray.evaluation.settings import DeviceName, SplitName
from lesa_ray.machines import Gpus
from lesa_ray.sizes import Bytes

_OF_DATA = ("tokens", "split", "text_column", "window", "dtype")


class AnalyzeConfig(Settings):
    """One analysis of one checkpoint."""

    base: str
    """Checkpoint to look at: a folder, a Hugging Face repo id, or an fsspec URL."""
    out: str | None = None
    """Folder (or fsspec URL) that gets analysis.json and analysis.html. By default nothing is written."""
    page: bool = True
    """Write analysis.html too; it takes `pip install 'lesa-ray[report]'`, and is left out without."""
    data: Several = ()
    """Text (files, folders, globs, URLs of what `tokenize` reads) or one folder of token blocks, for what
    each layer adds to the residual stream. Without it the weights alone are looked at."""
    tokens: int = Field(default=8192, ge=1)
    """How many tokens of the data the model reads."""
    split: SplitName = "heldout"
    """Which split of token blocks; text has none."""
    text_column: str = "text"
    """The column of rows that holds the text."""
    window: int | None = Field(default=None, ge=1)
    """Tokens that the model sees at once. By default what the checkpoint allows, for text at most 2,048, for token
    blocks the length of their rows."""
    dtype: DtypeName | None = None
    """Element type to compute the forward pass in. By default as stored."""
    device: DeviceName | None = None
    """By default a GPU where there is one."""
    fit: bool | None = None
    """Fit LESA's predictor to each weight type and score it on held-out layers. By default where the layers have at
    most 200 million weights: minutes on two cores; an 8B model takes as long as `expand` does."""
    match: bool | None = None
    """Match neurons and heads of neighbouring layers, and say how like they are then, beside chance. By default as for
    fit; of an 8B model it takes a GPU."""
    lesa: LesaSettings = LesaSettings()
    """Settings of that fit."""
    seed: Seed = 0
    """Of all random numbers."""
    memory_budget: Bytes | None = None
    """Host memory of one weight type's work, in bytes or with a unit. By default four fifths of what is free.
    What does not fit goes to a file, as `expand`'s does (LESA_RAY_SCRATCH)."""
    gpus_per_task: Gpus | None = None
    """GPUs for the forward pass, over which the model is spread; on a cluster also the GPU, or the part of one, that a
    weight type asks Ray for, one at most. By default one where there are some, else none."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """On a cluster, CPU cores for one weight type. By default the cluster's, divided among the types."""

    @model_validator(mode="after")
    def _consistent(self) -> AnalyzeConfig:
        if self.fit and self.lesa.holdout == 0:
            raise ValueError("fit with lesa.holdout 0: nothing would be held out to score it on")
        if not self.data and (unused := [name for name in _OF_DATA if name in self.model_fields_set]):
            raise ValueError(f"{unused[0]}: is for data; name some, or leave it out")
        return self
