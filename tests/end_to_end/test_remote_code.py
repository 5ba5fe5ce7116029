"""Code that a checkpoint brings along is never run, whatever is done with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import DistilBertConfig

from lesa_ray import Expanded, UserError
from lesa_ray.checkpoint.depth import completed_config
from lesa_ray.distributed.evaluate import evaluate
from lesa_ray.evaluation.checkpoints import load_model
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.expansion.rehearsal import _new_model
from lesa_ray.expansion.same_layers import check_same_layers
from lesa_ray.training.model import build
from lesa_ray.training.tokenizer import load_tokenizer
from tests import families
from tests.training import styles


def test_the_code_of_a_checkpoint_is_not_run(grow: Callable[..., Expanded], tmp_path: Path) -> None:
    base, marker = tmp_path / "base", tmp_path / "it-ran"
    families.make("llama", base, vocab_size=512)
    styles.qwen(styles.CHATML).save_pretrained(base)
    code = f"open({str(marker)!r}, 'w').close()\nclass Config: ...\nclass Model: ...\nclass Words: ...\n"
    (base / "code.py").write_text(code)
    for name, mapped in (
        ("config.json", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["code.Words", "code.Words"]}),
    ):
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**content, "auto_map": mapped}))
    (tmp_path / "text.txt").write_text("left right " * 50)

    grown = grow(str(base), method="llama-pro")
    config = EvaluateConfig(
        checkpoints=(str(base), grown.out), data=(str(tmp_path / "text.txt"),), window=16, stride=16
    )
    report = evaluate(config, use_ray=False)
    assert len(report["checkpoints"]) == 2

    content = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**content, "tokenizer_class": "Words"}))
    with pytest.raises(UserError, match="tokenizer"):  # nothing but its own code would do
        load_tokenizer(str(base))
    assert not marker.exists()


@pytest.mark.parametrize("within", [False, True])
def test_nobody_is_asked_whether_to_run_it(within: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of families that transformers knows without a class for what is asked, it would ask, and take "y" for a yes."""
    marker = tmp_path / "it-ran"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Model: ...\n")
    brought = {
        "_name_or_path": str(tmp_path),
        "auto_map": {"AutoModelForCausalLM": "code.Model", "AutoModel": "code.Model"},
    }
    raw: dict[str, Any] = {"model_type": "distilbert", "n_layers": 2, **brought}
    if within:
        raw = {
            "model_type": "fuyu",
            "text_config": {"model_type": "siglip_text_model", "num_hidden_layers": 2, **brought},
        }
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")

    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for refused in (lambda: build(raw, "base"), lambda: load_model(str(tmp_path), None)):
        with pytest.raises(UserError, match=r"refuses it|cannot be loaded"):
            refused()
    check_same_layers(raw, raw, {0: 0}, "base")
    full = completed_config(raw, "base")
    assert full is not None
    assert "auto_map" not in json.dumps(full)
    with pytest.raises(ValueError, match="trust_remote_code"):
        _new_model({}, DistilBertConfig(**brought))
    assert not asked
    assert not marker.exists()
