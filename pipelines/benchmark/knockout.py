"""Benchmark: how near does each method come to a layer that was taken out?

    python -m pipelines.benchmark.knockout BASE [--layers 1,2,3] [--arms "copy; aligned-lesa, ridge"] [--json FILE]

A layer of a real pretrained model is removed, the model is grown at that gap by every arm, and what comes is scored
against the layer that was there: cosine and R² of all matrices of a block, after the best matching of neurons and heads
(`lesa_ray.lesa.matched`). Nothing of the true layer has been seen by then. Matching lifts any candidate, so two random
layers stand beside: normal weights of the neighbours' size (`random`), and weights whose rows are drawn from the
distribution of the neighbours' rows (`chance`); only what exceeds them counts. Works unit after unit in this process.

It says how near a start is to a trained layer, not how well it trains: that is for `lesa-ray compare`."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from lesa_ray.checkpoint.anatomy import Anatomy, read_anatomy
from lesa_ray.checkpoint.blocks import Block, read_blocks
from lesa_ray.checkpoint.depth import deeper_config
from lesa_ray.checkpoint.reader import Checkpoint, open_checkpoint
from lesa_ray.checkpoint.shards import OutTensor, Span, plan_shards
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.checkpoint.writer import write_shard
from lesa_ray.config import ExpandConfig
from lesa_ray.errors import UserError
from lesa_ray.report.console import Console

_UNIT = {"scale": "unit", "epochs": 20}
_RIDGE = {"predictor": "ridge", "ridge": 1.0}
ARMS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "copy": {"method": "copy"},
    "avg-deus": {"method": "avg-deus"},
    "mean-aligned": {"method": "mean-aligned"},
    "lesa": {"method": "lesa"},
    "lesa, unit scale, 20 epochs": {"method": "lesa", "lesa": _UNIT},
    "lesa, ridge": {"method": "lesa", "lesa": _RIDGE},
    "aligned-lesa": {"method": "aligned-lesa"},
    "aligned-lesa, unit scale, 20 epochs": {"method": "aligned-lesa", "lesa": _UNIT},
    "aligned-lesa, ridge": {"method": "aligned-lesa", "lesa": _RIDGE},
    "aligned-lesa, ridge, by energy": {"method": "aligned-lesa", "lesa": {**_RIDGE, "weigh": "energy"}},
}
"""Output projections as they are made, whatever is published: it is they that are judged."""
CHANCE = "chance"
Scores = dict[str, dict[str, list[tuple[float | None, float | None]]]]
"""Arm → block → (cosine, R²) of each layer taken out."""


def without_layer(checkpoint: Checkpoint, anatomy: Anatomy, layer: int, out: str) -> None:
    """Write the checkpoint without one of its layers; bytes are copied."""
    moved = {
        anatomy.name(old, name): anatomy.name(new, name)
        for new, old in enumerate(i for i in range(anatomy.layers) if i != layer)
        for name in anatomy.types
    }
    left_out = {anatomy.name(layer, name) for name in anatomy.types}
    tensors = [
        OutTensor(
            moved.get(e.name, e.name),
            e.dtype,
            e.shape,
            Span(checkpoint.storage.url, e.file, e.offset, e.nbytes, e.dtype, e.name),
        )
        for e in sorted(checkpoint.tensors.values(), key=lambda e: (e.file, e.offset))
        if e.name not in left_out
    ]
    storage = Storage(out)
    for shard in plan_shards([tensors], sum(tensor.nbytes for tensor in tensors)):
        write_shard(storage, shard)
    rest = [i for i in range(anatomy.layers) if i != layer]
    config = deeper_config(checkpoint.config, rest, anatomy.layers, checkpoint.base)
    storage.write("config.json", json.dumps(config).encode())


def knock_out(base: str, layers: Sequence[int] | None, arms: Mapping[str, dict[str, Any]], console: Console) -> Scores:
    """Take each of `layers` out (by default all but the first and the last) and score what each arm puts there.

    Raises: UserError for layers that cannot be matched or are at an end."""
    checkpoint = open_checkpoint(base)
    anatomy = read_anatomy(checkpoint)
    attention, mlp = read_blocks(anatomy, "knockout")
    blocks: dict[str, Block] = {"attention": attention, "mlp": mlp}
    scores: Scores = {name: {block: [] for block in blocks} for name in (CHANCE, *arms)}
    for layer in layers or range(1, anatomy.layers - 1):
        if not 0 < layer < anatomy.layers - 1:
            raise UserError(f"--layers {layer}: must lie between two others, 1 to {anatomy.layers - 2}")
        with tempfile.TemporaryDirectory(prefix="lesa-ray-knockout-") as folder:
            _one_layer(checkpoint, anatomy, blocks, layer, arms, folder, scores, console)
    return scores


def _one_layer(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    blocks: Mapping[str, Block],
    layer: int,
    arms: Mapping[str, dict[str, Any]],
    folder: str,
    scores: Scores,
    console: Console,
) -> None:
    from lesa_ray.distributed.expand import expand
    from lesa_ray.expansion.runner import InlineRunner
    from lesa_ray.lesa.alignment import Layer
    from lesa_ray.lesa.matched import match, random_like

    def read(source: Checkpoint, index: int) -> Layer:
        tensors = {t: source.read(anatomy.name(index, t.name)) for t in anatomy.matrices}
        return {t.name: tensor.T if t.transposed else tensor for t, tensor in tensors.items()}

    def note(name: str, candidate: Layer, block: str) -> None:
        found = match(candidate, true, blocks[block]).matched
        scores[name][block].append((found.cosine, found.r2))

    rest, true = os.path.join(folder, "rest"), read(checkpoint, layer)
    without_layer(checkpoint, anatomy, layer, rest)
    neighbours = [read(checkpoint, index) for index in (layer - 1, layer + 1)]
    for block in blocks:
        note(CHANCE, random_like(neighbours, blocks[block], seed=layer), block)
    for at, (name, settings) in enumerate(arms.items()):
        console.print(f"layer {layer}: {name}", highlight=False)
        given = {"position": str(layer - 1), "zero_init": False, **settings}
        if settings["method"].endswith("lesa"):  # few layers are left: the predictor learns from all of them
            given["lesa"] = {"holdout": 0.0, **settings.get("lesa", {})}
        out = os.path.join(folder, str(at))
        expand(ExpandConfig.model_validate({"base": rest, "out": out, **given}), runner=InlineRunner())
        made = read(open_checkpoint(out), layer)
        for block in blocks:
            note(name, made, block)


def table(scores: Scores) -> Table:
    """Means over the layers, and the excess of the cosine over chance."""
    layers = len(next(iter(scores[CHANCE].values())))
    result = Table(title=f"A layer taken out and put back, after matching; means over {layers}", title_justify="left")
    result.add_column("arm", no_wrap=True)
    for block in scores[CHANCE]:
        for column in (f"{block}: cosine", "above chance", "R²"):
            result.add_column(column, justify="right")
    for name, by_block in scores.items():
        cells = []
        for block, values in by_block.items():
            cosine, r2, chance = (_mean(v) for v in (*zip(*values, strict=True), [c for c, _ in scores[CHANCE][block]]))
            cells += [f"{cosine:.3f}", "" if name == CHANCE else f"{cosine - chance:+.3f}", f"{r2:+.3f}"]
        result.add_row(name, *cells)
    return result


def _mean(values: Sequence[float | None]) -> float:
    """A layer of zeros is like nothing."""
    return sum(value or 0.0 for value in values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="a folder, a Hugging Face repo id, or an fsspec URL")
    parser.add_argument("--layers", help="layers to take out, as in 1,2,5; by default all but the first and the last")
    parser.add_argument("--arms", help=f"of: {'; '.join(ARMS)}; separated by ;")
    parser.add_argument("--json", metavar="FILE", help="write the scores of each layer there")
    given = parser.parse_args()
    layers = [int(layer) for layer in given.layers.split(",")] if given.layers else None
    names = [name.strip() for name in given.arms.split(";")] if given.arms else list(ARMS)
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"--arms {unknown[0]}: unknown; use some of {'; '.join(ARMS)}")
    arms = {name: ARMS[name] for name in names}
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a log file wraps nothing
    scores = knock_out(given.base, layers, arms, console)
    console.print(table(scores))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"base": given.base, "layers": layers, "scores": scores}, file, indent=1)


if __name__ == "__main__":
    main()
