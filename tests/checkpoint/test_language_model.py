"""Checkpoints that see as well: their language model is taken by itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from lesa_ray import ExpandConfig, Expanded, UserError
from lesa_ray.checkpoint.language_model import component, language_config, language_name
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.evaluation import checkpoints
from lesa_ray.evaluation.checkpoints import load_model, read_bounds
from lesa_ray.expansion.prepare import prepare
from lesa_ray.expansion.rehearsal import check_layers
from lesa_ray.report import terminal
from tests import families
from tests.report.printing import printed
from tests.training.exporting import run, save_state

Grow = Callable[..., Expanded]
TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
SIGHT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    # Tied; even layers slide, a setting that only its class says.
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 4, "query_pre_attn_scalar": 16},
            "vision_config": {**SIGHT, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "mistral", "tie_word_embeddings": False},
            "vision_config": {**SIGHT, "model_type": "pixtral", "head_dim": 16},
            "tie_word_embeddings": False,
            "image_token_index": 10,
        },
    ),
}
OF_TEXT = {"gemma3": ("gemma3_text", "Gemma3ForCausalLM"), "mistral3": ("mistral", "MistralForCausalLM")}
GEMMA4: dict[str, Any] = {
    "text_config": {
        **TEXT,
        "num_hidden_layers": 4,
        "model_type": "gemma4_text",
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 4,
    },
    "vision_config": {**SIGHT, "model_type": "gemma4_vision", "head_dim": 16, "global_head_dim": 16},
    "audio_config": None,
}
"""Layers that attend to everything have heads of another size, which config.json says by their indices."""
ROTARY = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
GLM = {**ROTARY, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
EYES = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "patch_size": 14}
SAME_FOR_TEXT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # What it is for text alone; its settings for text, and for pictures.
    "qwen2_vl": ("qwen2", {"rope_parameters": ROTARY}, {**EYES, "embed_dim": 32, "hidden_size": 64}),
    "qwen2_5_vl": ("qwen2", {"rope_parameters": ROTARY}, {**EYES, "fullatt_block_indexes": [1]}),
    "qwen3_vl": (
        "qwen3",
        {"rope_parameters": {**ROTARY, "mrope_interleaved": True}},
        {**EYES, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    ),
    "glm4v": ("glm4", {"rope_parameters": GLM, "pad_token_id": 0}, {**EYES, "image_size": 28}),
    "glm4v_moe": (
        "glm4_moe",
        {
            "rope_parameters": GLM,
            "pad_token_id": 0,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        {**EYES, "image_size": 28},
    ),
}
NEW, OLD = r"^model\.language_model\.", r"^language_model\.model\."


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def base(family: str) -> str:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            cls, config = WHOLE[family]
            model = getattr(transformers, cls)(AutoConfig.for_model(family, **config))
            families._randomise(model, 0)
            model.save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text("{}")
            (folder / "tokenizer_config.json").write_text("{}")
            made[family] = str(folder)
        return made[family]

    return base


def whole_model(family: str, folder: str) -> PreTrainedModel:
    model: PreTrainedModel = getattr(transformers, WHOLE[family][0]).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def named(base: str, folder: Path, old: str, new: str) -> str:
    """A copy whose tensors have other names."""
    shutil.copytree(base, folder)
    tensors = {re.sub(old, new, name): tensor for name, tensor in families.tensors(base).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def both_ways(family: str, base: str, tmp_path: Path) -> list[str]:
    """The checkpoint with names as transformers writes them now, and as before."""
    names = families.tensors(base)
    if any(re.match(NEW, name) for name in names):
        return [base, named(base, tmp_path / "old", NEW, "language_model.model.")]
    assert any(re.match(OLD, name) for name in names)
    return [base, named(base, tmp_path / "new", OLD, "model.language_model.")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.text_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("mtp.layers.0.mlp.up_proj.weight", "mtp.layers.0.mlp.up_proj.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", None),
        ("model.visual.blocks.0.mlp.fc1.weight", None),
        ("visual.blocks.0.mlp.fc1.weight", None),
        ("vision_tower.text_model.layers.0.mlp.fc1.weight", None),
        ("multi_modal_projector.linear.weight", None),
    ],
)
def test_names(name: str, expected: str | None) -> None:
    assert language_name(name) == expected


def test_parts() -> None:
    assert component("model.vision_tower.encoder.layers.0.mlp.fc1.weight") == "vision_tower"
    assert component("multi_modal_projector.linear.weight") == "multi_modal_projector"


@pytest.mark.parametrize("family", list(WHOLE))
def test_it_is_what_transformers_takes_for_it(family: str, seeing: Callable[[str], str], tmp_path: Path) -> None:
    model = whole_model(family, seeing(family))
    text = model.model.language_model
    expected = {f"model.{name}": tensor for name, tensor in text.state_dict().items()}
    tied = family == "gemma3"
    if not tied:
        expected["lm_head.weight"] = model.lm_head.weight.detach()
    for base in both_ways(family, seeing(family), tmp_path):
        checkpoint = open_checkpoint(base)
        assert checkpoint.tensors.keys() == expected.keys()
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())
        assert (checkpoint.config["model_type"], checkpoint.config["architectures"][0]) == OF_TEXT[family]
        assert checkpoint.config["tie_word_embeddings"] is tied
        assert checkpoint.config["dtype"] == "float32"
        assert sorted(checkpoint.left_out) == ["multi_modal_projector", "vision_tower"]
        everything = sum(tensor.nbytes for tensor in families.tensors(base).values())
        assert checkpoint.nbytes + sum(checkpoint.left_out.values()) == everything
        assert "preprocessor_config.json" not in checkpoint.files


def test_settings_of_the_whole_are_its_own() -> None:
    """As google/gemma-3-4b-it says them: most are left to the class."""
    text = {"hidden_size": 2560, "num_hidden_layers": 7, "model_type": "gemma3_text", "sliding_window": 1024}
    raw = {"model_type": "gemma3", "eos_token_id": [1, 106], "torch_dtype": "bfloat16", "text_config": text}
    config = language_config(raw, "base")
    assert config is not None
    assert (config["eos_token_id"], config["bos_token_id"], config["dtype"]) == ([1, 106], 2, "bfloat16")
    assert config["layer_types"] == [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
    assert (config["hidden_size"], config["vocab_size"]) == (2560, 262_208)
    own = language_config({**raw, "text_config": {**text, "eos_token_id": 5, "dtype": "float16"}}, "base")
    assert own is not None
    assert (own["eos_token_id"], own["dtype"]) == (5, "float16")


@pytest.mark.parametrize("family", list(WHOLE))
@pytest.mark.parametrize("method", ["llama-pro", "opt-deus"])
def test_it_grows_and_keeps_its_function(
    family: str, method: str, seeing: Callable[[str], str], grow: Grow, tmp_path: Path
) -> None:
    ids = families.tokens()
    expected = families.logits(whole_model(family, seeing(family)), ids)
    for base in both_ways(family, seeing(family), tmp_path):
        result = grow(base, method=method, layers=7)
        files = {path.name for path in Path(result.out).iterdir()}
        assert "tokenizer_config.json" in files
        assert "preprocessor_config.json" not in files
        config = json.loads((Path(result.out) / "config.json").read_text())
        assert (config["model_type"], config["architectures"][0]) == OF_TEXT[family]
        assert config["num_hidden_layers"] == 7
        assert "vision_config" not in config
        model, info = AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(families.logits(model.eval(), ids), expected)
    assert result.manifest["family"] == OF_TEXT[family][0]


@pytest.mark.parametrize("family", list(SAME_FOR_TEXT))
def test_without_pictures_it_is_the_model_that_it_was_made_of(family: str, grow: Grow, tmp_path: Path) -> None:
    to, text, vision = SAME_FOR_TEXT[family]
    whole = AutoConfig.for_model(family, text_config={**TEXT, **text}, vision_config=vision)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(whole).eval()
    families._randomise(model, 0)
    base = tmp_path / "base"
    model.save_pretrained(base)
    ids = families.tokens()
    expected = families.logits(model, ids)
    checkpoint = open_checkpoint(str(base))
    assert checkpoint.config["model_type"] == to
    assert not {"mrope_section", "mrope_interleaved"} & checkpoint.config["rope_parameters"].keys()
    assert checkpoint.config.keys() <= AutoConfig.for_model(to).to_dict().keys()
    assert list(checkpoint.left_out) == ["visual"]
    assert torch.equal(families.logits(load_model(str(base), "float32"), ids), expected)
    result = grow(str(base), method="llama-pro", layers=7)
    grown, info = AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info.values()), info
    assert grown.config.num_hidden_layers == 7
    assert torch.equal(families.logits(grown.eval(), ids), expected)


def test_files_with_all_settings_at_the_top_and_pictures_beside_the_model(tmp_path: Path) -> None:
    """As Qwen/Qwen2.5-VL-7B-Instruct lies on the hub: no `text_config`, tensors below `model.` and `visual.`."""
    text = {**{key: value for key, value in TEXT.items() if key != "head_dim"}, "rope_theta": 5e5, "eos_token_id": 7}
    raw = {
        "model_type": "qwen2_5_vl",
        **text,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "torch_dtype": "bfloat16",
        "vision_config": {**EYES, "fullatt_block_indexes": [1]},
    }
    config = language_config(raw, "base")
    assert config is not None
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert {key: config[key] for key in text if key != "rope_theta"} == {
        key: value for key, value in text.items() if key != "rope_theta"
    }
    assert config["dtype"] == "bfloat16"
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**raw)).float().eval()
    families._randomise(model, 0)
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    tensors = families.tensors(str(folder))
    beside = {re.sub(r"^model\.(?=visual\.)", "", re.sub(NEW, "model.", name)): tensors[name] for name in tensors}
    assert {name.split(".")[0] for name in beside} == {"model", "visual", "lm_head"}
    save_file(beside, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    ids = families.tokens()
    assert torch.equal(families.logits(load_model(str(folder), "float32"), ids), families.logits(model, ids))


def test_settings_by_layer_index_move_along(grow: Grow, tmp_path: Path) -> None:
    model = transformers.Gemma4ForConditionalGeneration(AutoConfig.for_model("gemma4", **GEMMA4)).eval()
    families._randomise(model, 0)
    model.save_pretrained(tmp_path / "base")
    result = grow(str(tmp_path / "base"), method="llama-pro", layers=6)
    config = json.loads((Path(result.out) / "config.json").read_text())
    heads = {int(layer): settings["head_dim"] for layer, settings in config["per_layer_config"].items()}
    full = [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    assert heads == dict.fromkeys(full, 32)
    assert full != [1, 3]
    grown = AutoModelForCausalLM.from_pretrained(result.out).eval()
    ids = families.tokens()
    assert torch.equal(families.logits(grown, ids), families.logits(model, ids))


def test_layers_between_are_means(seeing: Callable[[str], str], grow: Grow) -> None:
    base = seeing("mistral3")
    result = grow(base, method="avg-deus", position="2", layers=6)
    before = families.tensors(base)
    stack = "language_model.model." if "language_model.model.norm.weight" in before else "model.language_model."

    def layer(tensors: dict[str, Tensor], prefix: str, index: int) -> dict[str, Tensor]:
        start = f"{prefix}layers.{index}."
        return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

    lower, upper = (layer(before, stack, index) for index in (2, 3))
    made = layer(families.tensors(result.out), "model.", 3)
    assert made.keys() == lower.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor.double(), (lower[name].double() + upper[name].double()) / 2)


@pytest.mark.parametrize("family", list(WHOLE))
def test_it_is_evaluated_by_itself(family: str, seeing: Callable[[str], str], tmp_path: Path) -> None:
    ids = families.tokens()
    expected = families.logits(whole_model(family, seeing(family)), ids)
    for base in both_ways(family, seeing(family), tmp_path):
        model = load_model(base, "float32")
        assert type(model).__name__ == OF_TEXT[family][1]
        assert torch.equal(families.logits(model, ids), expected)
        bounds = read_bounds(base)
        assert bounds.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert bounds.config.model_type == OF_TEXT[family][0]


@pytest.mark.parametrize("trained", ["model.norm.weight", "model."])
@pytest.mark.parametrize("shard_size", ["20KB", "150KB", "10MB"])
def test_what_is_trained_of_it_is_it_alone(
    shard_size: str, trained: str, seeing: Callable[[str], str], tmp_path: Path
) -> None:
    """However the files mix it with what is left out."""
    base = str(tmp_path / "base")
    whole_model("gemma3", seeing("gemma3")).save_pretrained(base, max_shard_size=shard_size)
    expected = load_model(base, "float32")
    values = {name: p.detach() * 1.5 for name, p in expected.named_parameters() if name.startswith(trained)}
    run(base, save_state(str(tmp_path / "state"), values), str(tmp_path / "out"))
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(values.get(name, parameter))
    model, info = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not any(info.values()), info
    ids = families.tokens()
    assert torch.equal(families.logits(model.eval(), ids), families.logits(expected, ids))
    assert open_checkpoint(str(tmp_path / "out")).tensors.keys() == open_checkpoint(base).tensors.keys()


def test_bounds_of_a_repository_are_those_of_its_language_model(
    seeing: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_fetch", lambda name, url, patterns: seeing("gemma3"))
    bounds = read_bounds("hf://org/name")
    assert (bounds.config.model_type, bounds.vocab_size) == ("gemma3_text", 128)


def test_what_is_left_out_is_told(seeing: Callable[[str], str], grow: Grow, tmp_path: Path) -> None:
    expansion = prepare(ExpandConfig(base=seeing("gemma3"), out=str(tmp_path / "out"), method="llama-pro"))
    shown = printed(terminal.show_base, expansion, 160)
    assert re.search(r"larger one; left out: .*vision_tower \([\d.]+ kB\)", shown)
    assert terminal.describe(expansion)["base"]["left_out"] == expansion.checkpoint.left_out
    card = (Path(grow(seeing("gemma3"), method="llama-pro").out) / "README.md").read_text()
    assert re.search(r"language model of its base alone, without .*vision_tower", card)


def test_a_language_model_that_does_not_load_is_refused(seeing: Callable[[str], str], tmp_path: Path) -> None:
    base = named(seeing("mistral3"), tmp_path / "base", r"layers\.(\d)\.mlp\.up_proj", r"layers.\1.mlp.upward")
    expansion = prepare(ExpandConfig(base=base, out=str(tmp_path / "out"), method="avg-deus"))
    says = r"base: its language model by itself, mistral: lacks 5 of the \d+ tensors of MistralForCausalLM"
    with pytest.raises(UserError, match=says):
        check_layers(expansion)


@pytest.mark.parametrize(
    "raw",
    [
        {"model_type": "llama"},
        {"model_type": "unheard-of", "text_config": {"model_type": "llama"}},
        {"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}},
        {"model_type": "gemma3", "text_config": None},
    ],
)
def test_others_are_taken_as_they_are(raw: dict[str, Any]) -> None:
    assert language_config(raw, "base") is None


def test_settings_that_transformers_refuses_are_one_line() -> None:
    raw = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": "many"}}
    with pytest.raises(UserError, match=r"^BASE x: config\.json: transformers refuses it \("):
        language_config(raw, "BASE x")


def test_without_a_class_for_it_several_stacks_are_refused(seeing: Callable[[str], str], tmp_path: Path) -> None:
    base = Path(shutil.copytree(seeing("mistral3"), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    with pytest.raises(UserError, match="has 2 stacks of layers"):
        prepare(ExpandConfig(base=str(base), out=str(tmp_path / "out"), method="llama-pro"))
