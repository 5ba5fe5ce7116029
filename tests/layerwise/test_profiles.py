"""Widths and heads of every layer, against an independent calculation and the published parameter counts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lesa_ray import MachineError, UserError
from lesa_ray.layerwise.budget import Sizes
from lesa_ray.layerwise.folder import write_folder
from lesa_ray.layerwise.profiles import PRESETS, PROFILES, make_divisible, multipliers, query_heads
from lesa_ray.layerwise.settings import LayerwiseConfig, architecture, sizes_of

# million parameters: arXiv 2509.06518's models, as its code builds them
PUBLISHED = {
    "isotropic-12": 181.1,
    "isotropic-18": 183.5,
    "vanilla-18": 179.7,
    "framed-18": 179.3,
    "reverse-18": 179.3,
    "crown-18": 181.9,
}
VANILLA = [768, 1024, 1024, 1280, 1280, 1536, 1536, 1792, 1792, 2048, 2048, 2304, 2304, 2560, 2560, 2816, 2816, 3072]
CROWN = [3072, 768, 1024, 1280, 1536, 2048, 2304, 2560, 2816, 2816, 2560, 2304, 2048, 1536, 1280, 1024, 768, 3072]


def preset(name: str, **settings: object) -> Sizes:
    return sizes_of(LayerwiseConfig.model_validate({"out": "unused", "preset": name, **settings})).sizes


def counted(sizes: Sizes) -> int:
    """Parameters matrix by matrix: two of the vocabulary, seven and two norms a layer, the last norm."""
    total = 2 * 50_304 * 768 + 768
    for width, heads, kv in zip(sizes.widths, sizes.heads, sizes.kv_heads, strict=True):
        matrices = [(64 * heads, 768), (64 * kv, 768), (64 * kv, 768), (768, 64 * heads)]
        matrices += [(width, 768), (width, 768), (768, width)]
        total += sum(rows * columns for rows, columns in matrices) + 768 + 768
    return total


@pytest.mark.parametrize("layers", [12, 13, 18])
@pytest.mark.parametrize("knots", [(0.5, 4.0), (4.0, 0.5), (0.5, 3.8, 0.5), (1.0, 2.0, 4.0), (2.5,)])
def test_multipliers_lie_on_straight_lines_between_the_knots(knots: tuple[float, ...], layers: int) -> None:
    places = {
        1: [0],
        2: [0, layers - 1],
        3: [0, math.ceil(layers / 2) - 1, layers // 2, layers - 1],
    }[len(knots)]
    at = knots if len(knots) < 3 else (knots[0], knots[1], knots[1], knots[2])
    expected = np.interp(np.arange(layers), places, at)
    if len(knots) == 2:
        expected = np.round(expected, 2)
    assert multipliers(knots, layers) == pytest.approx(expected.tolist(), abs=1e-12)
    framed = multipliers(knots, layers, 4.0)
    assert framed == [4.0, *multipliers(knots, layers)[1:-1], 4.0]


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (10, 256), (256, 256), (284, 256), (285, 512), (383, 512), (384, 512), (568, 512), (569, 768), (639, 768),
        (640, 768), (3072, 3072), (2918.4, 2816),
    ],
)  # fmt: skip
def test_rounding_never_loses_a_tenth(value: float, rounded: int) -> None:
    assert make_divisible(value, 256) == rounded
    assert rounded > 0.9 * value


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_papers_models_have_their_parameters(name: str) -> None:
    sizes = preset(name)
    assert sizes.parameters == counted(sizes)
    assert round(sizes.parameters / 1e6, 1) == PUBLISHED[name]
    assert sizes.layers == int(name[-2:])


def test_the_layers_of_the_papers_models() -> None:
    vanilla, framed, reverse, crown = (preset(f"{name}-18") for name in ("vanilla", "framed", "reverse", "crown"))
    assert list(vanilla.widths) == VANILLA
    assert list(crown.widths) == CROWN
    assert vanilla.heads == (6,) * 2 + (9,) * 10 + (12,) * 6
    assert crown.heads == (12, *(9,) * 5, *(12,) * 6, *(9,) * 5, 12)
    assert reverse.widths == framed.widths[::-1]
    assert reverse.heads == framed.heads[::-1]
    assert (framed.widths[0], framed.widths[1], framed.widths[-1]) == (3072, 512, 3072)
    for sizes in (vanilla, framed, reverse, crown):
        assert [3 * kv for kv in sizes.kv_heads] == list(sizes.heads)


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_papers_text_fixes_the_kv_heads(name: str) -> None:
    text, code = preset(name, recipe="paper"), preset(name)
    assert set(text.kv_heads) == {4}
    assert all(heads % 4 == 0 for heads in text.heads)
    assert text.widths == code.widths
    assert text.parameters == counted(text)


def test_every_profile_has_its_shape() -> None:
    found = {name: multipliers(profile.beta, 18, 4.0 if profile.framed else None) for name, profile in PROFILES.items()}
    assert found["vanilla"] == sorted(found["vanilla"])
    assert found["framed"][1:-1] == sorted(found["framed"][1:-1])
    assert found["reverse"] == found["framed"][::-1]
    assert found["crown"] == pytest.approx(found["crown"][::-1])
    assert len(set(found["isotropic"])) == 1
    assert query_heads([0.01, 0.5, 1.0], 768, 64, 4) == [4, 8, 12]


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
def test_a_place_that_does_not_take_the_folder(small_disk: Path, tmp_path: Path) -> None:
    wanted = architecture(LayerwiseConfig(out="unused", preset="framed-18"))
    (tmp_path / "file").write_text("")
    for wrong in ("file", "file/below"):
        with pytest.raises(UserError, match="is a file; give a folder"):
            write_folder(str(tmp_path / wrong), wanted)
    out = str(small_disk / "out")
    (small_disk / "all").write_bytes(bytes(60 * 1024))
    with pytest.raises(MachineError, match=f"^OUT {out}: no space left on the device"):
        write_folder(out, wanted)
    (small_disk / "all").unlink()
    assert not write_folder(out, wanted)
    assert write_folder(out, wanted)
