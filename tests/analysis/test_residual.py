"""What layers add to the stream, against transformers' own hidden states in float64, a pass for each layer.

What attention writes is found in another way than by hooks: the same model with the layer's feed-forward output zeroed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lesa_ray import UserError
from lesa_ray.analysis.residual import contributions, measure_residual, prepare_residual
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.evaluation.perplexity import Row
from lesa_ray.training.model import layers_of
from tests import families
from tests.evaluation import tiny

Bases = Callable[[str], str]
FEED_FORWARD = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.experts.down_proj")


def rows(lengths: tuple[int, ...] = (16, 11, 5), lead: int | None = None) -> list[Row]:
    return [Row(families.tokens(1, length, seed=length)[0].numpy(), lead=lead) for length in lengths]


@torch.no_grad()
def streams(model: PreTrainedModel, some: list[Row]) -> list[torch.Tensor]:
    """Hidden states before and after each layer but the last, whose are behind the final norm: (tokens, width) each."""
    passes = [model(torch.from_numpy(row.ids)[None], output_hidden_states=True).hidden_states for row in some]
    return [torch.cat([states[i][0] for states in passes]) for i in range(len(passes[0]) - 1)]


def zero_feed_forward(layer: torch.nn.Module) -> None:
    found = [p for name, p in layer.named_parameters() if any(one in f".{name}" for one in FEED_FORWARD)]
    assert found
    for parameter in found:
        parameter.detach().zero_()


def mean(values: torch.Tensor) -> float:
    return float(values.mean())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "gpt2", "mixtral", "phi3"])
def test_figures_are_those_of_the_hidden_states(name: str, bases: Bases) -> None:
    def load() -> PreTrainedModel:
        options = {"experts_implementation": "eager"} if name == "mixtral" else {}
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            bases(name), dtype=torch.float64, **options
        ).eval()
        return model

    some = rows()
    found = contributions(load(), some, window=16, most=1000, name="model")
    assert (found["tokens"], found["unsplit"], len(found["layers"])) == (32, None, families.LAYERS)
    plain = streams(load(), some)
    for i in range(families.LAYERS - 1):
        model = load()
        zero_feed_forward(layers_of(model)[i])
        before, after = plain[i], plain[i + 1]
        attention = streams(model, some)[i + 1] - before
        feed_forward = after - before - attention
        length = before.norm(dim=1)
        expected = {
            "attention": mean(attention.norm(dim=1) / length),
            "mlp": mean(feed_forward.norm(dim=1) / length),
            "block": mean((after - before).norm(dim=1) / length),
            "cosine": mean((before * after).sum(1) / length / after.norm(dim=1)),
        }
        assert found["layers"][i] == pytest.approx(expected, rel=1e-4)
    last = found["layers"][-1]
    assert all(value > 0 for value in (last["attention"], last["mlp"], last["block"]))


def test_windows_are_cut_led_and_counted(bases: Bases) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases("llama"), dtype=torch.float64).eval()
    [row] = rows((16,), lead=1)
    ids = row.ids.copy()
    ids[[0, 6, 12]] = 1
    parts = [Row(ids[:6]), Row(ids[6:12]), Row(ids[12:14])]
    assert contributions(model, [row], 6, 14, "model") == contributions(model, parts, 6, 1000, "model")
    hooks = [hook for module in model.modules() for hook in module._forward_hooks]
    assert not hooks


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("granite", {"residual_multiplier": 0.22}, "does more than add"),
        ("bloom", {"num_attention_heads": 4, "n_head": 4}, "does more than add"),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}, "not known for this family"),
    ],
)
def test_layers_that_do_not_just_add_have_no_parts(family: str, settings: dict[str, Any], says: str) -> None:
    shape = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**shape, **heads, **settings})
    found = contributions(AutoModelForCausalLM.from_config(config).eval(), rows(), 16, 1000, "model")
    assert says in found["unsplit"]
    for layer in found["layers"]:
        assert layer["attention"] is None
        assert layer["mlp"] is None
        assert layer["block"] > 0
        assert math.isfinite(layer["cosine"])


def test_experts_that_write_tokens_in_one_row_are_split_too() -> None:
    """Llama 4's give (batch · tokens, width)."""
    shape = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}
    experts = {"num_local_experts": 2, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 32}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama4_text", **{**shape, **heads, **experts})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    some = rows()
    found = contributions(model, some, 16, 1000, "model")
    plain = streams(model, some)
    change = (plain[1] - plain[0]).norm(dim=1) / plain[0].norm(dim=1)
    assert found["unsplit"] is None
    assert found["layers"][0]["block"] == pytest.approx(mean(change), rel=1e-4)
    assert found["layers"][0]["mlp"] > 0


