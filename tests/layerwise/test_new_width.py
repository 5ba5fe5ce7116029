"""New layers narrower or wider than the old ones of an ordinary model, which becomes a layer-wise scaled one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lesa_ray import ExpandConfig, Expanded, UserError
from lesa_ray.cli import app
from lesa_ray.config import load_settings
from lesa_ray.distributed.expand import expand
from lesa_ray.expansion.prepare import prepare
from lesa_ray.expansion.runner import InlineRunner, Silent
from lesa_ray.layerwise.conversion import as_layerwise
from lesa_ray.layerwise.names import CODE_FILES, MODEL_TYPE
from lesa_ray.report import terminal
from tests import families
from tests.families import layer_tensors, logits, tensors, tokens
from tests.layerwise.models import loaded

Grow = Callable[..., Expanded]
Bases = Callable[[str], str]
SHORT: dict[str, Any] = {"epochs": 1, "ridge_yardstick": False}
FFN = 96
"""Of the tiny families; with 4 query heads, 2 KV heads of 16."""


EVERY = ["lesa", "avg-deus", "opt-deus", "llama-pro", "solar", "copy", "random", "mean-aligned"]


def config_of(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "config.json").read_text())
    return found


def widths_of(folder: str) -> list[tuple[int, int]]:
    raw = config_of(folder)
    return list(zip(raw["intermediate_sizes"], raw["num_attention_heads_per_layer"], strict=True))


@pytest.mark.parametrize("method", EVERY)
def test_narrower_and_wider_layers_of_every_kind_of_method(method: str, bases: Bases, grow: Grow) -> None:
    base = bases("llama")
    settings = {"lesa": SHORT} if method == "lesa" else {}
    result = grow(base, method=method, layers=7, new_width="0.5,2", zero_init=True, **settings)
    new = result.manifest["new_layers"]
    assert [widths_of(result.out)[layer] for layer in new] == [(48, 2), (192, 8)]
    assert {widths_of(result.out)[layer] for layer in range(7) if layer not in new} == {(FFN, 4)}
    model = loaded(result.out)
    assert torch.equal(logits(model, tokens()), logits(families.load_strict(base, "llama"), tokens()))
    assert model.generate(tokens(1, 8), max_new_tokens=4, do_sample=False, eos_token_id=-1).shape == (1, 12)
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    for record in result.manifest["layers"]:
        if record["kind"] == "old":
            old = layer_tensors(base, "llama", record["base_layers"][0])
            now = layer_tensors(result.out, "llama", record["index"])
            assert all(torch.equal(old[name], now[name]) for name in old | now)


def test_a_narrower_copy_keeps_the_largest_neurons_and_heads(grow: Grow, tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    state["model.layers.2.self_attn.q_proj.weight"][32:] *= 3  # the second group's heads are the two largest of all
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    result = grow(base, method="copy", position="2", new_width=0.5)
    old, new = layer_tensors(base, "llama", 2), layer_tensors(result.out, "llama", 3)
    squares = sum((old[f"mlp.{name}_proj.weight"].double() ** 2).sum(1) for name in ("gate", "up"))
    squares = squares + (old["mlp.down_proj.weight"].double() ** 2).sum(0)
    kept = squares.topk(FFN // 2).indices.sort().values
    assert torch.equal(new["mlp.up_proj.weight"], old["mlp.up_proj.weight"][kept])
    assert torch.equal(new["mlp.down_proj.weight"], old["mlp.down_proj.weight"][:, kept])
    query, output = old["self_attn.q_proj.weight"].double(), old["self_attn.o_proj.weight"].double()
    heads = ((query**2).sum(1) + (output**2).sum(0)).reshape(2, 2, 16).sum(2)
    assert heads[1].min() > heads[0].max()
    of_group = heads.argmax(1).tolist()
    rows = torch.cat([torch.arange(16) + 16 * (2 * group + head) for group, head in enumerate(of_group)])
    assert torch.equal(new["self_attn.q_proj.weight"], old["self_attn.q_proj.weight"][rows])
    assert torch.equal(new["self_attn.o_proj.weight"], old["self_attn.o_proj.weight"][:, rows])
    assert torch.equal(new["self_attn.k_proj.weight"], old["self_attn.k_proj.weight"])
    record = result.manifest["widths"]["new"]["3"]["heads"]
    first, second = of_group[0], 2 + of_group[1]
    assert record["kept"] == (f"{first}-{second}" if second == first + 1 else f"{first},{second}")


def test_a_wider_copy_computes_what_the_copy_computes(bases: Bases, grow: Grow) -> None:
    plain, wide = (grow(bases("llama"), method="copy", position="1,3", **more) for more in ({}, {"new_width": 1.5}))
    assert [widths_of(wide.out)[layer] for layer in (2, 5)] == [(144, 6)] * 2
    torch.testing.assert_close(logits(loaded(wide.out), tokens()), logits(loaded(plain.out), tokens()))
    again = grow(bases("llama"), method="copy", position="1,3", new_width=1.5)
    one, two = ({path.name: path.read_bytes() for path in Path(r.out).iterdir()} for r in (wide, again))
    assert one == two


def test_what_is_added_learns(bases: Bases, grow: Grow) -> None:
    """The gradient reaches the output weights of added neurons and heads, each its own, and is not far from others'."""
    result = grow(bases("llama"), method="copy", position="2", new_width=2)
    model = loaded(result.out)
    ids = tokens(4, 32)
    model(input_ids=ids, labels=ids).loss.backward()
    layer = model.model.layers[3]
    in_heads = [*range(32, 64), *range(96, 128)]  # the last two of each group of four
    for matrix, added in ((layer.mlp.down_proj, [*range(FFN, 2 * FFN)]), (layer.self_attn.o_proj, in_heads)):
        gradient = matrix.weight.grad
        assert not matrix.weight[:, added].any()
        sizes = gradient[:, added].norm(dim=0)
        assert float(sizes.min()) > 0
        assert 0.1 < float(sizes.mean() / gradient.norm(dim=0).mean()) < 10
        assert int(torch.linalg.matrix_rank(gradient[:, added])) == gradient.shape[0], "they do not all learn the same"
    for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
        assert not matrix.weight.grad[FFN:].any(), "their output weights are zero until the first step"


