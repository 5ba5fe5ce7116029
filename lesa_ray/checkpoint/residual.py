"""Through which tensors does a layer write into the residual stream?

A new layer whose every such tensor is zero adds nothing: the deeper model computes what the base computes (LLaMA Pro,
arXiv 2401.02415, section 3.2). They are the output projections of attention and feed-forward, each expert's included,
and their biases; what they are called differs from family to family. The names below were read off transformers'
model files. A missed one would silently change the function, so whoever relies on them also rehearses the expansion
on a miniature of the same architecture and compares logits (`lesa_ray.expansion.rehearsal`)."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WRITERS = (
    "o_proj",  # llama, mistral, qwen, gemma, phi3 …: attention
    "out_proj",  # opt, gpt-neo, gptj, mpt, mamba: attention or mixer
    r"(?<!intermediate\.)dense",  # gpt_neox, falcon, bloom, phi: attention; bert's outputs, not its first feed-forward
    "c_proj",  # gpt2, gpt_bigcode, starcoder2: attention and feed-forward
    "[wW]o",  # internlm2: attention; modernbert-decoder: attention and feed-forward
    "down_proj",  # llama …: feed-forward, each expert, shared experts
    "dense_4h_to_h",  # gpt_neox, falcon, bloom
    "fc2",  # opt, phi, starcoder
    "fc_out",  # gptj
    "w2",  # mixtral's experts, internlm2, dbrx
    "output_linear",  # granitemoe: its experts, and those shared
)
_WRITER = re.compile(rf"(?:^|\.)(?:{'|'.join(_WRITERS)})(?:[._](?:weight|bias))?(?:\[\d+\])?$")


def residual_writers(types: Iterable[str]) -> tuple[str, ...]:
    """The weight types (biases included) through which a layer writes into the residual stream; empty if none is
    known."""
    return tuple(name for name in types if _WRITER.search(name))
