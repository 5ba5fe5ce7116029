"""The jobs and their YAML: what is shipped can be read, and does what the command line does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.comparison.layerwise_study import LayerwiseStudyConfig
from lesa_ray.comparison.settings import ComparisonConfig
from lesa_ray.comparison.study_settings import StudyConfig
from lesa_ray.config import ExpandConfig, LesaSettings, Settings, load_settings
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.fleet.settings import FleetConfig
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.tokens import open_blocks
from lesa_ray.training.train_settings import FinetuneConfig, TrainConfig
from pipelines.benchmark import large
from pipelines.benchmark.layers import Weights
from tests import families
from tests.training import styles

PIPELINES = Path(__file__).parent.parent / "pipelines"
Bases = Callable[[str], str]


PAPER: dict[str, Any] = {"epochs": 5, "norm_weight": 5e-5, "holdout": 0.2}
"""LESA (arXiv 2502.13794), sections 4.1 and 4.4: 5 epochs, λ = 5e-5, and 120 of 150 triples to train on."""
CODE: dict[str, Any] = {"epochs": 10, "norm_weight": 5e-4, "holdout": 0.0}
"""The released notebooks (yangyifei729/LESA): 10 epochs, λ = 5e-4, trained on all there is."""
BOTH: dict[str, Any] = {
    "hidden": 256, "learning_rate": 1e-3, "batch_size": 64, "predictor": "mlp", "rank": None, "weigh": "direction",
    "scale": "none", "norms": "predicted", "share_experts": False,
}  # fmt: skip
"""The paper's three-layer MLP of width 256 on all singular directions, each counting alike; AdamW at 1e-3 in batches of
64 as in the notebooks, where the paper says nothing."""


def test_the_shipped_configuration_is_the_papers(tmp_path: Path) -> None:
    config = load_settings(ExpandConfig, str(PIPELINES / "expand.yaml"))
    recipe = ExpandConfig(base="b", out="o", recipe="released-code")
    for found, own in ((config.lesa, PAPER), (LesaSettings(), PAPER), (recipe.lesa, CODE)):
        expected = {**BOTH, **own}
        assert {name: getattr(found, name) for name in expected} == expected
    assert (config.base, config.method, config.factor) == ("meta-llama/Meta-Llama-3-8B", "lesa", 1.5)
    defaults = ExpandConfig(base=config.base, out=config.out, factor=1.5)
    assert config == defaults
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_settings(ExpandConfig, str(again)) == config


SHIPPED: dict[str, type[Settings]] = {
    "analyze": AnalyzeConfig,
    "compare": ComparisonConfig,
    "evaluate": EvaluateConfig,
    "expand": ExpandConfig,
    "finetune": FinetuneConfig,
    "fleet": FleetConfig,
    "layerwise_study": LayerwiseStudyConfig,
    "layerwise_study_small": LayerwiseStudyConfig,
    "pretrain": TrainConfig,
    "study_cluster": StudyConfig,
    "study_gpu": StudyConfig,
    "study_minutes": StudyConfig,
    "study_small": StudyConfig,
    "tokenize": TokenizeConfig,
}


def test_every_shipped_file_is_a_job_s_and_they_fit_together() -> None:
    assert {path.stem for path in PIPELINES.glob("*.yaml")} == SHIPPED.keys()
    shipped = {name: load_settings(kind, str(PIPELINES / f"{name}.yaml")) for name, kind in SHIPPED.items()}
    expand, tokenize, train, tune = (
        shipped[name].model_dump() for name in ("expand", "tokenize", "pretrain", "finetune")
    )
    assert train["checkpoint"] == expand["out"]
    assert train["data"] == tokenize["out"]
    assert tokenize["tokenizer"] == expand["base"]
    assert tune["checkpoint"] == train["out"]
    published = TrainConfig(checkpoint="c", data="d", out="o")
    same = ("batch", "learning_rate", "schedule", "warmup", "weight_decay", "betas", "clip", "final_rate")
    assert {name: train[name] for name in same} == {name: getattr(published, name) for name in same}
    tuned = FinetuneConfig(checkpoint="c", data="d", out="o")
    assert {name: tune[name] for name in same} == {name: getattr(tuned, name) for name in same}


@pytest.mark.timeout(360)
def test_the_tokenize_job_takes_a_file_and_flags(tmp_path: Path) -> None:
    tokenizer, text, out = tmp_path / "tokenizer", tmp_path / "text.txt", tmp_path / "blocks"
    styles.gpt2().save_pretrained(tokenizer)
    text.write_text("The café opens at nine.\n" * 200)
    command = [sys.executable, "-m", "pipelines.tokenize", "--config", str(PIPELINES / "tokenize.yaml")]
    command += [str(text), str(tokenizer), str(out), "--seq-len", "16", "--json"]
    done = subprocess.run(
        command, cwd=PIPELINES.parent, capture_output=True, text=True, timeout=330, check=False,
        env={**os.environ, "RAY_ADDRESS": "local"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert open_blocks(str(out)).seq_len == 16
    assert json.loads(done.stdout)["out"] == str(out)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_the_training_jobs_take_a_file_and_flags(name: str, bases: Bases, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"pipelines.{name}", "--config", str(PIPELINES / f"{name}.yaml"), bases("llama")]
    command += ["--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"), "--workers", "3"]
    done = subprocess.run(command, cwd=PIPELINES.parent, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 2
    assert "batch" in done.stderr
    assert "cannot be divided among 3 workers" in done.stderr


def test_the_expand_job_takes_a_file_and_flags(bases: Bases, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipelines.expand", "--config", str(PIPELINES / "expand.yaml")]
    command += [bases("mistral"), str(out), "--method", "solar", "--json"]
    done = subprocess.run(command, cwd=PIPELINES.parent, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == 8
    families.load_strict(out, "mistral")


@pytest.mark.timeout(1440)
def test_the_demo_from_start_to_end_and_again(tmp_path: Path) -> None:
    """The whole story with a base of a few steps: every method's row is there, and a second run only reads."""
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "pipelines.demo", "--out", str(out), "--steps", "3", "--rows", "16"]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    first, second = (
        subprocess.run(
            command, cwd=PIPELINES.parent, capture_output=True, text=True, timeout=1320, check=False, env=environment
        )
        for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stdout + first.stderr + second.stderr
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["name"]: row["layers"] for row in rows} == {
        "base": 8,
        **dict.fromkeys(("lesa", "llama-pro", "solar", "opt-deus", "avg-deus"), 12),
    }
    loss = {row["name"]: row["loss"] for row in rows}
    assert loss["llama-pro"] == pytest.approx(loss["base"], abs=1e-6)
    assert loss["opt-deus"] == pytest.approx(loss["base"], abs=1e-6)
    assert all(row["peak_memory"] > 30e6 for row in rows if row["name"] != "base")
    assert (out / "trained" / "lesa" / "config.json").exists()
    assert second.stdout.count("reusing") == 11
    assert "made" not in second.stdout
    assert "Next, your own model:" in second.stdout
    table = [line for line in first.stdout.splitlines() if "│" in line]
    assert [line for line in second.stdout.splitlines() if "│" in line] == table


def test_the_large_benchmark_counts_what_goes_to_scratch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """6 layers and 3 new ones of 64 × 32 in bfloat16, and coefficients of 6 in float32."""
    needed = (6 + 3) * 64 * 32 * 2 + 6 * 64 * 32 * 4
    line = ["large", "--layers", "6", "--d1", "64", "--d2", "32", "--rank", "0", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*line, "--memory-budget", "50kB"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(SystemExit, match="needs 0 GB; give fewer --layers"):
        large.main()
    assert "of coefficients go to scratch" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    monkeypatch.setattr(Weights, "write", lambda *_, **given: sys.exit(given["device"]))
    with pytest.raises(SystemExit, match="cpu"):
        large.main()
