"""Code that a checkpoint brings along is never run, whatever is done with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lesa_ray import Expanded, UserError
from lesa_ray.distributed.evaluate import evaluate
from lesa_ray.evaluation.settings import EvaluateConfig
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
