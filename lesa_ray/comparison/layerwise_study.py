"""The study of layer-wise scaling: which models it compares, on what, and what the figures of its runs say.

Each profile is pre-trained from scratch at each depth with each seed, on the same rows in the same order, for as many
tokens; all models of a depth have the same number of parameters within 1 % (half a per cent of the budget, either way).

Decides
- One multiple of the FFN widths for all models of a depth, the largest with which all meet the budget: a profile with
  rounder widths than another would be compared at another speed.
- A seed decides the initial weights and the order of the rows. Runs of one seed see the same rows, so a profile is
  compared with the isotropic model seed by seed, by the rule of `lesa_ray.comparison.statistics`: mean difference and
  its 95 % interval over seeds.
- The data is looked at first. The published ablation (arXiv 2509.06518) read int32 tokens as uint16, so that every
  second token was 0, as its authors note there; one id that makes up a quarter of all tokens stops the study.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, ValidationError, model_validator

from lesa_ray.comparison.statistics import Difference, paired, spread
from lesa_ray.config import Seed, Settings
from lesa_ray.errors import UserError
from lesa_ray.layerwise.profiles import ProfileName
from lesa_ray.layerwise.settings import Count, LayerwiseConfig, with_one_multiple
from lesa_ray.training.train_settings import TrainConfig

if TYPE_CHECKING:
    from lesa_ray.training.tokens import TokenBlocks

BASELINE: ProfileName = "isotropic"
_OF_THE_STUDY = ("checkpoint", "architecture", "data", "out", "seed", "train")
_LOOKED_AT = 256
"""Rows of the training split that are looked at."""
_MOST_COMMON = 0.25
"""The largest share that one id may have. In English and code the commonest token has 3 to 8 %."""


class LayerwiseStudyConfig(Settings):
    """What is compared, and how it is trained."""

    out: str = "layerwise-study"
    """Where everything goes: a folder or an fsspec URL."""
    data: str | None = None
    """Token blocks (`lesa-ray tokenize`). None: made of the source of Python's standard library."""
    seq_len: int = Field(default=256, ge=2)
    """Tokens of a row where the study makes its own data."""
    profiles: tuple[ProfileName, ...] = ("isotropic", "vanilla", "framed", "reverse", "crown")
    """What is compared; isotropic is what the others are measured against."""
    layers: tuple[int, ...] = (12, 18)
    """Depths, each compared in itself."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Runs of each model."""
    parallel: int = Field(default=1, ge=1)
    """Runs at once. What each asks for (`train`: workers, cpus_per_worker, gpus_per_worker) must find room beside the
    others, or it waits."""
    params: Count = 180_000_000
    """Parameters of each model, e.g. 180M."""
    d_model: int = Field(default=768, ge=1)
    """Width of the residual stream."""
    head_dim: int = Field(default=64, ge=2)
    """Width of a head."""
    kv_heads: int = Field(default=4, ge=1)
    """KV heads of every layer."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Entries of the vocabulary. None: as many as the data has."""
    tied: bool = False
    """One matrix for embedding and head."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Settings of `lesa-ray pretrain`, the same for all runs."""

    @model_validator(mode="after")
    def _sound(self) -> LayerwiseStudyConfig:
        for name in ("profiles", "layers", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: give at least one, each once")
        if BASELINE not in self.profiles:
            raise ValueError(f"profiles: {BASELINE} is missing, which the others are measured against")
        if own := [name for name in _OF_THE_STUDY if name in self.train]:
            raise ValueError(f"train.{own[0]}: the study decides it")
        try:
            train = TrainConfig.model_validate({**self.train, "architecture": {}, "data": "data", "out": "out"})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in ("train", *first["loc"]))
            raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        if not train.eval_rows:
            raise ValueError("train.eval_rows: 0 leaves nothing to compare")
        return self

    def model(self, profile: ProfileName, layers: int, blocks: TokenBlocks) -> LayerwiseConfig:
        """One of the models, the multiple of its FFN widths left open."""
        return LayerwiseConfig(
            out=self.out,
            profile=profile,
            layers=layers,
            params=self.params,
            d_model=self.d_model,
            head_dim=self.head_dim,
            kv_heads=self.kv_heads,
            vocab_size=self.vocab_size or blocks.vocab_size,
            seq_len=blocks.seq_len,
            tied=self.tied,
            rope_theta=self.rope_theta,
        )

    def run_name(self, profile: str, layers: int, seed: int) -> str:
        """Where a run goes, below `out`."""
        return f"runs/{layers}-layers/{profile}/seed-{seed}"


@dataclass(frozen=True)
class Row:
    """One run's figures; losses in nats a token."""

    layers: int
    profile: str
    seed: int
    parameters: int
    attention: float
    """Attention's share of the parameters of all layers."""
    tokens: int
    heldout_loss: float
    loss: float
    """On the training rows, mean over the last tenth of the steps."""
    tokens_per_second: float