def test_half_precision_splits_too(bases: Bases) -> None:
    exact, rounded = (
        contributions(
            AutoModelForCausalLM.from_pretrained(bases("llama"), dtype=dtype).eval(), rows(), 16, 1000, "model"
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded["unsplit"] is None
    for one, other in zip(exact["layers"], rounded["layers"], strict=True):
        assert other == pytest.approx(one, rel=0.05)


def test_a_new_layer_that_writes_nothing_adds_nothing(bases: Bases, grow: Callable[..., Any]) -> None:
    out = grow(bases("llama"), method="llama-pro", layers=6, position="2").out
    found = contributions(AutoModelForCausalLM.from_pretrained(out).eval(), rows(), 16, 1000, "model")
    new = found["layers"][3]
    assert (new["attention"], new["mlp"], new["block"]) == (0, 0, 0)
    assert new["cosine"] == pytest.approx(1)
    assert all(layer["block"] > 0.1 for i, layer in enumerate(found["layers"]) if i != 3)


def test_from_files_of_text_and_from_token_blocks(tmp_path: Path) -> None:
    base = tiny.checkpoint(tmp_path / "base")
    (tmp_path / "some.txt").write_text("To be, or not to be.")
    text = AnalyzeConfig(base=base, data=(str(tmp_path / "some.txt"),), window=9)
    found = measure_residual(*prepare_residual(text), 1000)
    assert (found["tokens"], found["window"], found["data"]) == (21, 9, str(tmp_path / "some.txt"))
    ids = [tiny.BEGIN, *b"To be, or not to be."]
    blocks = tiny.blocks(str(tmp_path / "blocks"), "text", 21, [{"input_ids": ids}])
    again = measure_residual(*prepare_residual(AnalyzeConfig(base=base, data=(blocks,))), 1000)
    assert (again["tokens"], again["window"]) == (21, 21)
    few = measure_residual(*prepare_residual(AnalyzeConfig(base=base, data=(blocks,))), 7)
    assert few["tokens"] == 7


def test_tokens_that_enter_as_zeros_have_no_ratio(bases: Bases) -> None:
    """At the lowest layer, which writes something to them all the same."""
    model = AutoModelForCausalLM.from_pretrained(bases("llama"), dtype=torch.float64).eval()
    some = [Row(np.array([7, 3, 9]))]
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = 0
    before, after = streams(model, some)[:2]
    kept = [0, 2]
    found = contributions(model, some, 16, 1000, "model")
    expected = mean((after - before)[kept].norm(dim=1) / before[kept].norm(dim=1))
    assert found["tokens"] == 3
    assert found["layers"][0]["block"] == pytest.approx(expected, rel=1e-4)


def test_tokens_that_the_model_does_not_have(bases: Bases) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases("llama"))
    with pytest.raises(UserError, match=r"go from 0 to 128, its vocabulary has 128"):
        contributions(model, [Row(np.array([0, 128]))], 8, 10, "model")
    with pytest.raises(UserError, match="no token in the data"):
        contributions(model, [], 8, 10, "model")
