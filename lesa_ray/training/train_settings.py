"""Settings of continual pre-training, pre-training from scratch and fine-tuning: type, unit, default and its source.

Which settings are part of what a run is: all that change a bit of its result but the number of workers (whose sums
round differently, no more). Those of `OPERATIONAL` are not: they may differ when a run is taken up again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lesa_ray.config import Seed, Settings
from lesa_ray.machines import GROW_SECONDS, Gpus
from lesa_ray.training.data_settings import TokenizeConfig

Schedule = Literal["cosine", "wsd", "linear", "constant"]
Precision = Literal["auto", "bf16", "fp32"]
ScratchDtype = Literal["float32", "bfloat16"]
LoggerName = Literal["mlflow", "wandb"]
InsertOrder = Literal["together", "bottom", "top"]
Beta = Annotated[float, Field(ge=0, lt=1)]

OPERATIONAL = (
    "out",
    "workers",
    "gpus_per_worker",
    "cpus_per_worker",
    "micro_batch",
    "activation_checkpointing",
    "compile",
    "cpu_offload",
    "checkpoint_every",
    "keep",
    "eval_every",
    "log_every",
    "loggers",
    "wait",
    "retries",
)
"""Settings that do not change what a run computes, rounding apart."""
INSERTION = ("insert_over", "insert_order")
"""Settings of how new layers come in."""


class TrainConfig(Settings):
    """One training run: what is trained, on what, for how long, how, and by how many workers."""

    checkpoint: str | None = None
    """Checkpoint to train on: a folder, a Hugging Face repo id or an fsspec URL; none: `architecture` from scratch."""
    architecture: str | dict[str, Any] | None = None
    """Pre-training from scratch: a config.json (a path or URL of it or of its folder), or its content."""
    data: str
    """Token blocks (`lesa-ray tokenize`): a folder or an fsspec URL."""
    out: str
    """Where the trained checkpoint goes, and the run's own files in `training/` below it: a folder or an fsspec URL."""
    train: tuple[str, ...] = ()
    """What is trained: `new` (layers that `expansion.json` calls new), `all`, `norms`, `embeddings`, `lm_head`, or
    patterns of parameter names as in `*.mlp.*`. By default what `expansion.json` says its method trains, `all` from
    scratch."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens to train on, instead of steps (rounded up to whole steps)."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes through the training split, instead of steps (rounded up to whole steps). One by default."""
    batch: int = Field(default=64, ge=1)
    """Rows (sequences) of one optimizer step over all workers: 64 × 2,048 tokens are OpT-DeUS's step."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Rows a worker takes through the model at once; the rest of its share follows (gradient accumulation). By
    default as many as have at most 4,096 tokens."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak of AdamW's learning rate (LLaMA Pro, arXiv 2401.02415, section 4.1)."""
    schedule: Schedule = "cosine"
    """How the rate falls after the warm-up: `cosine` and `linear` to `final_rate`; `wsd` (warm-up, stable, decay:
    Hägele et al., arXiv 2405.18392) stays and falls linearly over the last `decay`; `constant` stays."""
    warmup: float = Field(default=0.06, ge=0)
    """Warm-up from zero: a share of the steps if below 1 (LLaMA Pro: 6 %), else steps."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """wsd: share of the steps over which the rate falls (Hägele et al.: 0.1 to 0.2 suffice)."""
    final_rate: float = Field(default=0.0, ge=0, le=1)
    """The rate at the end, as a share of the peak."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's, on matrices only (LLaMA Pro; GPT-3, Llama)."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's (GPT-3, Llama)."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient (LLaMA Pro; GPT-3, Llama)."""
    precision: Precision = "auto"
    """`bf16`: matrix products and activations in bfloat16; trained weights, sums of gradients and the optimizer in
    float32. `fp32`: everything in float32. `auto`: bf16 on GPUs and on CPUs with AMX, else fp32."""
    seed: Seed = 0
    """Order of the data; and the initial weights from scratch."""
    dtype: ScratchDtype | None = None
    """From scratch: element type of the result, bfloat16 unless given. With a checkpoint it is the checkpoint's."""
    insert_over: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps over which new layers come in, behind gates that open linearly from 0 (where the model is the
    base, whatever the method) to 1; 0 has them in at once (Karras et al., arXiv 1710.10196; Masked Structural Growth,
    arXiv 2305.02869)."""
    insert_order: InsertOrder = "together"
    """With `insert_over`: all new layers `together`, or one after another from the `bottom` or the `top`."""
    eval_rows: int = Field(default=256, ge=0)
    """Rows of the held-out split that the held-out loss is measured on, spread evenly over it; 0 measures none."""

    activation_checkpointing: bool = False
    """Make activations of trained layers anew in the backward pass: about a third more time, far less memory."""
    compile: bool = False
    """Compile each layer (`torch.compile`)."""
    cpu_offload: bool = False
    """Keep sharded weights, gradients and optimizer state in the CPU's memory."""
    workers: int | tuple[int, int] = 1
    """Worker processes: `8`, or `2-8`, the fewest and the most: as many as are free at the start, after a fault, and
    when a checkpoint is complete."""
    gpus_per_worker: Gpus | None = None
    """GPUs of a worker. By default one where the cluster has GPUs, else none. A part of one is for a single worker:
    NCCL refuses two of a run on one GPU."""
    cpus_per_worker: int | None = Field(default=None, ge=1)
    """CPU cores and threads of a worker. By default one beside a GPU, else, and with `cpu_offload`, the cluster's cores
    shared out."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints: what a killed run loses at most, with those done while one was written."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept: the last so many, and the one with the least held-out loss."""
    eval_every: int = Field(default=500, ge=1)
    """Steps between measurements of the held-out loss; it is measured before the first and after the last step too."""
    log_every: int = Field(default=10, ge=1)
    """Steps between rows of metrics; whether the loss is still a number is looked at as often."""
    loggers: tuple[LoggerName, ...] = ()
    """Where metrics go beside metrics.jsonl and TensorBoard."""
    wait: float = Field(default=GROW_SECONDS, ge=0)
    """Seconds to wait until a running cluster can give the workers, for which it is asked to grow."""
    retries: int = Field(default=3, ge=0)
    """How often the workers are started again after a fault without a new checkpoint in between."""

    @field_validator("train", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        """`new,norms` is two."""
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return value
        return tuple(name.strip() for part in parts for name in str(part).split(",") if name.strip())

    @field_validator("betas", mode="before")
    @classmethod
    def _two(cls, value: object) -> object:
        """`0.9,0.95` is two."""
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("workers", mode="before")
    @classmethod
    def _range(cls, value: object) -> object:
        """`2-8` is a range, `2` a number."""
        if isinstance(value, str):
            low, dash, high = value.partition("-")
            if low.strip().isdigit() and (not dash or high.strip().isdigit()):
                return (int(low), int(high)) if dash else int(low)
            raise ValueError(f"{value!r}: expected a number or a range such as 2-8")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.checkpoint is None) == (self.architecture is None):
            raise ValueError("give a checkpoint to train on or an architecture to begin from scratch, one of the two")
        if sum(value is not None for value in (self.steps, self.tokens, self.epochs)) > 1:
            raise ValueError("give steps, tokens or epochs, one of them")
        if self.checkpoint is not None and self.dtype is not None:
            raise ValueError("dtype: the result has the checkpoint's; it is a choice only from scratch")
        if self.architecture is not None and self.train not in ((), ("all",)):
            raise ValueError("train: from scratch everything is trained")
        if self.architecture is not None and self.insert_over:
            raise ValueError("insert_over: from scratch no layer is new")
        if self.insert_order != "together" and not self.insert_over:
            raise ValueError(f"insert_order {self.insert_order}: layers are in at once; give insert_over too")
        low, high = self.worker_range
        if not 1 <= low <= high:
            raise ValueError(f"workers {low}-{high}: expected at least 1, and the fewest first")
        if low == high and self.batch % low:
            raise ValueError(f"batch {self.batch}: cannot be divided among {low} workers; give a multiple")
        if self.batch < high:
            raise ValueError(f"batch {self.batch}: is less than a row for each of {high} workers")
        if self.gpus_per_worker and self.gpus_per_worker > 1:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g}: a worker computes on one GPU; give more workers"
            )
        if high > 1 and self.gpus_per_worker and self.gpus_per_worker < 1:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g}: {high} workers cannot share a GPU; give 1, or one worker"
            )
        if self.schedule == "wsd" and self.warmup < 1 and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together are more than the whole run")
        return self

    @property
    def needs_manifest(self) -> bool:
        """Whether a checkpoint's `expansion.json` decides what is trained, or how."""
        return not self.train or "new" in self.train or bool(self.insert_over)

    @property
    def not_counted(self) -> set[str]:
        """Names of the settings that do not change what this run computes."""
        return {*OPERATIONAL, *(() if self.insert_over else INSERTION)}

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)


