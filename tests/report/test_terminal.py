"""What people see: the picture of the plan, figures in their units, the fit table, the model card."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lesa_ray import ExpandConfig, Expanded
from lesa_ray.expansion.cluster_spec import ClusterSpec
from lesa_ray.expansion.estimate import estimate
from lesa_ray.expansion.plan import after_groups, between
from lesa_ray.expansion.prepare import prepare
from lesa_ray.fleet.state import Outcome
from lesa_ray.report import terminal
from lesa_ray.report.estimate import show_estimate
from lesa_ray.report.fleet import outcome_table
from lesa_ray.sizes import size

Bases = Callable[[str], str]
Grow = Callable[..., Expanded]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal of 100 columns whose text can be exported."""
    console = Console(record=True, width=100, markup=False, file=open("/dev/null", "w"))  # noqa: SIM115
    monkeypatch.setattr(terminal, "console", console)
    return console


def test_the_plan_as_a_picture() -> None:
    lines = terminal.plan_picture(between(5, 8, "top"), copies=False, width=56).plain.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["0", "←", "0", "1", "←", "1", "2", "+", "1|2"],
        ["3", "←", "2", "4", "+", "2|3", "5", "←", "3"],
        ["6", "+", "3|4", "7", "←", "4"],
    ]
    assert "+ new, between two" in lines[3]
    copied = terminal.plan_picture(after_groups(2, 4), copies=True, width=56).plain
    assert copied.split()[:12] == ["0", "←", "0", "1", "⧉", "0", "2", "←", "1", "3", "⧉", "1"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(999, "1.0 kB"), (1.5e6, "1.50 MB"), (16.06e9, "16.06 GB"), (1.4e12, "1.40 TB")],
)
def test_sizes(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(("value", "text"), [(4.21, "4.2 s"), (600, "10 min"), (11_160, "3.1 h")])
def test_durations(value: float, text: str) -> None:
    assert terminal.duration(value) == text


def test_inspect_shows_what_the_checkpoint_is(bases: Bases, screen: Console, tmp_path: Path) -> None:
    terminal.show_expansion(prepare(ExpandConfig(base=bases("qwen2"), out=str(tmp_path / "out"))))
    text = screen.export_text()
    for words in ("qwen2, 5 layers", "self_attn.q_proj.weight", "64 × 64", "F32", "self_attn.q_proj.bias", "vector"):
        assert words in text
    for words in ("5 → 8 layers", "+ 3|4", "lower neighbour's"):
        assert words in text


BRACKETS = "lesa [top]/x[/b] :cat: [/]"


def test_a_base_of_any_name_is_shown_as_it_is_called(
    bases: Bases, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = tmp_path / BRACKETS
    base.parent.mkdir(parents=True)
    base.symlink_to(bases("llama"))
    expansion = prepare(ExpandConfig(base=str(base), out=str(tmp_path / "out")))
    small = ClusterSpec(cpus_per_node=2, memory_per_node="1MB")
    terminal.show_expansion(expansion)
    show_estimate(estimate(expansion, small))
    text = capsys.readouterr().err
    assert f"{base}: llama, 5 layers" in text
    assert "lesa: 5 → 8 layers" in text
    assert re.search(r"fits +no: ", text)
    assert "bold" not in text


def test_a_fault_of_any_wording_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [Outcome("pretrain/a", "failed", f"cannot read {BRACKETS}")]
    terminal.console.print(outcome_table(outcomes), highlight=False)
    assert f"cannot read {BRACKETS}" in capsys.readouterr().err


def test_progress_shows_a_name_of_any_wording(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(force_terminal=True, width=160, file=seen))
    with terminal.progress_lines("expand out") as listener:
        listener.phase(f"reading {BRACKETS}", 2)
        listener.progress(1, f"piece {BRACKETS}")
    assert f"reading {BRACKETS}" in seen.getvalue()
    assert f"piece {BRACKETS}" in seen.getvalue()


def test_the_fit_table_shows_every_weight_type_beside_its_yardsticks(bases: Bases, grow: Grow, screen: Console) -> None:
    result = grow(bases("llama"), lesa={"epochs": 2, "holdout": 0.4})
    table = terminal.fit_table(result.manifest)
    assert table is not None
    screen.print(table)
    text = screen.export_text()
    assert "Fit of the network on held-out layers" in text
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        (line,) = [line for line in text.splitlines() if name in line]
        fit = result.manifest["fit"][f"{name}.weight"]
        for figure in (
            fit["held_out"]["predictor"]["r2"],
            fit["held_out"]["predictor"]["cosine"],
            fit["held_out"]["mean"]["r2"],
            fit["held_out"]["ridge"]["r2"],
            fit["norm_ratio"],
        ):
            assert f"{figure:.3f}" in line
    assert terminal.fit_table(grow(bases("llama"), method="solar").manifest) is None


def test_the_fit_table_of_a_predictor_without_epochs(bases: Bases, grow: Grow, screen: Console) -> None:
    result = grow(bases("llama"), lesa={"predictor": "ridge"})
    screen.print(terminal.fit_table(result.manifest))
    text = screen.export_text()
    assert "Fit of ridge regression" in text
    (line,) = [line for line in text.splitlines() if "mlp.gate_proj" in line]
    fit = result.manifest["fit"]["mlp.gate_proj.weight"]
    assert fit["predictor"] == "ridge"
    assert f"{fit['trained']['predictor']['loss']:.3g}" in line


def test_the_model_card_says_what_it_is_and_no_path(bases: Bases, grow: Grow, tmp_path: Path) -> None:
    kept = (Path(grow(bases("llama"), method="llama-pro").out) / "README.md").read_text()
    assert "# llama, 5 → 8 layers" in kept
    assert "computes exactly what its base computes" in kept
    assert "It has not been trained since" in kept
    moved = (Path(grow(bases("llama"), method="solar").out) / "README.md").read_text()
    assert "measure it before you use it" in moved
    assert "goes on to train all layers" in moved
    for card in (kept, moved):
        assert str(Path(bases("llama")).parent) not in card
        assert card.startswith("---\nlibrary_name: transformers\n")


def test_the_manifest_is_json_without_nan(bases: Bases, grow: Grow) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    result = grow(bases("llama"), lesa={"epochs": 1, "holdout": 0})
    text = (Path(result.out) / "expansion.json").read_text()
    assert json.loads(text, parse_constant=refuse) == result.manifest
