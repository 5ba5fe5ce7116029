"""What comparisons in tests are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import families
from tests.training import styles
from tests.training.blocks import make_blocks


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, token blocks, text and conversations."""
    root = tmp_path_factory.mktemp("given")
    families.make("llama", root / "base")
    styles.qwen(styles.CHATML).save_pretrained(root / "base")
    make_blocks(str(root / "blocks"), seq_len=32)
    (root / "text.txt").write_text("The café opens at nine.\n")
    (root / "chat.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    return root
