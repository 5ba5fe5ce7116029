"""Infinity and NaN in a config.json, as transformers 5 writes them: `{"__float__": "Infinity"}`.

JSON has no such numbers. transformers decodes them where it reads the file (`PreTrainedConfig._dict_from_json_file`),
so whoever reads it as JSON must, before a configuration class sees the values. What is written to another config.json
keeps the form that it has in the file."""

from __future__ import annotations

from typing import Any

_KEY = "__float__"
_VALUES = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def decoded(value: Any) -> Any:
    """A copy of what a config.json holds, with the numbers that such objects stand for."""
    if isinstance(value, dict):
        if value.keys() == {_KEY} and isinstance(value[_KEY], str) and value[_KEY] in _VALUES:
            return _VALUES[value[_KEY]]
        return {name: decoded(inner) for name, inner in value.items()}
    return [decoded(inner) for inner in value] if isinstance(value, list) else value
