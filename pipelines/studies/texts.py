"""Prose and instructions that every machine with this project has: `python -m pipelines.studies.texts OUT`.

    OUT/prose/           the documentation inside Python's standard library and installed packages, a file a module
    OUT/instructions.jsonl   functions of the standard library, asked for by their documentation
    OUT/tokenizer/       a tokenizer with a chat template, for fine-tuning a base that has none

Decides
- Prose is docstrings without their examples of code: English, technical, and nothing like the source that surrounds it.
  A paragraph is there once, so that held-out documents hold no copies. It depends on the versions that are installed.
- An answer is a whole function without its documentation, as Python itself would print it.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Annotated

import typer

from lesa_ray import MachineError, UserError
from pipelines.corpus import stdlib_files

PACKAGES = ("torch", "ray", "numpy", "pyarrow", "fsspec", "pydantic")
"""Beside the standard library: what this project needs itself, so what is installed."""
FEWEST_CHARACTERS = 500
"""Of a document."""
LONGEST_ANSWER = 700
"""Characters of a function: some 200 tokens, which fit in a row of 256 with the question."""
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def parsed(root: str, names: list[str]) -> Iterator[tuple[str, ast.Module]]:
    """Each file's name and tree; files that are no Python of this version are passed over."""
    for name in names:
        with open(os.path.join(root, name), encoding="utf-8", errors="replace") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in old sources
            try:
                yield name, ast.parse(file.read())
            except (SyntaxError, ValueError):
                continue


def package_files(package: str) -> tuple[str, list[str]]:
    """A package's folder, and the names of its Python files below it, sorted. Both empty if it is not installed."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return "", []
    root = spec.submodule_search_locations[0]
    found = [
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith(".py")
    ]
    return root, sorted(found)


def prose(tree: ast.Module, seen: set[str]) -> str:
    """The documentation in a module, without paragraphs of code and those that were `seen` before; now they are."""
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, _Documented)]
    paragraphs = [part.strip() for text in texts if text for part in text.split("\n\n")]
    kept = [part for part in dict.fromkeys(paragraphs) if part and ">>>" not in part and "```" not in part]
    new = [part for part in kept if part not in seen]
    seen.update(new)
    return "\n\n".join(new)


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
    asked: dict[str, dict[str, str]] = {}
    documents, seen = 0, set[str]()
    library = (sysconfig.get_path("stdlib"), stdlib_files())
    for package, (root, names) in {"python": library, **{name: package_files(name) for name in PACKAGES}}.items():
        for name, tree in parsed(root, names):
            text = prose(tree, seen)
            if len(text) >= FEWEST_CHARACTERS:
                documents += 1
                path = os.path.join(partial, "prose", f"{package}-{name.replace(os.sep, '.')}.txt")
                with open(path, "w", encoding="utf-8") as file:
                    file.write(f"{text}\n")
            if package == "python":
                asked.update((one["prompt"], one) for one in instructions(tree))
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
    try:
        documents, questions = make_texts(out, tokenizer)
    except (UserError, MachineError) as error:
        print(f"texts: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
    print(f"{out}: {documents:,} documents of prose, {questions:,} instructions")


if __name__ == "__main__":
    typer.run(main)