@dataclass(frozen=True)
class Summary:
    """A model over its seeds. Spreads are sample standard deviations; None with a single seed."""

    layers: int
    profile: str
    parameters: int
    attention: float
    """Attention's share of the parameters of all layers. Query heads come in steps, so models differ in it."""
    seeds: int
    heldout_loss: float
    spread: float | None
    difference: float
    """To the isotropic model of this depth: mean over seeds; below zero is better."""
    difference_half: float | None
    """Half of the 95 % interval of that mean."""
    tokens_per_second: float
    """Median over seeds."""
    speed: float
    """Against the isotropic model of this depth."""


def models_of(config: LayerwiseStudyConfig, blocks: TokenBlocks) -> dict[tuple[int, ProfileName], LayerwiseConfig]:
    """The models by depth and profile, those of a depth with one multiple of their widths.

    Raises: UserError if there is none with which all meet the budget."""
    found: dict[tuple[int, ProfileName], LayerwiseConfig] = {}
    for layers in config.layers:
        given = [config.model(profile, layers, blocks) for profile in config.profiles]
        found |= {(layers, model.profile): model for model in with_one_multiple(given)}
    return found


def check_tokens(blocks: TokenBlocks) -> dict[str, float]:
    """The share of the commonest id, and how many ids there are, in the first rows to train on.

    Raises: UserError if one id has more than a quarter of the tokens."""
    rows = min(_LOOKED_AT, blocks.train.rows)
    counts = np.bincount(blocks.train.read(range(rows))["input_ids"].reshape(-1))
    commonest, share = int(counts.argmax()), float(counts.max() / counts.sum())
    if share > _MOST_COMMON:
        raise UserError(
            f"data {blocks.url}: {100 * share:.0f} % of its tokens are id {commonest}; were they written with another "
            "number of bytes than they are read with?"
        )
    return {"rows": rows, "ids": int((counts > 0).sum()), "commonest": commonest, "share": share}


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Over seeds, in the order in which models first come; only seeds that the isotropic model has, too, count."""
    by_model: dict[tuple[int, str], dict[int, Row]] = {}
    for row in rows:
        by_model.setdefault((row.layers, row.profile), {})[row.seed] = row
    found = []
    for (layers, profile), own in by_model.items():
        base = by_model.get((layers, BASELINE), {})
        seeds = [seed for seed in own if seed in base]
        difference = paired(_losses(own), _losses(base))
        losses = spread([own[seed].heldout_loss for seed in seeds])
        if difference is None or losses is None:
            continue
        speed = statistics.median(own[seed].tokens_per_second for seed in seeds)
        found.append(
            Summary(
                layers=layers,
                profile=profile,
                parameters=own[seeds[0]].parameters,
                attention=own[seeds[0]].attention,
                seeds=len(seeds),
                heldout_loss=losses.mean,
                spread=losses.sd,
                difference=difference.mean,
                difference_half=difference.half,
                tokens_per_second=speed,
                speed=speed / statistics.median(base[seed].tokens_per_second for seed in seeds),
            )
        )
    return found


def _losses(rows: Mapping[int, Row]) -> dict[int, float]:
    return {seed: row.heldout_loss for seed, row in rows.items()}


def reading(summaries: Sequence[Summary]) -> list[str]:
    """What the figures say of the paper's claims, a line for each depth. A difference is one whose interval leaves out
    zero."""
    lines = []
    for layers in dict.fromkeys(summary.layers for summary in summaries):
        others = [s for s in summaries if s.layers == layers and s.profile != BASELINE]
        if not others:
            continue
        clear = [s for s in others if Difference(s.difference, s.difference_half, s.seeds).clear]
        better = [s.profile for s in clear if s.difference < 0]
        worse = [s.profile for s in clear if s.difference > 0]
        rest = [s.profile for s in others if s not in clear]
        parts = [f"below isotropic: {', '.join(better) or 'none'}"]
        parts += [f"above it: {', '.join(worse)}"] if worse else []
        parts += [f"not told apart: {', '.join(rest)}"] if rest else []
        losses = [s.heldout_loss for s in others]
        apart = f" The profiles lie {max(losses) - min(losses):.4f} nats apart." if len(losses) > 1 else ""
        lines.append(f"{layers} layers: {'; '.join(parts)}.{apart}")
    return lines


def to_json(
    config: LayerwiseStudyConfig, checked: dict[str, float], rows: Sequence[Row], missing: Sequence[str]
) -> dict[str, Any]:
    """Everything, as it is written to results.json. missing: runs that cannot be, and why, a line each."""
    summaries = summarise(rows)
    return {
        "settings": config.model_dump(mode="json"),
        "data": checked,
        "rows": [asdict(row) for row in rows],
        "summary": [asdict(summary) for summary in summaries],
        "reading": reading(summaries),
        "missing": list(missing),
    }
