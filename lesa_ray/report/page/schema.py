"""What the page reads: `comparison.json` and `analysis.json`, version 1, as models that take what is there.

Whoever writes these files may add to them, and a study in the middle has gaps: a field the page can do without is
None or empty, an unknown one is passed over, a number that was not finite is null. What is left out is said on the
page; only a file of another kind or version, or one whose shape is not what its kind promises, is refused.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = float | None
Points = list[list[float]]


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Base(_Read):
    """The checkpoint that all arms start from. loss: held-out, in nats a token."""

    checkpoint: str = "base"
    family: str | None = None
    parameters: int | None = None
    layers: int | None = None
    loss: Number = None
    tasks: dict[str, Number] | None = None


class Data(_Read):
    train_tokens: int | None = None
    heldout_rows: int | None = None
    digest: str | None = None
    seq_len: int | None = None


class Machine(_Read):
    device: str | None = None
    cpus: float | None = None
    when: str | None = None


class Evaluation(_Read):
    """A point of a curve: the held-out loss, and what was spent until then. seconds: training alone."""

    step: int
    tokens: Number = None
    seconds: Number = None
    flops: Number = None
    loss: Number = None


class Trial(_Read):
    """One arm with one seed."""

    seed: int
    status: Literal["complete", "failed", "missing"]
    problem: str | None = None
    expansion: str | None = None
    training: str | None = None
    loss_before: Number = None
    curve: list[Evaluation] = Field(default_factory=list)
    final_loss: Number = None
    tuned_loss: Number = None
    """On held-out conversations, after fine-tuning."""
    tasks: dict[str, Number] | None = None


class Arm(_Read):
    """A method with its settings, or a control."""

    name: str
    control: bool = False
    method: str | None = None
    position: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    layers: int | None = None
    parameters: int | None = None
    trained_parameters: int | None = None
    inserted_tokens: int | None = None
    """Tokens until all new layers are in, where they come in gradually: losses until then are the gated model's."""
    runs: list[Trial] = Field(default_factory=list)


class TaskMetric(_Read):
    """What the figures of a task are. higher_is_better: None where lm-evaluation-harness did not say."""

    metric: str
    higher_is_better: bool | None = None


class Reached(_Read):
    """A loss that runs are asked for, or the arm whose runs say it, each for its seed. When they came there the page
    works out from the curves."""

    loss: float
    of: str | None = None


class Comparison(_Read):
    """`comparison.json`."""

    kind: Literal["comparison"]
    version: Literal[1]
    name: str = "comparison"
    file: str | None = None
    base: Base = Base()
    data: Data = Data()
    tokens: int | None = None
    machine: Machine = Machine()
    settings: dict[str, Any] = Field(default_factory=dict)
    lesa_ray: str | None = None
    reference: str | None = None
    """The arm by whose final loss the others are measured."""
    notes: list[str] = Field(default_factory=list)
    """What was left out."""
    remarks: list[str] = Field(default_factory=list)
    """What one has to know to read the result."""
    task_metrics: dict[str, TaskMetric] = Field(default_factory=dict)
    arms: list[Arm]
    reached: list[Reached] = Field(default_factory=list)


class Pictures(_Read):
    """Points (L, 2) of the layers' leading coefficients; null for layers that lack the type."""

    pca: list[list[float] | None] | None = None
    pca_share: list[float] | None = None
    tsne: list[list[float] | None] | None = None
    tsne_perplexity: Number = None
    tsne_missing: str | None = None
    directions: int | None = None


class TypeFigures(_Read):
    """One weight type of an analysis; lists over the L layers, or the L−1 pairs of neighbours."""

    shape: list[int] = Field(default_factory=list)
    shapes: list[list[int]] | None = None
    norms: list[Number] = Field(default_factory=list)
    effective_rank: list[Number] = Field(default_factory=list)
    stable_rank: list[Number] = Field(default_factory=list)
    spectra: list[list[Number]] = Field(default_factory=list)
    common_spectrum: list[Number] = Field(default_factory=list)
    captured: dict[str, Number] = Field(default_factory=dict)
    neighbour_cosine: list[Number] | None = None
    neighbour_cosine_matched: list[Number] | None = None
    neighbour_cosine_chance: list[Number] | None = None
    pictures: Pictures = Pictures()

    def full_rank(self, layer: int) -> int:
        """The largest rank that a layer's matrix can have. There must be a `shape`."""
        return min(self.shapes[layer] if self.shapes else self.shape)


class LayerShare(_Read):
    """What a layer adds to the residual stream, as shares of the stream's norm, and cosine(in, out)."""

    attention: Number = None
    mlp: Number = None
    block: Number = None
    cosine: Number = None


class Residual(_Read):
    tokens: int | None = None
    data: str | None = None
    unsplit: str | None = None
    layers: list[LayerShare] = Field(default_factory=list)


class Analysis(_Read):
    """`analysis.json`.

    fit: scores by weight type and predictor, each a mapping with `r2` and `cosine`; under `matched` those of candidates
    after the best matching, `random` among them; `on` says which layers they were scored on."""

    kind: Literal["analysis"]
    version: Literal[1]
    checkpoint: str = "checkpoint"
    family: str | None = None
    layers: int = Field(ge=1)
    hidden_size: int | None = None
    new_layers: list[int] = Field(default_factory=list)
    created_with: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    types: dict[str, TypeFigures] = Field(default_factory=dict)
    fit: dict[str, dict[str, Any]] | None = None
    fit_missing: str | None = None
    matched_missing: str | None = None
    uneven: str | None = None
    """What to know where layers differ in width."""
    residual: Residual | None = None
