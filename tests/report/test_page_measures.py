"""The arithmetic of the page against plain references, and its words and colours."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lesa_ray.report.page import palette
from lesa_ray.report.page.figure import _wrapped, short_number
from lesa_ray.report.page.measures import evenly, orderliness, orderly_by_chance, value_at
from lesa_ray.report.page.words import big, listed, short_type, some
from lesa_ray.report.published import DEUS_1B, DEUS_8B, LESA_8B, matching


def test_values_between_points() -> None:
    xs, ys = [0.0, 2.0, 3.0], [5.0, 1.0, 9.0]
    for x in (-1.0, 0.0, 0.5, 2.0, 2.75, 3.0, 4.0):
        assert value_at(xs, ys, x) == pytest.approx(np.interp(x, xs, ys))


def test_how_orderly_a_path_is() -> None:
    line = [[float(i), 2.0 * i] for i in range(20)]
    assert orderliness(line) == pytest.approx(3 / 21)  # mean distance of pairs on a line of n points: (n + 1) / 3
    rng = np.random.default_rng(0)
    assert orderliness(rng.permutation(np.array(line)).tolist()) == pytest.approx(1, abs=0.3)
    assert orderliness(line[:2]) is None
    assert orderliness([[1.0, 1.0]] * 4) is None


def test_how_orderly_a_path_is_by_chance() -> None:
    """Of three orders (and their reverses) of three points the best is a third: chance; of 2,520 of seven it is not."""
    line = [[float(i), 2.0 * i] for i in range(7)]
    assert orderliness(line) < orderly_by_chance(line)
    assert orderliness(line[:3]) >= orderly_by_chance(line[:3])
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(8, 2)).tolist() for _ in range(400)]
    low = sum(orderliness(points) < orderly_by_chance(points) for points in sets)
    assert 8 <= low <= 32  # 5 %
    assert orderly_by_chance(sets[0], 12) < orderly_by_chance(sets[0])


def test_evenly() -> None:
    assert evenly(11, 6) == [0, 2, 4, 6, 8, 10]
    assert evenly(3, 6) == [0, 1, 2]


def test_words() -> None:
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert listed(["a, b", "c"]) == "“a, b” and c"
    assert some(list("abcdefgh"), 3) == "a, b and 6 more"
    assert [short_number(value) for value in (0, 0.25, 1500, 2e7, 3.456e18)] == [
        "0",
        "0.25",
        "1.5k",
        "20M",
        "3.46E",
    ]
    assert [short_number(value) for value in (999_999, 999.7, 999.4, -999_600, 3e24)] == [
        "1M",
        "1k",
        "999",
        "-1M",
        "3Y",
    ]
    assert [big(value) for value in (530_000, 999_999, 1e6, 999_400_000, 999_600_000, 1.72e9, 1.5e13)] == [
        "530,000",
        "999,999",
        "1 M",
        "999 M",
        "1 B",
        "1.72 B",
        "15 T",
    ]
    assert short_type("self_attn.q_proj.weight") == "q_proj"
    assert short_type("attention.dense.weight") == "attention.dense"
    assert short_type("mlp.experts.3.gate_proj.weight") == "3.gate_proj"
    assert short_type("mlp.experts.*.gate_proj.weight") == "experts.gate_proj"
    assert short_type("mlp.shared_experts.gate_proj.weight") == "shared_experts.gate_proj"
    assert short_type("mlp.experts.gate_up_proj[3]") == "gate_up_proj[3]"
    assert short_type("mlp.experts.gate_up_proj[*]") == "experts.gate_up_proj"
    assert short_type("block_sparse_moe.input_linear.weight[*]") == "experts.input_linear"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("experts.down_proj", ["experts.", "down_proj"]),
        ("a.b.c", ["a.b.c"]),
        ("one.two.three.four", ["one.two.", "three.four"]),
        ("anameoftwentyletters", ["anameoftwentyle", "tters"]),
        ("words of a title. More", ["words of a", "title. More"]),
    ],
)
def test_names_are_parted_after_their_dots(text: str, lines: list[str]) -> None:
    assert _wrapped(text, 15).split("\n") == lines


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours (WCAG 2.2, relative luminance): 1 to 21."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_colours_are_seen_on_both_backgrounds_and_are_told_apart_in_svg() -> None:
    for theme, name in ((palette.LIGHT, "light"), (palette.DARK, "dark")):
        for token, colour in theme.items():
            if token not in ("grid", "on-fill"):
                assert contrast(colour, palette.BACKGROUND[name]) >= 3, (name, token)
        fills = [theme["series-0"], theme["series-1"]]
        assert all(contrast(theme["on-fill"], fill) >= 4.5 for fill in fills)
    assert palette.LIGHT.keys() == palette.DARK.keys()
    assert len(set(palette.LIGHT.values())) == len(palette.LIGHT)  # each is replaced by its own variable
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_strokes_of_arms_differ() -> None:
    strokes = [palette.arm_stroke(i, control) for control in (False, True) for i in range(8)]
    assert all(a != b for a, b in itertools.combinations(strokes, 2))
    assert {palette.arm_stroke(i, True).colour for i in range(4)} == {palette.CONTROL}


def test_published_results_are_shown_for_their_own_setting_alone() -> None:
    assert LESA_8B in matching("llama", 32, 8_030_261_248, {32, 48})
    assert DEUS_1B not in matching("llama", 32, 8_030_261_248, {32, 48})
    assert matching("llama", 16, 1_235_814_400, {24}) == [DEUS_1B]
    for family, layers, parameters, grown in (
        ("qwen2", 32, 8_030_261_248, {48}),
        ("llama", 32, 8_030_261_248, {40}),
        ("llama", 32, 7_000_000_000, {48}),
        ("llama", None, None, set()),
    ):
        assert matching(family, layers, parameters, grown) == []
    assert DEUS_8B.rows["opt-deus"] == (7.73, 68.87)
    assert LESA_8B.rows["lesa"][1] == 5.13
    assert all(len(row) == len(table.columns) for table in (LESA_8B, DEUS_8B) for row in table.rows.values())
