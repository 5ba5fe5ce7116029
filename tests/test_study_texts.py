"""Prose and instructions out of Python files, and the tokenizer that goes with them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from lesa_ray import UserError
from lesa_ray.training.chat import ChatEncoder
from lesa_ray.training.documents import Row
from lesa_ray.training.tokenizer import load_tokenizer
from pipelines import prose
from pipelines.studies import texts
from tests.training import styles

SOURCE = '''
"""What this module is for."""

def double(number):
    """Twice a number, whatever it is.

    >>> double(2)
    4

    Nothing else is said of it.
    """
    # a comment
    return 2 * number

def short(): "no"

def undocumented(number):
    return number

class Thing:
    """A thing."""
'''


def test_prose_is_documentation_without_code() -> None:
    seen: set[str] = {"No paragraph of it."}
    said = prose.prose(ast.parse(SOURCE), seen)
    parts = said.split("\n\n")
    assert parts[0] == "What this module is for."
    assert sorted(parts[1:]) == ["A thing.", "Nothing else is said of it.", "Twice a number, whatever it is.", "no"]
    assert prose.prose(ast.parse(SOURCE + 'def more():\n    "More of it."\n'), seen) == "More of it."


def test_an_answer_is_a_whole_function_without_its_documentation() -> None:
    assert list(texts.instructions(ast.parse(SOURCE))) == [
        {
            "prompt": "Write the Python function double. Twice a number, whatever it is.",
            "response": "def double(number):\n    return 2 * number",
        }
    ]


def test_a_folder_of_texts_that_a_tokenizer_without_a_template_can_be_fine_tuned_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prose, "PACKAGES", ("yaml", "not_installed_at_all"))
    monkeypatch.setattr(texts, "stdlib_files", lambda: ["json/__init__.py", "bisect.py", "this.py"])
    styles.gpt2().save_pretrained(tmp_path / "base")
    out = str(tmp_path / "texts")
    documents, questions = texts.make_texts(out, str(tmp_path / "base"))
    found = sorted(path.name for path in (tmp_path / "texts" / "prose").iterdir())
    assert len(found) == documents
    assert {"python-json.__init__.py.txt", "python-bisect.py.txt"} <= set(found)
    rows = [json.loads(line) for line in (tmp_path / "texts" / "instructions.jsonl").read_text().splitlines()]
    assert len(rows) == questions > 2
    assert {"def insort_right", "def bisect_left"} <= {row["response"].split("(")[0] for row in rows}
    tokenizer = load_tokenizer(f"{out}/tokenizer")
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b, c"}]
    (example,) = ChatEncoder(tokenizer, "it")(Row("a row", {"messages": messages}), messages)
    assert tokenizer.decode(example.ids) == "user: a?\nassistant: b, c<|endoftext|>"
    assert tokenizer.decode(example.ids[example.scored]) == "b, c<|endoftext|>"
    with pytest.raises(UserError, match="is there already"):
        texts.make_texts(out, str(tmp_path / "base"))
