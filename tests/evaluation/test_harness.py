"""Tasks of lm-evaluation-harness from local files, against probabilities worked out one token at a time in float64."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lesa_ray.errors import UserError
from lesa_ray.evaluation import harness
from lesa_ray.evaluation import measure as measure_module
from lesa_ray.evaluation.checkpoints import read_bounds
from lesa_ray.evaluation.data import open_data
from lesa_ray.evaluation.measure import make_job, measure
from lesa_ray.evaluation.settings import EvaluateConfig
from tests.evaluation import tiny

installed = pytest.mark.skipif(
    not (importlib.util.find_spec("lm_eval") and importlib.util.find_spec("accelerate")),
    reason="lm-evaluation-harness is an extra: pip install 'lesa-ray[eval]'",
)

QUESTIONS = [
    {"question": "2 + 2", "choices": ["4", "five", "22"], "gold": 0},
    {"question": "the sky", "choices": ["green as grass", "blue"], "gold": 1},
    {"question": "ice", "choices": ["hot", "cold", "is a kind of gas"], "gold": 1},
    {"question": "one of", "choices": ["a", "b", "c", "d"], "gold": 3},
    {"question": "night", "choices": ["dark", "a light"], "gold": 0},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {test: questions.jsonl}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs:
  data_files: {test: texts.jsonl}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
"""
GROUP = """
group: tiny_group
task: [tiny_choice]
aggregate_metric_list:
  - {metric: acc}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.TEXTS))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("group", GROUP)):
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose tokenizer begins no text by itself."""
    made = tiny.checkpoint(tmp_path_factory.mktemp("llama"), with_tokenizer=False)
    tiny.tokenizer(begins=False).save_pretrained(made)
    return made


def run(checkpoint: str, *tasks: object, **settings: Any) -> dict[str, Any]:
    config = EvaluateConfig.model_validate({"checkpoints": (checkpoint,), "tasks": tuple(map(str, tasks)), **settings})
    config = config.model_copy(update={"tasks": harness.resolve_tasks(config.tasks)})
    bound = read_bounds(checkpoint)
    return measure(make_job(config, open_data(config), [bound]), bound).record


def choice_scores(checkpoint: str, question: str, choices: list[str]) -> list[tuple[float, float]]:
    """Log-probability of each choice, and that over its length in bytes."""
    found = []
    for choice in choices:
        context, whole = f"Q: {question}\nA:".encode(), f"Q: {question}\nA: {choice}".encode()
        ids = tiny.tokenizer(begins=False)(whole.decode())["input_ids"]
        losses = tiny.token_losses(checkpoint, ids, 48, 48)
        total = -sum(losses[place] for place in range(len(context), len(whole)))
        found.append((total, total / len(choice)))
    return found


@installed
@pytest.mark.timeout(360)
def test_multiple_choice_agrees_with_a_loop_by_hand(checkpoint: str, folder: Path) -> None:
    found = run(checkpoint, folder / "choice.yaml")["tasks"]["tiny_choice"]
    right, right_norm = [], []
    for one in QUESTIONS:
        scores = choice_scores(checkpoint, str(one["question"]), list(one["choices"]))  # type: ignore[call-overload]
        for kind, hits in enumerate((right, right_norm)):
            hits.append(max(range(len(scores)), key=lambda i: scores[i][kind]) == one["gold"])
    assert found["examples"] == len(QUESTIONS)
    assert found["metrics"]["acc"]["value"] == pytest.approx(sum(right) / len(right))
    assert found["metrics"]["acc_norm"]["value"] == pytest.approx(sum(right_norm) / len(right))
    assert 0 < sum(right) < len(right)  # else a wrong order of the choices would not show
    share = sum(right) / len(right)
    assert found["metrics"]["acc"]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (len(right) - 1)))
    assert found["metrics"]["acc"]["higher_is_better"] is True
    assert found["fewshot"] == 0


