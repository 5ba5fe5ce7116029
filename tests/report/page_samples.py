"""Small studies of the shapes that `lesa-ray compare` and `lesa-ray analyze` write, for the tests of the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
STEPS = (0, 10, 20, 30, 40)
ENDS = {"lesa": 2.640, "llama-pro": 2.660, "base, same tokens": 2.655, "random, zero output projections": 2.661}


def curve(start: float, end: float, seed: int, *, slow: float = 1.0) -> list[dict[str, Any]]:
    """A loss that falls from `start` to `end`, by a little that the seed decides; 100 tokens a step."""
    points = []
    for step in STEPS:
        share = (1 - math.exp(-step / 12)) / (1 - math.exp(-STEPS[-1] / 12))
        loss = start + (end + 0.001 * seed - start) * share
        points.append(
            {"step": step, "tokens": 100 * step, "seconds": 0.5 * step * slow, "flops": 1e9 * step, "loss": loss}
        )
    return points


def arm(name: str, *, start: float = 2.67, seeds: tuple[int, ...] = SEEDS, **more: Any) -> dict[str, Any]:
    """An arm whose runs are complete."""
    control = "base" in name or "random" in name
    runs = []
    for seed in seeds:
        points = curve(start, ENDS[name], seed, slow=0.8 if name == "lesa" else 1.0)
        runs.append(
            {"seed": seed, "status": "complete", "problem": None, "expansion": None, "training": "gone",
             "loss_before": start, "curve": points, "final_loss": points[-1]["loss"], "tasks": None}
        )  # fmt: skip
    based = name.startswith("base")
    return {
        "name": name, "control": control, "method": None if based else name.split(",")[0],
        "position": None if based else "top", "settings": {}, "layers": 8 if based else 12,
        "parameters": 1_000_000, "trained_parameters": 400_000, "runs": runs, **more,
    }  # fmt: skip


def comparison(*, seeds: tuple[int, ...] = SEEDS, **more: Any) -> dict[str, Any]:
    """Four arms, two of them controls."""
    return {
        "kind": "comparison", "version": 1, "name": "toy", "file": "pipelines/compare.yaml",
        "base": {"checkpoint": "store/base", "family": "llama", "parameters": 700_000, "layers": 8, "loss": 2.67},
        "data": {"train_tokens": 4_000, "heldout_rows": 16, "digest": "d", "seq_len": 128},
        "tokens": 4_000, "machine": {"device": "CPU", "cpus": 2, "when": "2026-11-21T20:00:00+00:00"},
        "arms": [arm(name, seeds=seeds) for name in ENDS],
        "reached": [{"loss": 2.661, "of": "llama-pro"}, {"loss": 2.6415, "of": None}],
        **more,
    }  # fmt: skip


def with_tasks(content: dict[str, Any]) -> dict[str, Any]:
    """The comparison with three tasks: a perplexity whose name does not say so, a score, and one that old files have
    without its metric. Of arms in their order the first is best in all of them, the last worst; in piqa by less than
    the interval over seeds."""
    for place, one in enumerate(content["arms"]):
        for trial in one["runs"]:
            score = 0.7 - 0.01 * place + 0.02 * (trial["seed"] == place % 3)
            trial["tasks"] = {"lambada_openai": 10.0 + place, "piqa": score, "wikitext": 12.0 + place}
    content["task_metrics"] = {
        "lambada_openai": {"metric": "perplexity", "higher_is_better": False},
        "piqa": {"metric": "acc_norm", "higher_is_better": True},
    }
    return content


def analysis(*, layers: int = 6, new_layers: tuple[int, ...] = (3,), shift: float = 0.0, **more: Any) -> dict[str, Any]:
    """Two weight types; layers lie along a line, new ones have half the norm."""

    def figures(scale: float) -> dict[str, Any]:
        norms = [scale * (0.5 if i in new_layers else 1 + 0.05 * i) for i in range(layers)]
        return {
            "shape": [64, 32],
            "norms": norms,
            "effective_rank": [20.0 + i for i in range(layers)],
            "stable_rank": [5.0 + i for i in range(layers)],
            "spectra": [[norm * 0.7**k for k in range(8)] for norm in norms],
            "common_spectrum": [4.0 * 0.9**k for k in range(16)],
            "captured": {"1": 0.2, "4": 0.5, "16": 0.9},
            "neighbour_cosine": [0.01] * (layers - 1),
            "neighbour_cosine_matched": [0.27] * (layers - 1),
            "neighbour_cosine_chance": [0.17] * (layers - 1),
            "pictures": {
                "pca": [[float(i), 0.1 * i * i] for i in range(layers)], "pca_share": [0.6, 0.2],
                "tsne": [[float(i % 2), float(i)] for i in range(layers)], "tsne_perplexity": 2.0, "tsne_missing": None,
            },
        }  # fmt: skip

    scores = {name: {"loss": 0.1, "r2": r2, "cosine": cosine} for name, r2, cosine in
              (("predictor", -0.2, 0.01), ("mean", -0.5, 0.0), ("zero", 0.0, None), ("ridge", -4.0, 0.02))}  # fmt: skip
    matched = {name: {"cosine": cosine, "r2": None} for name, cosine in
               (("lower", 0.25), ("mean", 0.24), ("aligned mean", 0.28), ("random", 0.17))}  # fmt: skip
    return {
        "kind": "analysis", "version": 1, "checkpoint": "models/grown", "family": "llama", "layers": layers,
        "hidden_size": 32, "new_layers": list(new_layers), "created_with": {"lesa-ray": "0.1.0", "torch": "2.13.0"},
        "types": {"self_attn.q_proj.weight": figures(1.0), "mlp.gate_proj.weight": figures(2.0)},
        "fit": {
            "self_attn.q_proj.weight": {**scores, "on": "held-out layers", "matched": matched},
            "mlp.gate_proj.weight": {**scores, "on": "held-out layers", "matched": matched},
        },
        "residual": {
            "tokens": 2048, "data": "blocks", "layers": [
                {"attention": 0.3, "mlp": 0.4, "block": (0.05 if i in new_layers else 0.5) + shift, "cosine": 0.9}
                for i in range(layers)
            ],
        },
        **more,
    }  # fmt: skip


def bare_analysis(**given: Any) -> dict[str, Any]:
    """Norms and the residual stream alone."""
    content = analysis(**given)
    types = {name: {"norms": figures["norms"]} for name, figures in content["types"].items()}
    return {**content, "types": dict(list(types.items())[:1]), "fit": None}


def write(folder: Path, name: str, content: dict[str, Any]) -> str:
    """The content as a RUN; its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return str(folder)
