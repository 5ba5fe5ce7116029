"""Prose that every machine with this project has: the documentation inside Python's standard library and packages.

Docstrings without their examples of code: English, technical, and nothing like the source that surrounds it. A
paragraph is there once, so that held-out documents hold no copies. It depends on the versions that are installed.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

PACKAGES = ("torch", "ray", "numpy", "pyarrow", "fsspec", "pydantic")
"""Beside the standard library: what this project needs itself, so what is installed."""
FEWEST_CHARACTERS = 500
"""Of a document."""
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def sources(library: list[str], root: str | None = None) -> Iterator[tuple[str, str, list[str]]]:
    """Python files by where they come from: its name, its folder, the files' names below it, sorted.

    library: the standard library's files below `root`; the packages that are installed follow."""
    yield "python", root or sysconfig.get_path("stdlib"), library
    for package in PACKAGES:
        root, names = package_files(package)
        if names:
            yield package, root, names


def prose_documents(library: list[str], root: str | None = None) -> Iterator[tuple[str, str]]:
    """Name and text of each document; arguments as for `sources`."""
    seen = set[str]()
    for package, folder, names in sources(library, root):
        for name, tree in parsed(folder, names):
            text = prose(tree, seen)
            if len(text) >= FEWEST_CHARACTERS:
                yield f"{package}-{name.replace(os.sep, '.')}.txt", f"{text}\n"


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