@installed
@pytest.mark.timeout(360)
def test_a_model_in_parts_answers_the_same(checkpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind accelerate's hooks, as over several GPUs; here over the CPU and the disk."""
    whole = run(checkpoint, folder / "rolling.yaml")
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers": "cpu", "model.norm": "disk"}
    monkeypatch.setattr(measure_module, "place", lambda *args: parts | {"lm_head": "disk"})
    assert run(checkpoint, folder / "rolling.yaml")["tasks"] == whole["tasks"]


@installed
@pytest.mark.timeout(360)
def test_perplexity_of_the_harness_is_ours(checkpoint: str, folder: Path) -> None:
    record = run(checkpoint, folder / "rolling.yaml", data=str(folder / "texts.jsonl"))
    found = {name: one["value"] for name, one in record["tasks"]["tiny_rolling"]["metrics"].items()}
    encode = tiny.tokenizer(begins=False)
    total = sum(
        sum(tiny.token_losses(checkpoint, [tiny.BEGIN, *encode(text)["input_ids"]], 48, 48).values())
        for text in tiny.TEXTS
    )
    nbytes = sum(len(text.encode()) for text in tiny.TEXTS)
    words = sum(len(re.split(r"\s+", text)) for text in tiny.TEXTS)
    assert found["bits_per_byte"] == pytest.approx(total / nbytes / math.log(2), rel=1e-6)
    assert found["byte_perplexity"] == pytest.approx(math.exp(total / nbytes), rel=1e-6)
    assert found["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-5)
    assert record["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-6)
    assert record["tasks"]["tiny_rolling"]["window"] == record["window"] == 48


@installed
@pytest.mark.timeout(360)
def test_groups_limits_shots_and_windows(checkpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group from a file finds its tasks beside it; the harness's own 14,000 files, which it might name, are left out
    here, as reading them takes 8 s."""
    make = harness._manager
    monkeypatch.setattr(harness, "_manager", lambda folders, own: make(folders, False))
    seen: list[int] = []
    monkeypatch.setattr(harness._Counter, "__init__", counting(seen))
    found = run(checkpoint, folder / "group.yaml", limit=3, fewshot=1, window=40)["tasks"]
    assert found["tiny_choice"]["examples"] == 3
    assert found["tiny_choice"]["fewshot"] == 1
    assert found["tiny_group"]["metrics"]["acc"]["value"] == found["tiny_choice"]["metrics"]["acc"]["value"]
    assert found["tiny_choice"]["window"] == 40
    assert seen == list(range(1, 9))  # 3 + 2 + 3 choices
    with pytest.raises(UserError, match="Duplicate task 'tiny_choice'"):
        run(checkpoint, folder / "group.yaml", folder / "choice.yaml")


def counting(seen: list[int]) -> Any:
    def init(self: Any, progress: Any) -> None:
        self._progress, self._answers = seen.append, 0

    return init


@installed
@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("nowhere.yaml", "there is no such task file"),
        ("tasks/questions.jsonl", "there is no such task file"),
        ("broken.yaml", "--tasks .*broken.yaml: cannot be loaded"),
        ("empty.yaml", "--tasks .*empty.yaml: cannot be loaded"),
        ("without_data.yaml", "--tasks .*without_data.yaml: cannot be loaded .*nowhere.jsonl"),
    ],
)
def test_task_files_that_cannot_be_used(task: str, says: str, checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "empty.yaml").write_text("nothing: 1\n")
    (tmp_path / "without_data.yaml").write_text(CHOICE.replace("questions.jsonl", "nowhere.jsonl"))
    with pytest.raises(UserError, match=says) as error:
        run(checkpoint, tmp_path / task)
    assert "\n" not in str(error.value)


@installed
@pytest.mark.timeout(360)
def test_names_and_patterns_of_the_harness() -> None:
    assert harness.resolve_tasks(["arc_easy", "arc_eas*", "piqa"]) == ("arc_easy", "piqa")
    with pytest.raises(UserError, match="--tasks no_such_task: lm-evaluation-harness knows no such task"):
        harness.resolve_tasks(["arc_easy", "no_such_task"])


def test_without_the_harness(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    for task in ("arc_easy", str(folder / "choice.yaml")):
        with pytest.raises(UserError, match=r"pip install 'lesa-ray\[eval\]'"):
            harness.resolve_tasks([task])
    harness._manager.cache_clear()
