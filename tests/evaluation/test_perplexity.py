"""Perplexity against a loop written by hand, and the plan of windows against its definition."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lesa_ray.errors import UserError
from lesa_ray.evaluation.perplexity import perplexity, plan_windows

VOCABULARY = 50
IDS = np.random.default_rng(0).integers(0, VOCABULARY, 60)  # (60,)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose predictions are far from uniform, so that a wrong context shows."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=24,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def by_hand(checkpoint: Path, window: int, stride: int) -> float:
    """One forward pass in float64 per token, with the context that token is due; the mean of -log p."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).double().eval()
    total = 0.0
    for position in range(1, len(IDS)):
        start = 0
        while position > start + window:  # the first window that reaches the position …
            start += stride
        start = max(0, min(start, len(IDS) - 1 - window))  # … unless it would hang over the end
        with torch.no_grad():
            logits = model(torch.from_numpy(IDS[None, start:position])).logits[0, -1]
        total -= torch.log_softmax(logits, -1)[IDS[position]].item()
    return total / (len(IDS) - 1)


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (24, 12), (59, 59), (200, 200)])
def test_it_agrees_with_a_loop_by_hand(checkpoint: Path, window: int, stride: int) -> None:
    result = perplexity(str(checkpoint), IDS, window=window, stride=stride, batch_size=4)
    assert result.tokens == len(IDS) - 1
    assert result.loss == pytest.approx(by_hand(checkpoint, window, stride), rel=1e-6)
    assert result.perplexity == math.exp(result.loss)


def test_context_counts_and_batches_do_not(checkpoint: Path) -> None:
    narrow = perplexity(str(checkpoint), IDS, window=8)
    wide = perplexity(str(checkpoint), IDS, window=24)
    assert abs(narrow.loss - wide.loss) > 1e-3
    one_by_one = perplexity(str(checkpoint), IDS, window=8, batch_size=1)
    assert one_by_one.loss == pytest.approx(narrow.loss, rel=1e-6)


@pytest.mark.parametrize("tokens", [2, 3, 9, 10, 11, 57, 64])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 1), (4, 3), (4, 4), (9, 3), (9, 4), (9, 9), (100, 9)])
def test_every_token_but_the_first_is_scored_once(tokens: int, window: int, stride: int) -> None:
    length = min(window, tokens - 1)
    scored: list[int] = []
    for one in plan_windows(tokens, window, stride):
        assert 0 <= one.start < one.first <= one.start + length < tokens
        scored += range(one.first, one.start + length + 1)
    assert scored == list(range(1, tokens))


def test_progress_ends_at_the_number_of_windows(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(str(checkpoint), IDS, window=8, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 8), (6, 8), (8, 8)]


def test_the_default_window_is_the_model_s_own_in_any_family(checkpoint: Path, tmp_path: Path) -> None:
    assert perplexity(str(checkpoint), IDS).window == 24
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=20, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    result = perplexity(str(tmp_path), IDS)
    assert (result.window, result.stride, result.tokens) == (20, 20, 59)
    assert result.loss == pytest.approx(math.log(VOCABULARY), abs=0.1)  # fresh weights: near uniform


def test_wrong_input_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        perplexity(str(tmp_path / "nothing"), IDS)
    with pytest.raises(UserError, match="its vocabulary has 50"):
        perplexity(str(checkpoint), np.array([1, 50]))
    with pytest.raises(UserError, match="1 token ids"):
        perplexity(str(checkpoint), IDS[:1])
    with pytest.raises(UserError, match="stride 9"):
        perplexity(str(checkpoint), IDS, window=8, stride=9)


def test_a_checkpoint_with_a_missing_tensor_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(UserError, match=r"1 tensors are missing, the first model\.layers\.1\.mlp\.up_proj"):
        perplexity(str(tmp_path), IDS)