class FinetuneConfig(TrainConfig):
    """Supervised fine-tuning on conversations: as `TrainConfig`, with the defaults usual for it.

    They are Stanford Alpaca's (github.com/tatsu-lab/stanford_alpaca): 2e-5, cosine, 3 % warm-up, no weight decay, 3
    epochs. Its batch of 128 conversations, about 120 tokens each, fills 8 packed rows of 2,048; 16 leave room for
    longer ones."""

    data: str
    """Instruction data: .jsonl or .parquet rows with `messages`, `prompt` and `response`, or `instruction` and
    `output`; a file, a folder, a glob, an fsspec URL, the name of a Hugging Face dataset; or token blocks made with
    `lesa-ray tokenize --kind chat`."""
    train: tuple[str, ...] = ("all",)
    """What is trained: `all`, `new` (layers that `expansion.json` calls new), `norms`, `embeddings`, `lm_head`, or
    patterns of parameter names as in `*.mlp.*`."""
    batch: int = Field(default=16, ge=1)
    """Rows of one optimizer step over all workers, each of many conversations."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes through the conversations, instead of steps. By default 3, if neither steps nor tokens are given."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak of AdamW's learning rate."""
    warmup: float = Field(default=0.03, ge=0)
    """Warm-up from zero: a share of the steps if below 1, else steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's, on matrices only."""
    seed: Seed = 0
    """Order of the data."""
    tokenizer: str | None = None
    """A folder, repo id or URL with a tokenizer and its chat template. By default the checkpoint's."""
    seq_len: int = Field(default=2048, ge=2, le=2**24)
    """Tokens in a row; conversations are packed into rows whole, and do not see each other."""
    holdout: float = Field(default=0.01, ge=0, lt=1)
    """Share of the conversations held out."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What becomes of a conversation longer than a row: cut after `seq_len` tokens, or left out."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What becomes of a row that is no conversation, or one that the chat template does not take: it ends the run,
    which goes on once it is mended; or it is left out."""
    dataset_config: str | None = None
    """Which configuration of a Hugging Face dataset, if not its default."""
    dataset_split: str = "train"
    """Which split of a Hugging Face dataset."""

    @model_validator(mode="after")
    def _needs_checkpoint(self) -> FinetuneConfig:
        if self.checkpoint is None:
            raise ValueError("checkpoint: missing; fine-tuning starts from one")
        return self

    @property
    def not_counted(self) -> set[str]:
        return super().not_counted | {"bad_rows"}

    @property
    def of_data(self) -> set[str]:
        """Names of the settings that say how conversations become token blocks."""
        return set(FinetuneConfig.model_fields) - set(TrainConfig.model_fields)

    def on_blocks(self, url: str) -> TrainConfig:
        """The training itself, once there are token blocks."""
        values = self.model_dump(exclude=self.of_data) | {"data": url}
        if self.steps is None and self.tokens is None and self.epochs is None:
            values["epochs"] = 3.0
        return TrainConfig.model_validate(values)

    def to_tokenize(self, url: str) -> TokenizeConfig:
        """How the conversations become token blocks at `url`."""
        assert self.checkpoint is not None
        given = self.model_dump(include=self.of_data) | {"tokenizer": self.tokenizer or self.checkpoint}
        return TokenizeConfig.model_validate({**given, "data": (self.data,), "out": url, "kind": "chat"})
