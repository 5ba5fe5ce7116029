"""Text as each tokenizer reads it, token blocks as they are, and data that cannot be measured on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lesa_ray.config import LesaSettings, load_settings, read_yaml
from lesa_ray.errors import UserError
from lesa_ray.evaluation.data import BlockData, TextData, block_rows, open_data, text_rows
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.training.packing import Encoder
from tests.evaluation.tiny import BEGIN, END, TEXTS, blocks, conversation_row, tokenizer


def opened(*sources: object, **settings: object) -> TextData | BlockData | None:
    config = {"checkpoints": ("x",), "data": tuple(map(str, sources)), **settings}
    return open_data(EvaluateConfig.model_validate(config))


@pytest.fixture
def text(tmp_path: Path) -> TextData:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    data = opened(tmp_path / "a.jsonl")
    assert isinstance(data, TextData)
    return data


def test_documents_are_encoded_whole_behind_one_begin(text: TextData) -> None:
    rows = list(text_rows(text, tokenizer(), None))
    assert [tokenizer().decode(row.ids[1:]) for row in rows] == TEXTS
    assert [row.ids[0] for row in rows] == [BEGIN] * len(TEXTS)
    assert [row.lead for row in rows] == [BEGIN] * len(TEXTS)
    assert [row.nbytes for row in rows] == [len(text.encode()) for text in TEXTS]
    assert rows[-1].done == text.total
    assert len(list(text_rows(text, tokenizer(), 2))) == 2


def test_windows_begin_as_texts_of_the_tokenizer_do(text: TextData) -> None:
    plain = tokenizer(begins=False)
    rows = list(text_rows(text, plain, None))
    assert [(row.ids[0], row.lead) for row in rows] == [(BEGIN, None)] * len(TEXTS)
    plain.bos_token = None
    assert [row.ids[0] for row in text_rows(text, plain, None)] == [END] * len(TEXTS)
    plain.eos_token = None
    assert [plain.decode(row.ids) for row in text_rows(text, plain, None)] == TEXTS


def test_special_tokens_written_in_a_text_are_text(tmp_path: Path) -> None:
    """As they are when text is tokenised for training."""
    (tmp_path / "a.txt").write_text("a</s>b<s>")
    data = opened(tmp_path)
    assert isinstance(data, TextData)
    (row,) = text_rows(data, tokenizer(), None)
    assert row.ids[1:].tolist() == Encoder.of(tokenizer(), "x")(["a</s>b<s>"])[0]
    assert not {BEGIN, END} & set(row.ids[1:].tolist())


def test_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.csv", "c.csv", "d.json"):
        (tmp_path / name).write_text("x")
    data = opened(tmp_path)
    assert isinstance(data, TextData)
    assert data.unread == {".csv": 2, ".json": 1}


def test_many_documents_come_in_order(tmp_path: Path) -> None:
    for index in range(150):
        (tmp_path / f"{index:03}.txt").write_text(f"{index}")
    data = opened(tmp_path)
    assert isinstance(data, TextData)
    assert [tokenizer().decode(row.ids[1:]) for row in text_rows(data, tokenizer(), None)] == list(map(str, range(150)))


def test_rows_of_text_blocks(tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(start, start + 12))} for start in range(130)]
    data = opened(blocks(str(tmp_path / "a [x]" / "blocks"), "text", 12, rows))
    assert isinstance(data, BlockData)
    assert (data.total, data.largest_id, data.kind) == (130, 261, "text")
    found = list(block_rows(data, None))
    assert [row.ids.tolist() for row in found] == [row["input_ids"] for row in rows]
    assert [row.done for row in found] == list(range(1, 131))
    assert all(row.labels is None and row.lead is None for row in found)
    assert len(list(block_rows(data, 70))) == 70


def test_conversations_are_taken_apart(tmp_path: Path) -> None:
    first, second, third = [5, 6, 7, 8, 9], [10, 11, 12], [20, 21, 22, 23]
    rows = [conversation_row([(first, 2), (second, 3)], 12), conversation_row([(third, 1), (first, 4)], 12)]
    data = opened(blocks(str(tmp_path / "blocks"), "chat", 12, rows))
    assert isinstance(data, BlockData)
    found = list(block_rows(data, None))
    assert [row.ids.tolist() for row in found] == [first, third, first]  # of `second` nothing is scored
    assert [row.done for row in found] == [1, 2, 2]
    labels = [np.asarray(row.labels).tolist() for row in found]
    assert labels == [[-100, -100, 7, 8, 9], [-100, 21, 22, 23], [-100, -100, -100, -100, 9]]


def test_only_tasks() -> None:
    assert open_data(EvaluateConfig(checkpoints=("x",), tasks=("y",))) is None


def test_data_that_cannot_be_measured_on(tmp_path: Path) -> None:
    good = blocks(str(tmp_path / "good"), "text", 4, [{"input_ids": [1, 2, 3, 4]}])
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "manifest.json").write_text("{")
    unfinished = Path(blocks(str(tmp_path / "unfinished"), "text", 4, [{"input_ids": [1, 2, 3, 4]}]))
    (unfinished / "manifest.json").unlink()
    damaged = Path(blocks(str(tmp_path / "damaged"), "text", 4, [{"input_ids": [1, 2, 3, 4]}]))
    (damaged / "heldout" / "part-00000.parquet").write_bytes(b"")
    for sources, settings, says in (
        ([good, tmp_path / "a.txt"], {}, "is a folder of token blocks; give it alone"),
        ([good], {"split": "train"}, "there is no row in the split train"),
        ([blocks(str(tmp_path / "empty"), "text", 4, [])], {}, "there is no row in the split heldout"),
        ([good], {"window": 5}, "window 5: the rows of .* have 4 tokens; give at most that"),
        ([damaged], {}, "part-00000.parquet is missing or of another size"),
        ([tmp_path / "manifest"], {}, "no data found"),
        ([tmp_path / "nowhere"], {}, "there is no such file or folder"),
    ):
        with pytest.raises(UserError, match=says):
            opened(*sources, **settings)
    data = opened(unfinished)
    assert isinstance(data, TextData)
    with pytest.raises(UserError, match="token blocks, which are given as their whole, finished folder"):
        list(text_rows(data, tokenizer(), None))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "nothing to measure: give data, tasks or both"),
        ({"tasks": "x", "stride": 3}, "stride: is for data"),
        ({"data": "x", "fewshot": 3}, "fewshot: is for tasks"),
        ({"data": "x", "window": 4, "stride": 5}, "stride 5: is longer than the window"),
        ({"data": "x", "window": 0}, "window"),
        ({"data": "x", "checkpoints": []}, "CHECKPOINTS: missing; give it on the command line"),
        ({"data": "x", "split": "test"}, "split"),
        ({"data": "x", "windows": 4}, "windows"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_settings(EvaluateConfig, None, **{"checkpoints": ["a"], **settings})


def test_the_shipped_configuration_can_be_read() -> None:
    config = load_settings(EvaluateConfig, str(Path(__file__).parents[2] / "pipelines" / "evaluate.yaml"))
    assert (len(config.checkpoints), config.tasks) == (2, ("arc_easy", "piqa"))
    assert EvaluateConfig.model_validate(config.model_dump(mode="json")) == config


def test_settings_from_a_file_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("checkpoints: [a, b]\ndata: text.txt\ntasks: x, y\nwindow: 8\n")
    config = load_settings(EvaluateConfig, str(path), checkpoints=[], window=None, stride=4, tasks=["z"])
    assert (config.checkpoints, config.data, config.tasks) == (("a", "b"), ("text.txt",), ("z",))
    assert (config.window, config.stride) == (8, 4)
    path.write_text("checkpoints: [a]\ndatas: x\n")
    with pytest.raises(UserError, match=r"config .*config.yaml: datas"):
        load_settings(EvaluateConfig, str(path))
    path.write_text("- a\n")
    with pytest.raises(UserError, match="expected a mapping of settings, found list"):
        load_settings(EvaluateConfig, str(path))
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_settings(EvaluateConfig, str(tmp_path / "nowhere.yaml"))


def test_a_yes_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("checkpoints: [a]\nwindow: yes\n")
    with pytest.raises(UserError, match=r"config .*e\.yaml: window: must be a number, found true"):
        load_settings(EvaluateConfig, str(path))
    path.write_text("checkpoints: [a]\nridge: no\n")
    with pytest.raises(UserError, match=r"ridge: must be a number, found false"):
        load_settings(LesaSettings, str(path))
    path.write_text("share_experts: yes\nrank: null\n")
    assert load_settings(LesaSettings, str(path)).share_experts


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("data: x\nwindow: 4\ndata: y\n", "line 3: data is given twice"),
        ("data: x\nplot: {a: 1, a: 2}\n", "line 2: a is given twice"),
        ("data: x\n\twindow: 4\n", "line 2: found character"),
    ],
)
def test_slips_in_a_file_of_settings_are_named_with_their_line(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"^config {re.escape(str(path))}: {says}"):
        load_settings(EvaluateConfig, str(path))
    path.write_text("a: &a {window: 4}\nb: {<<: *a, window: 5}\n")
    assert read_yaml(str(path))["b"] == {"window": 5}
