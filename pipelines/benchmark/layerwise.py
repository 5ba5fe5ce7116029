"""How fast layer-wise scaled models train beside the isotropic one of equal size.

    python -m pipelines.benchmark.layerwise
    python -m pipelines.benchmark.layerwise --cuda --compile --params 180M --layers 18 --d-model 768 --head-dim 64 \\
        --kv-heads 4 --vocab-size 50304 --seq-len 1024 --batch 16

The models have the same parameters within 1 % and the same multiple of their FFN widths; all are in memory side by
side. A step is forward, backward and AdamW on random tokens, in float32 (on a GPU in bfloat16, weights in float32).
Each round gives every model some steps, in an order that turns from round to round, so that what else the machine does
falls on all; shown are medians over rounds, and the median of the ratio to the isotropic model in the same round.
Model FLOPs are as equal as parameters are, but for what grows with the query heads: attention's products with itself.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import torch
import torch.nn.functional as F
import typer
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from lesa_ray.comparison.layerwise_study import BASELINE
from lesa_ray.config import load_settings
from lesa_ray.layerwise.profiles import ProfileName
from lesa_ray.layerwise.settings import LayerwiseConfig, architecture, with_one_multiple
from lesa_ray.report.console import Console
from lesa_ray.training.flops import step_flops
from lesa_ray.training.model import build
from pipelines.jobs import exits

console = Console(soft_wrap=True, highlight=False)
PROFILES: tuple[ProfileName, ...] = get_args(ProfileName)


class Contestant:
    """A model with its optimizer."""

    def __init__(self, raw: dict[str, Any], device: torch.device, *, compiled: bool) -> None:
        empty = build(raw, "here")
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(empty.config, dtype=torch.float32).to(device).train()
        self.empty, self.device = empty, device
        if compiled:
            for layer in self.model.model.layers:
                layer.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, ids: Tensor) -> None:
        """ids: (B, T)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Timing:
    """One model's figures."""

    parameters: int
    flops: float
    """Of a step."""
    seconds: list[float]
    """A step, by round."""


def models_of(sizes: dict[str, Any]) -> dict[ProfileName, dict[str, Any]]:
    """config.json by profile, with the largest multiple of FFN widths with which all meet the budget.

    sizes: settings of `LayerwiseConfig`. Raises: UserError if there is none."""
    given = [load_settings(LayerwiseConfig, None, out="unused", profile=name, **sizes) for name in PROFILES]
    return {model.profile: architecture(model) for model in with_one_multiple(given)}


def measure(
    models: dict[ProfileName, dict[str, Any]],
    *,
    batch: int,
    seq_len: int,
    rounds: int,
    steps: int,
    device: torch.device,
    compiled: bool = False,
) -> dict[ProfileName, Timing]:
    """Time the models' steps. models: config.json by profile."""
    contestants = {name: Contestant(raw, device, compiled=compiled) for name, raw in models.items()}
    vocab_size = next(iter(models.values()))["vocab_size"]
    ids = torch.randint(0, vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    seconds: dict[ProfileName, list[float]] = {name: [] for name in models}
    names = list(models)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = time.perf_counter()
            for _ in range(steps):
                contestants[name].step(ids)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                seconds[name].append((time.perf_counter() - begun) / steps)
    return {
        name: Timing(
            one.parameters,
            step_flops(one.empty, tokens=batch * seq_len, seq_len=seq_len, lowest_layer=None),
            seconds[name],
        )
        for name, one in contestants.items()
    }


def table(found: dict[ProfileName, Timing], tokens: int) -> Table:
    """Medians and ratios. tokens: of a step."""
    base = found[BASELINE]
    shown = Table(title=f"{tokens:,} tokens a step, median of {len(base.seconds)} rounds", title_justify="left")
    for name in ("profile", "parameters", "FLOPs", "s/step", "tokens/s", f"of {BASELINE}"):
        shown.add_column(name, justify="left" if name == "profile" else "right")
    for name, one in found.items():
        middle = statistics.median(one.seconds)
        ratio = statistics.median(theirs / ours for ours, theirs in zip(one.seconds, base.seconds, strict=True))
        shown.add_row(
            name, f"{one.parameters:,}", f"{one.flops / base.flops:.3f}×", f"{middle:.3f}", f"{tokens / middle:,.0f}",
            f"{ratio:.3f}×",
        )  # fmt: skip
    return shown


def main(
    layers: Annotated[int, typer.Option(min=3)] = 12,
    params: Annotated[str, typer.Option(help="Parameters of each model.")] = "12M",
    d_model: Annotated[int, typer.Option(min=1)] = 256,
    head_dim: Annotated[int, typer.Option(min=2)] = 32,
    kv_heads: Annotated[int, typer.Option(min=1)] = 2,
    vocab_size: Annotated[int, typer.Option(min=1)] = 4096,
    seq_len: Annotated[int, typer.Option(min=2)] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 4,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a model in a round.")] = 5,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile each layer.")] = False,
    cuda: Annotated[bool, typer.Option("--cuda", help="On a GPU, in bfloat16.")] = False,
) -> None:
    """Time a training step of each profile beside the isotropic model."""
    sizes = {
        "layers": layers, "params": params, "d_model": d_model, "head_dim": head_dim, "kv_heads": kv_heads,
        "vocab_size": vocab_size, "seq_len": seq_len,
    }  # fmt: skip
    with exits("layerwise"):
        models = models_of(sizes)
    device = torch.device("cuda" if cuda else "cpu")
    found = measure(models, batch=batch, seq_len=seq_len, rounds=rounds, steps=steps, device=device, compiled=compiled)
    console.print(table(found, batch * seq_len))


if __name__ == "__main__":
    typer.run(main)