@pytest.mark.parametrize("family", ["llama_tied", "mistral", "qwen2", "qwen3"])
def test_other_llamas(family: str, bases: Bases, grow: Grow) -> None:
    result = grow(bases(family), method="llama-pro", layers=7, new_width="0.5,1.5")
    assert [width for width in widths_of(result.out) if width != (FFN, 4)] == [(48, 2), (144, 6)]
    model = loaded(result.out)
    assert type(model).__name__ == "LayerwiseLlamaForCausalLM"
    assert torch.equal(logits(model, tokens()), logits(families.load_strict(bases(family), family), tokens()))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_qwens_heads_move_with_their_biases_and_keep_their_norms(family: str, bases: Bases, grow: Grow) -> None:
    """Tied embeddings, a gap narrower and a gap wider; then deeper again from what came out."""
    base = bases(family)
    size = config_of(base).get("head_dim") or families.HIDDEN // 4
    result = grow(base, method="copy", position="1,3", new_width="0.5,1.5")
    for place, origin in ((2, 1), (5, 3)):
        old, new = layer_tensors(base, family, origin), layer_tensors(result.out, family, place)
        kept = result.manifest["widths"]["new"][str(place)]["heads"]
        rows = heads_of(kept["kept"], size)
        where = torch.arange(len(rows)) if place == 2 else torch.tensor([*range(2 * size), *range(3 * size, 5 * size)])
        for kind in ("weight", "bias") if family == "qwen2" else ("weight",):
            query = f"self_attn.q_proj.{kind}"
            assert torch.equal(new[query][where], old[query][rows])
        assert new["self_attn.q_proj.weight"].shape[0] == (2, 6)[place == 5] * size
        added = sorted({*range(len(new["self_attn.q_proj.weight"]))} - {*where.tolist()})
        assert not new["self_attn.o_proj.weight"][:, added].any()
        for name in old:
            if name.startswith(("self_attn.k", "self_attn.v", "self_attn.q_norm")) or "layernorm" in name:
                assert torch.equal(new[name], old[name]), name
    plain = grow(base, method="copy", position="1,3", new_width="1,1.5")
    copies = grow(base, method="copy", position="1,3")
    torch.testing.assert_close(logits(loaded(plain.out), tokens()), logits(loaded(copies.out), tokens()))
    again = grow(result.out, method="avg-deus", layers=9, zero_init=True)
    assert torch.equal(logits(loaded(again.out), tokens()), logits(loaded(result.out), tokens()))
    assert {"model_type": MODEL_TYPE}.items() <= config_of(again.out).items()


