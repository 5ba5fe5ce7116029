"""Perplexity against a loop written by hand, and the plan of windows against its definition."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from lesa_ray.errors import UserError
from lesa_ray.evaluation.checkpoints import load_model
from lesa_ray.evaluation.perplexity import Perplexity, Row, perplexity, plan_windows, score
from tests.evaluation import tiny
from tests.evaluation.tiny import token_losses

VOCABULARY = 50
IDS = np.random.default_rng(0).integers(0, VOCABULARY, 60)  # (60,)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.checkpoint(folder, with_tokenizer=False, vocab_size=VOCABULARY, max_position_embeddings=24)
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


def rows_of(lengths: list[int]) -> list[Row]:
    random = np.random.default_rng(1)
    return [Row(random.integers(0, VOCABULARY, length), nbytes=length) for length in lengths]


def load(folder: Path) -> PreTrainedModel:
    return load_model(str(folder), None)


@pytest.mark.parametrize("batch_size", [1, 3, 64, None])
def test_rows_of_any_length_are_scored_each_on_its_own(checkpoint: Path, batch_size: int | None) -> None:
    rows = rows_of([30, 2, 1, 9, 50, 0, 10])
    scores = score(load(checkpoint), rows, 9, 4, batch_size)
    assert scores.count == sum(max(0, len(row.ids) - 1) for row in rows)
    assert scores.nbytes.tolist() == [30, 2, 1, 9, 50, 0, 10]
    for index, row in enumerate(rows):
        losses = token_losses(str(checkpoint), row.ids.tolist(), 9, 4)
        mine = scores.rows == index
        assert scores.tokens[mine].sum() == len(losses)
        assert scores.nats[mine].sum() == pytest.approx(sum(losses.values()), rel=1e-6)


def test_labels_say_what_is_scored_and_lead_how_windows_begin(checkpoint: Path) -> None:
    model, [row] = load(checkpoint), rows_of([40])
    labels = np.where(np.arange(40) % 3 == 1, row.ids, -100)
    scores = score(model, [replace(row, labels=labels, lead=7)], 8, 8)
    losses = token_losses(str(checkpoint), row.ids.tolist(), 8, 8, lead=7)
    wanted = [loss for place, loss in losses.items() if place % 3 == 1]
    assert scores.count == len(wanted)
    assert scores.loss == pytest.approx(sum(wanted) / len(wanted), rel=1e-6)
    assert scores.loss != pytest.approx(score(model, [replace(row, labels=labels)], 8, 8).loss, rel=1e-3)
    half = score(model, [replace(row, labels=np.where(np.arange(40) < 20, -100, row.ids))], 8, 8)
    assert half.tokens.tolist() == [5, 8, 7]  # a window of which nothing is scored is none
    assert score(model, [replace(row, labels=np.full(40, -100))], 8, 8).count == 0


def test_equal_digests_mean_equal_windows(checkpoint: Path) -> None:
    model, rows = load(checkpoint), rows_of([30, 12])
    digest = score(model, rows, 8, 8).digest
    assert score(model, rows, 8, 8, 1).digest == digest
    other = [
        score(model, rows, 8, 4).digest,
        score(model, rows[:1], 8, 8).digest,
        score(model, rows[::-1], 8, 8).digest,
    ]
    other.append(score(model, [replace(rows[0], lead=3), rows[1]], 8, 8).digest)
    other.append(score(model, [Row(np.concatenate([row.ids for row in rows]))], 8, 8).digest)
    for scored in (3, 4):  # of the same ids
        labels = np.where(np.arange(30) < scored, -100, rows[0].ids)
        other.append(score(model, [replace(rows[0], labels=labels), rows[1]], 8, 8).digest)
    assert len({digest, *other}) == 8


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "gpt_neox"])
def test_other_families(family: str, bases: Callable[[str], str]) -> None:
    rows = [Row(np.arange(20) * 7 % 128), Row(np.arange(11) * 5 % 128)]
    scores = score(load_model(bases(family), None), rows, 6, 3, 4)
    for index, row in enumerate(rows):
        losses = token_losses(bases(family), row.ids.tolist(), 6, 3)
        assert scores.nats[scores.rows == index].sum() == pytest.approx(sum(losses.values()), rel=1e-5)


def test_bfloat16_is_computed_in_bfloat16_and_summed_in_float64(checkpoint: Path) -> None:
    exact = perplexity(str(checkpoint), IDS, window=8)
    rough = perplexity(str(checkpoint), IDS, window=8, dtype="bfloat16")
    assert 1e-5 < abs(rough.loss - exact.loss) < 0.05
    model = load_model(str(checkpoint), "bfloat16")
    with torch.no_grad():
        logits = model(torch.from_numpy(IDS[None, :8])).logits[0].double()  # (8, V)
    losses = -torch.log_softmax(logits, -1)[range(8), IDS[1:9]]
    assert score(model, [Row(IDS[:9])], 8, 8).loss == pytest.approx(losses.mean().item(), rel=1e-6)


def test_an_encoder_has_no_perplexity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.4
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its predictions depend on the tokens they are to predict"):
        perplexity(str(tmp_path), IDS)


def test_nan_is_named(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its loss is not a number"):
        perplexity(str(tmp_path), IDS)


def test_a_loss_beyond_floats_is_infinite_perplexity() -> None:
    assert Perplexity(loss=800.0, tokens=1, window=1, stride=1).perplexity == math.inf
