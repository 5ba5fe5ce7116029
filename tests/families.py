"""A zoo of tiny random checkpoints, one per family, made with transformers and saved as real folders.

What it decides: nothing is left at its initial value. transformers starts norms at 1, biases at 0 and
matrices so small that layers hardly act; a tool that lost or mixed up such tensors would go unnoticed. So
every parameter is drawn anew (norms around 1, biases around 0, matrices of standard deviation 1/√fan-in) and
each layer changes the logits. A draw depends on the parameter's name and the seed alone: the float32 and
bfloat16 versions are the same numbers, and a deeper model begins with the layers of the shallower one.

The files are laid out as hub checkpoints of the family are; what differs is said beside the family.
Cost: about 0.05 s and 0.6-1.8 MB each.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

VOCAB = 128
HIDDEN = 64
POSITIONS = 64
LAYERS = 5


@dataclass(frozen=True)
class Family:
    """One family: how to configure it, and what a test may expect of its files.

    `writes` and `norms` are fnmatch patterns on what follows `{layer_prefix}{i}.` in the names within the
    files.
    """

    model_type: str
    config: Mapping[str, object]
    writes: tuple[str, ...]
    """Tensors through which a layer writes into the residual stream; all zero = the layer writes nothing."""
    norms: tuple[str, ...]
    depth_key: str = "num_hidden_layers"
    layer_prefix: str = "model.layers."
    auto: Any = AutoModelForCausalLM
    keeps_function: bool = True
    """A layer whose `writes` are zero is the identity. False with a norm on the residual path (post-LN)."""
    shard_size: str = "5GB"
    renames: Mapping[str, str] = field(default_factory=dict)
    """Regular expressions applied to the saved names, where transformers no longer writes the hub's."""
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """Constants that the hub's files hold in every layer; transformers neither writes nor needs them now."""


_MHA: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_GQA = {**_MHA, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def _both(*modules: str) -> tuple[str, ...]:
    """Weight and bias of each module."""
    return tuple(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))


def _llama_like(
    model_type: str,
    *,
    mlp_out: str = "mlp.down_proj.weight",
    more_norms: tuple[str, ...] = (),
    shard_size: str = "5GB",
    **config: object,
) -> Family:
    """A family whose layers are model.layers.{i}.self_attn.*, .mlp.* and two norms, without biases."""
    return Family(
        model_type,
        {**_GQA, "tie_word_embeddings": False, **config},
        writes=("self_attn.o_proj.weight", mlp_out),
        norms=(*_NORMS, *more_norms),
        shard_size=shard_size,
    )


