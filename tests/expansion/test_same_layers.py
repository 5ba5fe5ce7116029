"""An old layer is the same in the deeper model, or the expansion is refused, whatever the setting is called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lesa_ray import Expanded, UserError, cli
from lesa_ray.checkpoint import depth
from lesa_ray.expansion.same_layers import check_same_layers

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "pad_token_id": None}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
EXPERTS = {"moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 8, "moe_layer_start_index": 0}

JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "num_experts": 1,
}


def raw_config(family: str, layers: int, **more: Any) -> dict[str, Any]:
    settings = {**SIZES, **HEADS, **more, "num_hidden_layers": layers}
    full: dict[str, Any] = AutoConfig.for_model(family, **settings).to_dict()
    return full


@pytest.mark.parametrize(
    ("family", "more", "differs"),
    [
        ("qwen3", {}, None),
        ("ernie4_5_moe", {**EXPERTS, "moe_layer_end_index": -1}, None),
        (
            "ernie4_5_moe",
            {**EXPERTS, "moe_layer_end_index": 2},
            r"layer 2 would be another as layer 3 .* mlp\.(?!\S*training)",
        ),
        ("jamba", JAMBA, r"layer 1 would be another as layer 2 .*\(attn_layer_period = 2\), and the plan does not"),
        ("diffllama", {}, r"layer 1 would be another as layer 2 .*lambda_init"),
        ("unheard-of", None, None),
    ],
)
def test_what_a_layer_is_made_of_and_what_it_keeps(
    family: str, more: dict[str, Any] | None, differs: str | None
) -> None:
    before, after = ({"model_type": family} if more is None else raw_config(family, n, **more) for n in (3, 4))
    places = {0: 0, 2: 1, 3: 2}  # a new one above the lowest
    if differs is None:
        check_same_layers(before, after, places, "base")
        return
    with pytest.raises(UserError, match=differs):
        check_same_layers(before, after, places, "base")


@pytest.fixture
def unsound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A base whose layers know their depth, of a family that is taken as if it were not known by name."""
    monkeypatch.setattr(depth, "_FAMILY_FOLLOWS_DEPTH", {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw_config("diffllama", 6)))
    model.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("method", ["solar", "avg-deus"])
def test_the_expansion_is_refused_and_nothing_is_left(
    method: str, unsound: str, grow: Callable[..., Expanded], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="lambda_init"):
        grow(unsound, method=method, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["inspect"], ["expand", "--dry-run"]])
def test_it_is_refused_by_what_only_looks(
    command: list[str],
    unsound: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = [unsound, str(tmp_path / "out")][: len(command)]
    monkeypatch.setattr(sys, "argv", ["lesa-ray", command[0], *places, "--method", "solar", *command[1:]])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "lambda_init" in capsys.readouterr().err


def test_a_new_layer_must_be_like_the_one_it_takes_its_settings_from() -> None:
    before, after = (raw_config("jamba", layers, **JAMBA) for layers in (2, 4))
    check_same_layers(before, after, {0: 0, 1: 1, 2: 0, 3: 1}, "base")
    with pytest.raises(UserError, match="layer 1 would be another as layer 2"):
        check_same_layers(before, after, {0: 0, 1: 1, 2: 1, 3: 1}, "base")