def test_heads_are_as_wide_as_their_norm_where_the_configuration_leaves_it_out(grow: Grow, tmp_path: Path) -> None:
    """128 is Qwen3's default, whatever the width over the heads is."""
    base = families.make("qwen3", tmp_path / "base", head_dim=128)
    raw = config_of(base)
    Path(base, "config.json").write_text(json.dumps({name: raw[name] for name in raw if name != "head_dim"}))
    result = grow(base, method="llama-pro", layers=6, new_width=0.5)
    assert widths_of(result.out)[-1] == (48, 2)
    assert torch.equal(logits(loaded(result.out), tokens()), logits(families.load_strict(base, "qwen3"), tokens()))


def heads_of(runs: str, size: int) -> torch.Tensor:
    """Rows of the heads that a manifest names as `0-2,5`."""
    heads: list[int] = []
    for run in runs.split(","):
        first, _, last = run.partition("-")
        heads += range(int(first), int(last or first) + 1)
    return (torch.tensor(heads).unsqueeze(1) * size + torch.arange(size)).flatten()


@pytest.mark.parametrize("method", ["lesa", "opt-deus"])
def test_methods_that_make_layers_on_a_qwen(method: str, bases: Bases, grow: Grow) -> None:
    settings = {"lesa": SHORT} if method == "lesa" else {}
    result = grow(bases("qwen2"), method=method, layers=6, new_width=0.5, zero_init=True, vectors="mean", **settings)
    model = loaded(result.out)
    assert torch.equal(logits(model, tokens()), logits(families.load_strict(bases("qwen2"), "qwen2"), tokens()))
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"rope_theta": 1e6, "sliding_window": None, "num_key_value_heads": 8}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}}),
        ("llama", {"num_attention_heads": 8, "head_dim": 24, "attention_bias": True, "rms_norm_eps": 1e-5}),
        ("qwen2", {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1,
                   "num_key_value_heads": 4, "attention_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "num_key_value_heads": 2,
                   "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
        ("qwen3", {"rope_theta": 1e6, "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 8}),
    ],
)  # fmt: skip
def test_the_class_computes_the_same_from_older_and_shorter_configurations(name: str, changes: dict[str, Any]) -> None:
    """Keys left to a class's defaults, and the names they had before transformers 5."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw: dict[str, Any] = {
        "model_type": name, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    before = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw)).eval()
    after = AutoModelForCausalLM.from_config(AutoConfig.for_model(**as_layerwise(raw, "here", 2))).eval()
    after.load_state_dict(before.state_dict())
    ids = tokens(2, 32)
    assert torch.equal(logits(before, ids), logits(after, ids))
    assert torch.equal(*(one.generate(ids, max_new_tokens=3, do_sample=False) for one in (before, after)))


def test_the_folder_says_what_it_is(bases: Bases, grow: Grow) -> None:
    """That its code loads it where the package is not: test_layerwise_model.py."""
    result = grow(bases("llama"), method="avg-deus", layers=6, new_width=0.5)
    assert {*CODE_FILES} <= {path.name for path in Path(result.out).iterdir()}
    assert config_of(result.out)["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    card = Path(result.out, "README.md").read_text()
    assert "no longer llama but layerwise_llama" in card
    assert "trust_remote_code=True" in card


def test_new_layers_as_wide_as_the_old_ones_change_nothing(bases: Bases, grow: Grow) -> None:
    plain, same = (grow(bases("llama"), method="avg-deus", layers=7, **more) for more in ({}, {"new_width": "1,1.0"}))
    assert config_of(plain.out) == config_of(same.out)
    assert config_of(same.out)["model_type"] == "llama"
    one, two = tensors(plain.out), tensors(same.out)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("0", "options: new_width: Input should be greater than 0"),
        ("-0.5", "options: new_width: Input should be greater than 0"),
        ("0.5,nan", "options: new_width: Input should be"),
        ("1000", "options: new_width: Input should be less than or equal to 64"),
        ("half", "options: new_width: Input should be a valid number"),
        ("", "options: new_width: Value should have at least 1 item"),
    ],
)
def test_widths_that_are_none_are_refused(value: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        load_settings(ExpandConfig, None, base="a", out="b", new_width=value)
    assert "\n" not in str(refused.value)


def test_more_values_than_new_layers_and_other_architectures_are_refused(bases: Bases, tmp_path: Path) -> None:
    out = str(tmp_path / "out")

    def refused(family: str, *more: str) -> str:
        result = CliRunner().invoke(app, ["expand", bases(family), out, "--dry-run", "--method", "copy", *more])
        assert result.exit_code != 0
        assert isinstance(result.exception, UserError)
        return str(result.exception)

    assert refused("llama", "--layers", "7", "--new-width", "1,2,3").startswith("--new-width 1,2,3: 3 values for 2 new")
    for family in ("phi3", "gpt2", "gemma2", "qwen3_moe"):
        told = refused(family, "--new-width", "0.5")
        assert f"Llama, Mistral, Qwen2 and Qwen3 do without a sliding window: {family} is none of them; lea" in told
        assert "\n" not in told
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": families.LAYERS - 1}
    for family, changes in (("mistral", {"sliding_window": 8}), ("qwen2", windows), ("qwen3", windows)):
        sliding = families.make(family, tmp_path / family, **changes)
        with pytest.raises(UserError, match=r"this one's window slides \(sliding_window in config.json\)"):
            prepare(ExpandConfig(base=sliding, out=out, new_width=(0.5,)))
    odd = families.make("qwen3", tmp_path / "odd", num_attention_heads=6)
    with pytest.raises(UserError, match="its code wants heads that divide the width, not 6 for 64"):
        prepare(ExpandConfig(base=odd, out=out, new_width=(0.5,)))
    assert not Path(out).exists()


def test_the_plan_says_that_the_class_changes(bases: Bases, tmp_path: Path) -> None:
    laid_out = prepare(ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), layers=7, new_width=(0.5, 1.0)))
    described = terminal.describe(laid_out)["result"]
    assert described["family"] == MODEL_TYPE
    assert (described["ffn"], described["heads"]) == ([96, 96, 96, 48, 96, 96, 96], [4, 4, 4, 2, 4, 4, 4])
    change = terminal.class_change(laid_out)
    assert change is not None
    assert change.startswith("llama → layerwise_llama")


def test_the_plan_and_the_expansion_say_how_far_heads_are_from_what_was_asked(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a base in which every query head has its own KV head; an expansion of before heads were the nearest multiple
    is not taken for this one."""
    told: list[str] = []

    class Told(Silent):
        def phase(self, name: str, total: float) -> None:
            told.append(name)

    whole = families.make("llama", tmp_path / "base", num_key_value_heads=4)
    config = ExpandConfig(base=whole, out=str(tmp_path / "out"), method="copy", layers=6, new_width=(1.25,))
    note = "query heads come in steps of the 4 KV heads: 4 instead of 5"
    expansion = prepare(config)
    assert terminal.describe(expansion)["result"]["note"] == note
    terminal.show_expansion(expansion)
    assert note in capsys.readouterr().err
    assert expansion.identity["heads"] == [4]
    expand(config, InlineRunner(), Told())
    assert note in told
    half = prepare(config.model_copy(update={"new_width": (0.5,)}))
    assert "heads" not in half.identity
    assert terminal.describe(half)["result"]["note"] == "query heads come in steps of the 4 KV heads: 4 instead of 2"


@pytest.mark.parametrize("zero_init", [False, True])
def test_a_slot_is_cut_when_all_its_tensors_are_there(zero_init: bool, bases: Bases, tmp_path: Path) -> None:
    config = ExpandConfig(
        base=bases("llama"), out=str(tmp_path / "out"), layers=6, new_width=(0.5,), zero_init=zero_init
    )
    *fits, width = prepare(config).units
    private = {"self_attn.q_proj.weight", "self_attn.o_proj.weight"} | {
        f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    }
    zeroed = {"self_attn.o_proj.weight", "mlp.down_proj.weight"} if zero_init else set()
    assert set(width.after) == private - zeroed == {name for _, name in width.makes}
    assert {unit.name for unit in fits} >= set(width.after)
