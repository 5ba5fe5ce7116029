"""One checkpoint measured from start to end against losses worked out one token at a time in float64; and what cannot
be measured."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lesa_ray.errors import UserError
from lesa_ray.evaluation.checkpoints import read_bounds
from lesa_ray.evaluation.data import open_data
from lesa_ray.evaluation.measure import Outcome, make_job, measure
from lesa_ray.evaluation.settings import EvaluateConfig
from tests.evaluation import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.TEXTS))
    return str(path)


def run(checkpoint: str, data: str, **settings: Any) -> Outcome:
    config = EvaluateConfig.model_validate({"checkpoints": (checkpoint,), "data": data, **settings})
    bounds = [read_bounds(checkpoint)]
    return measure(make_job(config, open_data(config), bounds), bounds[0])


@pytest.mark.parametrize(("window", "stride"), [(None, None), (16, 16), (16, 5)])
def test_text(checkpoint: str, text: str, window: int | None, stride: int | None) -> None:
    record = run(checkpoint, text, window=window, stride=stride).record
    losses: list[float] = []
    for one in tiny.TEXTS:
        ids = [tiny.BEGIN, *tiny.tokenizer()(one, add_special_tokens=False)["input_ids"]]
        found = tiny.token_losses(checkpoint, ids, window or 48, stride or window or 48, lead=tiny.BEGIN)
        losses += found.values()
    nbytes = sum(len(text.encode()) for text in tiny.TEXTS)
    assert (record["window"], record["stride"]) == (window or 48, stride or window or 48)
    assert (record["tokens"], record["documents"], record["text_bytes"]) == (nbytes, 4, nbytes)  # tokens are bytes
    assert record["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]), rel=1e-12)
    assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2), rel=1e-12)
    assert record["dtype"] == "float32"
    assert record["parameters"] == sum(t.numel() for t in load_file(f"{checkpoint}/model.safetensors").values())


def test_text_of_which_tokens_are_not_bytes(text: str, tmp_path: Path) -> None:
    merged = tiny.checkpoint(tmp_path, merges=True)
    record = run(merged, text).record
    assert record["tokens"] < record["text_bytes"]
    assert record["bits_per_byte"] == pytest.approx(
        record["loss"] * record["tokens"] / record["text_bytes"] / math.log(2), rel=1e-12
    )


def test_blocks_of_text(tmp_path: Path, checkpoint: str) -> None:
    rows = [[(7 * place * place + row) % 256 for place in range(20)] for row in range(3)]
    data = tiny.blocks(str(tmp_path / "blocks"), "text", 20, [{"input_ids": row} for row in rows])
    for window, stride in ((20, 20), (8, 4)):
        record = run(checkpoint, data, window=window, stride=stride).record
        losses = [loss for row in rows for loss in tiny.token_losses(checkpoint, row, window, stride).values()]
        assert (record["tokens"], record["bits_per_byte"]) == (57, None)
        assert record["loss"] == pytest.approx(sum(losses) / 57, rel=1e-6)
    assert run(checkpoint, data).record["window"] == 20
    assert run(checkpoint, data, limit=1).record["tokens"] == 19


def test_blocks_of_conversations_count_answers_in_their_own_context(tmp_path: Path, checkpoint: str) -> None:
    first, second = [(i * 37) % 256 for i in range(9)], [(i * 91) % 256 for i in range(6)]
    row = tiny.conversation_row([(first, 4), (second, 2)], 20)
    record = run(checkpoint, tiny.blocks(str(tmp_path / "blocks"), "chat", 20, [row])).record
    losses = [loss for place, loss in tiny.token_losses(checkpoint, first, 20, 20).items() if place >= 4]
    losses += [loss for place, loss in tiny.token_losses(checkpoint, second, 20, 20).items() if place >= 2]
    assert record["tokens"] == 5 + 4
    assert record["loss"] == pytest.approx(sum(losses) / 9, rel=1e-6)


def test_blocks_need_no_tokenizer_and_text_does(tmp_path: Path, text: str) -> None:
    bare = tiny.checkpoint(tmp_path / "bare", with_tokenizer=False)
    data = tiny.blocks(str(tmp_path / "blocks"), "text", 5, [{"input_ids": [1, 2, 3, 4, 5]}])
    assert run(bare, data).record["tokens"] == 4
    with pytest.raises(UserError, match=r"^checkpoint .*bare: has no tokenizer, which text and tasks need"):
        run(bare, text)
    (tmp_path / "bare" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        run(bare, text)


def test_tokens_outside_the_vocabulary(tmp_path: Path, text: str) -> None:
    small = tiny.checkpoint(tmp_path / "small", vocab_size=100)
    data = tiny.blocks(str(tmp_path / "blocks"), "text", 5, [{"input_ids": [1, 2, 3, 4, 5]}])
    with pytest.raises(UserError, match=r"small: its vocabulary has 100 tokens, the token blocks .* go up to id 261"):
        run(small, data)
    with pytest.raises(UserError, match=r"small: token ids go from .* to 256, its vocabulary has 100"):
        run(small, text)


def test_a_model_whose_forward_pass_fails_is_named(tmp_path: Path, text: str) -> None:
    """So that others beside it are measured all the same."""
    odd = tiny.checkpoint(tmp_path / "odd", num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(UserError, match=r"checkpoint .*odd: cannot be measured \("):
        run(odd, text)


def test_windows_that_do_not_fit(tmp_path: Path, checkpoint: str, text: str) -> None:
    with pytest.raises(UserError, match=r"window 49: checkpoint .* was made for 48 positions; give at most that"):
        run(checkpoint, text, window=49)
    with pytest.raises(UserError, match=r"stride 49: is longer than the window \(48\)"):
        run(checkpoint, text, stride=49)
    row = {"input_ids": [1] * 60}
    assert run(checkpoint, tiny.blocks(str(tmp_path / "blocks"), "text", 60, [row])).record["window"] == 48


def test_data_without_text_or_tokens(tmp_path: Path, checkpoint: str) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="there is nothing to score in it"):
        run(checkpoint, str(tmp_path))
    row = tiny.conversation_row([([1, 2, 3], 3)], 5)
    with pytest.raises(UserError, match="there is nothing to score in it"):
        run(checkpoint, tiny.blocks(str(tmp_path / "blocks"), "chat", 5, [row]))


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def unknown_family(folder: Path) -> None:
    edit_config(folder, model_type="lama")


def other_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=40)


def impossible(folder: Path) -> None:
    edit_config(folder, num_attention_heads=3)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def lacking(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (missing, "no such folder; give a folder, a Hugging Face repo id or a URL"),
        (no_config, "not a checkpoint, there is no config.json in it"),
        (truncated, "model.safetensors: is truncated or damaged"),
        (unknown_family, "transformers does not know the family 'lama'"),
        (other_shape, "cannot be loaded"),
        (impossible, "transformers refuses it|cannot be loaded"),
        (lacking, r"1 tensors are missing, the first model\.layers\.1\.mlp\.up_proj"),
        (nan, "its loss is not a number"),
    ],
)
def test_checkpoints_that_cannot_be_measured(
    damage: Any, says: str, checkpoint: str, text: str, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    damage(broken)
    with pytest.raises(UserError, match=f"^checkpoint {broken}: .*({says})") as error:
        run(str(broken), text)
    assert "\n" not in str(error.value)


def test_a_repo_that_cannot_be_fetched() -> None:
    with pytest.raises(UserError, match="checkpoint some-org/some-model: cannot be fetched from the hub"):
        read_bounds("some-org/some-model")