_GPT_NEOX = Family(
    "gpt_neox",
    _MHA,
    writes=_both("attention.dense", "mlp.dense_4h_to_h"),
    norms=_both("input_layernorm", "post_attention_layernorm"),
    layer_prefix="gpt_neox.layers.",
)
_GPT2 = Family(
    "gpt2",
    {
        "vocab_size": VOCAB,
        "n_embd": HIDDEN,
        "n_head": 4,
        "n_positions": POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    writes=_both("attn.c_proj", "mlp.c_proj"),
    norms=_both("ln_1", "ln_2"),
    depth_key="n_layer",
    layer_prefix="transformer.h.",
)

FAMILIES: dict[str, Family] = {
    # input_layernorm, self_attn.{q,k,v,o}_proj, post_attention_layernorm, mlp.{gate,up,down}_proj below
    # model.layers.{i}; model.embed_tokens, model.norm, lm_head. Several files and
    # model.safetensors.index.json.
    "llama": _llama_like("llama", shard_size="100KB"),
    # Llama's names without lm_head.weight, in one file without an index (as Llama-3.2-1B).
    "llama_tied": _llama_like("llama", tie_word_embeddings=True),
    # Llama's names, and self_attn.{q,k,v}_proj.bias; o_proj has none.
    "qwen2": _llama_like("qwen2"),
    # Llama's names, and self_attn.{q,k}_norm.weight (head_dim,). heads · head_dim is not the hidden size.
    "qwen3": _llama_like("qwen3", head_dim=24, more_norms=_HEAD_NORMS),
    # Llama's names.
    "mistral": _llama_like("mistral", sliding_window=None),
    # Llama's names, and {pre,post}_feedforward_layernorm: four norms, of which the two "post" ones act on
    # what a block writes; norms multiply by 1 + weight; tied. Even layers slide, odd ones see everything; the
    # window is far below the 16 of `tokens`, so that a layer of the wrong type shows.
    "gemma2": _llama_like(
        "gemma2",
        tie_word_embeddings=True,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4,
        more_norms=("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"),
    ),
    # Llama's norms; self_attn.{qkv_proj,o_proj}, mlp.{gate_up_proj,down_proj}.
    "phi3": _llama_like("phi3"),
    # gpt_neox.layers.{i}: attention.{query_key_value,dense}, mlp.{dense_h_to_4h,dense_4h_to_h}, two
    # LayerNorms, all with biases; gpt_neox.{embed_in,final_layer_norm}, embed_out. Attention and MLP stand
    # side by side.
    "gpt_neox": _GPT_NEOX,
    # EleutherAI/pythia-*: also a mask, a number without dimensions and rotary frequencies in every layer.
    "pythia": replace(
        _GPT_NEOX,
        buffers={
            "attention.bias": torch.ones(1, 1, POSITIONS, POSITIONS, dtype=torch.bool).tril(),
            "attention.masked_bias": torch.tensor(-1e9),
            "attention.rotary_emb.inv_freq": 10000.0 ** -torch.arange(0, 1, 0.5),
        },
    ),
    # transformer.h.{i}: ln_1, attn.{c_attn,c_proj}, ln_2, mlp.{c_fc,c_proj}, the matrices stored (in, out) as
    # Conv1D; transformer.{wte,wpe,ln_f}; tied, without lm_head. As distilgpt2 and GPT-2's fine-tunes.
    "gpt2": _GPT2,
    # openai-community/gpt2: no `transformer.` before the names, and the causal mask in every layer.
    "gpt2_bare": replace(
        _GPT2,
        layer_prefix="h.",
        renames={r"^transformer\.": ""},
        buffers={"attn.bias": torch.ones(1, 1, POSITIONS, POSITIONS).tril()},
    ),
    # encoder.layer.{i}: attention.self.{query,key,value}, attention.output.{dense,LayerNorm},
    # intermediate.dense, output.{dense,LayerNorm}; embeddings.*, pooler.dense. On the hub often below `bert.`
    # beside heads `cls.*`, and in the oldest files with LayerNorm.{gamma,beta}. Post-LN: a layer normalises
    # the residual stream itself.
    "bert": Family(
        "bert",
        {**_MHA, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        writes=_both("attention.output.dense", "output.dense"),
        norms=_both("attention.output.LayerNorm", "output.LayerNorm"),
        layer_prefix="encoder.layer.",
        auto=AutoModel,
        keeps_function=False,
    ),
    # Llama's attention; block_sparse_moe.gate, block_sparse_moe.experts.{e}.{w1,w2,w3}, w2 projecting down.
    # In memory transformers 5 holds mlp.experts.{gate_up_proj,down_proj} and splits them again on saving.
    "mixtral": _llama_like(
        "mixtral",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        mlp_out="block_sparse_moe.experts.*.w2.weight",
    ),
    # Qwen3's attention; mlp.gate, mlp.experts.{e}.{gate,up,down}_proj. Fused in memory, as Mixtral's.
    "qwen3_moe": _llama_like(
        "qwen3_moe",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        mlp_out="mlp.experts.*.down_proj.weight",
        more_norms=_HEAD_NORMS,
    ),
}

_MLA: dict[str, object] = {
    **_MHA,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
UNLIKE: dict[str, Family] = {
    # Two dense layers below those of experts: mlp.{gate,up,down}_proj there, else mlp.gate (with
    # e_score_correction_bias), mlp.experts.{e}.*, mlp.shared_experts.*; attention through low ranks.
    "deepseek_v3": Family(
        "deepseek_v3",
        {**_MLA, "first_k_dense_replace": 2, "tie_word_embeddings": False},
        writes=("self_attn.o_proj.weight", "mlp.*down_proj.weight"),
        norms=(*_NORMS, "self_attn.q_a_layernorm.weight", "self_attn.kv_a_layernorm.weight"),
    ),
    # Three layers with a recurrence (linear_attn.*, a 3-D convolution) below each with attention (self_attn.*).
    "qwen3_next": Family(
        "qwen3_next",
        {
            **_GQA,
            "head_dim": 16,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        writes=("self_attn.o_proj.weight", "linear_attn.out_proj.weight", "mlp.*down_proj.weight"),
        norms=(*_NORMS, *_HEAD_NORMS, "linear_attn.norm.weight"),
    ),
    # One mixer a layer: a recurrence, attention, or an MLP. Told in layers_block_type, without num_hidden_layers.
    "nemotron_h": Family(
        "nemotron_h",
        {
            **_GQA,
            "head_dim": 16,
            "layers_block_type": ["mamba", "mlp", "attention", "mlp"] * 2,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
        writes=("mixer.out_proj.weight", "mixer.o_proj.weight", "mixer.down_proj.weight"),
        norms=("norm.weight", "mixer.norm.weight"),
        depth_key="layers",
        layer_prefix="backbone.layers.",
    ),
    # Experts in every second layer, attention in one of four, by rules of the layer's index.
    "jamba": Family(
        "jamba",
        {
            **_GQA,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        writes=("self_attn.o_proj.weight", "mamba.out_proj.weight", "feed_forward.*down_proj.weight"),
        norms=("input_layernorm.weight", "pre_ff_layernorm.weight"),
    ),
}
"""Families whose layers are of several kinds."""
TOGETHER: dict[str, Family] = {
    # mlp.experts.{gate_up_proj,down_proj} (experts, in, out), each with a bias {..}_bias (experts, out); mlp.router
    # with a bias; self_attn.sinks, one for each head. Even layers slide.
    "gpt_oss": _llama_like(
        "gpt_oss",
        head_dim=16,
        sliding_window=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        mlp_out="mlp.experts.down_proj*",
    ),
    # block_sparse_moe.{input_linear,output_linear}.weight (experts, out, in); block_sparse_moe.router.layer.weight.
    "granitemoe": _llama_like(
        "granitemoe", num_local_experts=4, num_experts_per_tok=2, mlp_out="block_sparse_moe.output_linear.weight"
    ),
}
"""Families whose files hold all experts of a layer in one tensor."""
EVERY = FAMILIES | UNLIKE | TOGETHER


def make(
    name: str,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    layers: int = LAYERS,
    seed: int = 0,
    **config: object,
) -> str:
    """Write the family's checkpoint (config.json and safetensors) into `folder`; `config` overrides its
    keys."""
    family = EVERY[name]
    keys = {**family.config, family.depth_key: layers, **config}
    model = family.auto.from_config(AutoConfig.for_model(family.model_type, **keys))
    _randomise(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=family.shard_size)
    if family.renames or family.buffers:
        _as_on_the_hub(Path(folder) / "model.safetensors", family, layers)
    return str(folder)


def load_strict(folder: str | Path, family: Family | str, **options: object) -> PreTrainedModel:
    """Load a checkpoint, asserting that its names and shapes are exactly the model's; in eval mode."""
    family = EVERY[family] if isinstance(family, str) else family
    model, found = family.auto.from_pretrained(str(folder), output_loading_info=True, **options)
    wrong = {key: value for key, value in found.items() if value}
    assert not wrong, f"{folder}: {wrong}"
    ready: PreTrainedModel = model.eval()
    return ready


def tokens(batch: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    """Random token ids: (batch, length)."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the model computes, in float32: logits (B, T, vocab); without a head, hidden states (B, T, d)."""
    out: Any = model(input_ids=ids)
    result: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return result.float()


def tensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by their names in the files."""
    found: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(path))
    return found


def layer_tensors(folder: str | Path, name: str, layer: int) -> dict[str, Tensor]:
    """The tensors of one layer, by what follows the layer's index in their names."""
    prefix = f"{EVERY[name].layer_prefix}{layer}."
    return {key.removeprefix(prefix): value for key, value in tensors(folder).items() if key.startswith(prefix)}


def matches(suffix: str, patterns: tuple[str, ...]) -> bool:
    """Whether what follows a layer's index is named by one of a family's `writes` or `norms`."""
    return any(fnmatch.fnmatchcase(suffix, pattern) for pattern in patterns)


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew, so that activations and logits are of order one."""
    # Gemma's norms multiply by 1 + weight and are centred on 0; GPT-2's matrices are stored (in, out).
    kind = model.config.model_type
    centre, fan_in_axis = (0.0 if kind.startswith("gemma") else 1.0), (0 if kind == "gpt2" else -1)
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_((centre if name.endswith("weight") else 0.0) + 0.3 * noise)
        elif re.search(r"embed|wte|wpe", name) and not name.startswith("embed_out"):
            parameter.copy_(0.25 * noise)  # where tied, logits of standard deviation 0.25·√64 = 2
        else:
            parameter.copy_(noise / parameter.shape[fan_in_axis] ** 0.5)


def _as_on_the_hub(path: Path, family: Family, layers: int) -> None:
    """Rewrite a saved file with the names and constants of the family's hub checkpoints."""
    found = {}
    for name, tensor in load_file(path).items():
        for pattern, target in family.renames.items():
            name = re.sub(pattern, target, name)
        found[name] = tensor
    for layer in range(layers):
        for suffix, constant in family.buffers.items():
            found[f"{family.layer_prefix}{layer}.{suffix}"] = constant.clone()
    save_file(found, path, metadata={"format": "pt"})
