"""The methods that match layers first: they do not see in which order neurons and heads lie in the files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lesa_ray import ExpandConfig, Expanded, UserError
from lesa_ray.expansion.prepare import prepare
from lesa_ray.expansion.registry import METHODS
from lesa_ray.report.terminal import fit_table
from tests import families
from tests.expansion.test_methods import FAMILIES, MATCHED
from tests.lesa.moves import blocks_in, outputs, random_map

Bases = Callable[[str], str]
Grow = Callable[..., Expanded]
RIDGE = {"predictor": "ridge", "ridge": 0.1}
"""The network's random start knows an order of columns; ridge does not."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A Qwen2 in float64 and the same with all its neurons and heads elsewhere: one function, other files."""
    folder = tmp_path_factory.mktemp("moved")
    base = families.make("qwen2", folder / "base", dtype=torch.float64)
    moved = shutil.copytree(base, folder / "moved")
    anatomy, blocks = blocks_in(base)
    for path in Path(moved).glob("*.safetensors"):
        content = load_file(path)
        for layer in range(anatomy.layers):
            for at, block in enumerate(blocks):
                mapping = random_map(block, seed=2 * layer + at)
                for name, part in block.parts.items():
                    full = anatomy.name(layer, name)
                    content[full] = mapping.moved(part, content[full])
        save_file(content, path, metadata={"format": "pt"})
    return base, str(moved)


def results(pair: tuple[str, str], grow: Grow, **settings: Any) -> list[torch.Tensor]:
    found = []
    for base in pair:
        model = families.load_strict(grow(base, **settings).out, "qwen2", dtype=torch.float64)
        found.append(outputs(model, families.tokens()))
    return found


@pytest.mark.parametrize("method", ["aligned-lesa", "mean-aligned"])
def test_the_order_of_neurons_and_heads_in_the_files_does_not_matter(
    method: str, pair: tuple[str, str], grow: Grow
) -> None:
    """11 layers from 5: new layers between new ones, whose order is that of their lower neighbours."""
    settings = {"lesa": RIDGE} if METHODS[method].predicts else {}
    one, other = results(pair, grow, method=method, layers=11, **settings)
    assert (one - other).abs().max() < 1e-4  # predicted in float64, handed over in float32


def test_to_a_published_method_it_does_matter(pair: tuple[str, str], grow: Grow) -> None:
    one, other = results(pair, grow, method="avg-deus")
    assert (one - other).abs().max() > 0.1


def test_a_layer_between_two_that_differ_in_order_alone_is_their_mean(tmp_path: Path, grow: Grow) -> None:
    """Layer 2 is layer 1 moved: the matched mean is layer 1, in its order, biases too."""
    base = families.make("qwen2", tmp_path / "base", layers=3)
    anatomy, blocks = blocks_in(base)
    path = next(Path(base).glob("*.safetensors"))
    content = load_file(path)
    for name in anatomy.types:
        content[anatomy.name(2, name)] = content[anatomy.name(1, name)].clone()
    for block in blocks:
        for name, part in block.parts.items():
            full = anatomy.name(2, name)
            content[full] = random_map(block, 1).moved(part, content[full])
    save_file(content, path, metadata={"format": "pt"})
    result = grow(base, method="mean-aligned", position="1")
    below, new = (families.layer_tensors(result.out, "qwen2", i) for i in (1, 2))
    for name, tensor in below.items():
        torch.testing.assert_close(new[name], tensor, atol=2e-6, rtol=0)


def test_aligned_lesa_reports_alignments_and_fits(bases: Bases, grow: Grow) -> None:
    manifest = grow(bases("llama"), method="aligned-lesa", lesa={"epochs": 1, "scale": "unit"}).manifest
    fits, table = manifest["fit"], fit_table(manifest)
    assert table is not None
    assert "matched first" in str(table.caption)
    alignments = {name: fit for name, fit in fits.items() if name.startswith("alignment-")}
    assert sorted(alignments) == [f"alignment-{i}" for i in range(1, families.LAYERS)]
    for report in alignments.values():
        assert report["onto"] == report["layer"] - 1
        for block in ("attention", "mlp"):
            assert report[block]["cosine_matched"] > report[block]["cosine_as_it_is"]
    shapes = {name.split(".")[1][0]: (fit["d1"], fit["d2"]) for name, fit in fits.items() if name not in alignments}
    assert shapes == {
        "q": (64, 64),
        "k": (64, 32),
        "v": (64, 32),
        "o": (64, 64),
        "g": (64, 96),
        "u": (64, 96),
        "d": (64, 96),
    }


def test_what_is_zero_is_not_predicted_and_variants_count(bases: Bases, grow: Grow, tmp_path: Path) -> None:
    tuned = families.make("llama", tmp_path / "tuned", seed=1)
    result = grow(bases("llama"), method="aligned-lesa", zero_init=True, variants=[tuned], lesa={"epochs": 1})
    fits = {name: fit for name, fit in result.manifest["fit"].items() if not name.startswith("alignment-")}
    assert sorted(name.split(".")[1][0] for name in fits) == sorted("qkvgu")
    assert {fit["checkpoints"] for fit in fits.values()} == {2}


@pytest.mark.parametrize("method", ["aligned-lesa", "mean-aligned"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in MATCHED])
def test_layers_that_cannot_be_matched_are_refused(family: str, method: str, bases: Bases, tmp_path: Path) -> None:
    config = ExpandConfig(base=bases(family), out=str(tmp_path / "out"), method=method)
    with pytest.raises(UserError, match=f"^{method}: .* layers cannot be matched: .*; use another method$"):
        prepare(config)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"method": "aligned-lesa", "vectors": "mean"}, "--vectors mean: self_attn.k_proj.bias belongs to"),
        ({"method": "mean-aligned", "vectors": "first"}, "--vectors first: self_attn.k_proj.bias belongs to"),
        ({"method": "aligned-lesa", "memory_budget": "400KB"}, "aligned-lesa, to match two layers, needs"),
        ({"method": "aligned-lesa", "lesa": {"share_experts": True}}, "has no experts"),
        ({"method": "mean-aligned", "lesa": {"rank": 3}}, "rank: a setting of lesa"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: dict[str, Any], why: str, bases: Bases, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=why):
        prepare(ExpandConfig(base=bases("qwen2"), out=str(tmp_path / "out"), **settings))
