"""Prose and instructions that every machine with this project has: `python -m pipelines.studies.texts OUT`.

    OUT/prose/           the documentation inside Python's standard library and installed packages, a file a module
    OUT/instructions.jsonl   functions of the standard library, asked for by their documentation
    OUT/tokenizer/       a tokenizer with a chat template, for fine-tuning a base that has none

An answer is a whole function without its documentation, as Python itself would print it.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator
from typing import Annotated

import typer

from lesa_ray import UserError
from pipelines.corpus import stdlib_files
from pipelines.jobs import exits
from pipelines.prose import parsed, prose_documents

LONGEST_ANSWER = 700
"""Characters of a function: some 200 tokens, which fit in a row of 256 with the question."""
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def instructions(tree: ast.Module) -> Iterator[dict[str, str]]:
    """The functions of a module that say what they do, as questions and answers."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        says = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
        node.body = node.body[1:]
        answer = ast.unparse(node)
        if len(says) >= 20 and len(answer) <= LONGEST_ANSWER:
            yield {"prompt": f"Write the Python function {node.name}. {says}", "response": answer}


def make_texts(out: str, tokenizer: str) -> tuple[int, int]:
    """Write everything; how many documents and instructions. `out` appears at one moment, complete.

    Raises: UserError if it is there already, or there is no tokenizer."""
    from lesa_ray.training.tokenizer import load_tokenizer

    if os.path.exists(out):
        raise UserError(f"{out}: is there already; remove it or name another folder")
    loaded = load_tokenizer(tokenizer)
    partial = f"{out}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(os.path.join(partial, "prose"))
    library, documents = stdlib_files(), 0
    for name, text in prose_documents(library):
        documents += 1
        with open(os.path.join(partial, "prose", name), "w", encoding="utf-8") as file:
            file.write(text)
    trees = parsed(sysconfig.get_path("stdlib"), library)
    asked = {one["prompt"]: one for _, tree in trees for one in instructions(tree)}
    with open(os.path.join(partial, "instructions.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(one)}\n" for one in asked.values())
    loaded.chat_template = TEMPLATE
    loaded.save_pretrained(os.path.join(partial, "tokenizer"))
    os.rename(partial, out)
    return documents, len(asked)


def main(
    out: Annotated[str, typer.Argument(help="A new folder.")],
    tokenizer: Annotated[str, typer.Option(help="Whose tokenizer gets a chat template.")] = "demo/base",
) -> None:
    """Make prose and instructions out of what is installed."""
    with exits("texts"):
        documents, questions = make_texts(out, tokenizer)
    print(f"{out}: {documents:,} documents of prose, {questions:,} instructions")


if __name__ == "__main__":
    typer.run(main)
