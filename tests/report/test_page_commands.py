"""Commands that make things again: what the command line reads of them is what was stored."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from lesa_ray import cli
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.config import ExpandConfig, LesaSettings, Settings, load_settings
from lesa_ray.report.page.plans import how_expand
from lesa_ray.report.page.schema import Analysis
from lesa_ray.report.page.sources import Expansion, Training
from lesa_ray.report.page.trained import how_train
from lesa_ray.report.page.weights import how_analyze
from lesa_ray.training.train_settings import FinetuneConfig, TrainConfig
from tests.report import page_samples as samples


def read_back(line: str, kind: type[Settings], tmp_path: Path) -> tuple[str, Settings]:
    """Which command a line is, and the settings that it has."""
    _, name, *words = shlex.split(line, comments=True)
    (tmp_path / "FILE").write_text(line.partition("  # FILE: ")[2] or "{}")
    group: Any = get_command(cli.app)
    given = group.commands[name].make_context(name, words).params
    file = str(tmp_path / "FILE") if given.pop("config") else None
    return name, load_settings(kind, file, **{key: value for key, value in given.items() if key in kind.model_fields})


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("pretrain", TrainConfig(checkpoint="s3://a b/it's $HOME", data="blocks", out="run", tokens=10**9, workers=2)),
        (
            "pretrain",
            TrainConfig(
                checkpoint="base", data="blocks", out="run", betas=(0.9, 0.99), train=("new", "*.mlp.*"),
                schedule="wsd", learning_rate=1e-5, precision="fp32", insert_over=0.5,
                insert_order="top", eval_rows=8, seed=3,
            ),
        ),
        ("pretrain", TrainConfig(architecture={"model_type": "llama", "layers": [1, 2]}, data="blocks", out="run")),
        ("finetune", FinetuneConfig(checkpoint="base", data="talk.jsonl", out="run").on_blocks("run/training/data")),
    ],
)  # fmt: skip
def test_a_training_run(name: str, config: TrainConfig, tmp_path: Path) -> None:
    run = Training("run", "run", [], {"steps": 7}, {}, config.model_dump(mode="json"))
    kind = FinetuneConfig if name == "finetune" else TrainConfig
    read, again = read_back(how_train(run), kind, tmp_path)
    assert read == name
    assert isinstance(again, TrainConfig)
    plain = config.model_copy(update={"workers": 1})  # how many does not change what a run computes
    assert (again.on_blocks(again.data) if isinstance(again, FinetuneConfig) else again) == plain


def test_a_training_run_of_which_little_is_known() -> None:
    assert how_train(Training("my run", "x", [], {}, {})) == "lesa-ray pretrain CKPT --data BLOCKS --out my-run"


def test_an_analysis(tmp_path: Path) -> None:
    config = AnalyzeConfig(
        base="org/a b", data=("one.txt", "two three.txt"), tokens=100, window=64, dtype="float32", fit=True, seed=2,
        device="cpu", out="x", lesa=LesaSettings(epochs=1, ridge=0.5),
    )  # fmt: skip
    stored = config.model_dump(mode="json", exclude={"out"})
    analysis = Analysis.model_validate(samples.analysis(checkpoint="org/a b", settings=stored))
    _, again = read_back(how_analyze(analysis), AnalyzeConfig, tmp_path)
    assert again == config.model_copy(update={"device": None, "out": "FOLDER"})
    old = Analysis.model_validate(samples.analysis())
    assert how_analyze(old) == "lesa-ray analyze models/grown --out FOLDER --data blocks"


def test_an_expansion(tmp_path: Path) -> None:
    config = ExpandConfig(
        base="org/a b", out="my-arm", method="aligned-lesa", layers=48, position="1,5", zero_init=False,
        new_width=(0.5, 1), variants=("v 1", "v2"), dtype="bfloat16", lesa=LesaSettings(predictor="ridge", ridge=0.1),
        cpus_per_task=3,
    )  # fmt: skip
    manifest: Any = {
        "base": "org/a b",
        "method": "aligned-lesa",
        "identity": {"settings": config.model_dump(mode="json", exclude={"base", "out"})},
    }
    _, again = read_back(how_expand(Expansion("my arm", "x", manifest)), ExpandConfig, tmp_path)
    assert again == config
