"""The command that makes a thing again, from the settings that are stored beside it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from lesa_ray.config import Settings


def command(
    words: Sequence[str], kind: type[Settings], settings: Mapping[str, Any], leave_out: Collection[str] = ()
) -> str:
    """The words, then an option for each setting that is not its default, quoted for a shell.

    What only a file can hold is in a comment behind, as the file's content. settings: as `model_dump(mode="json")`
    gives them; those that `kind` does not know are left out."""
    options, content = list(words), {}
    for name, field in kind.model_fields.items():
        value, default = settings.get(name), _plain(field.get_default(call_default_factory=True))
        if name in leave_out or value is None or value == default:
            continue
        if isinstance(value, Mapping):
            known = default if isinstance(default, Mapping) else {}
            content[name] = {key: one for key, one in value.items() if one != known.get(key)}
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            options.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list) and _repeats(field.annotation):
            options += [word for one in value for word in (flag, str(one))]
        else:
            options += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    if not content:
        return shlex.join(options)
    file = yaml.safe_dump(content, default_flow_style=True, width=10**6, sort_keys=False).strip()
    return f"{shlex.join([*options, '--config', 'FILE'])}  # FILE: {file}"


def _plain(default: object) -> object:
    """A default as JSON has it."""
    if isinstance(default, BaseModel):
        return default.model_dump(mode="json")
    return list(default) if isinstance(default, tuple) else default


def _repeats(annotation: object) -> bool:
    """Whether the option of a field is given once for each value."""
    return get_origin(annotation) is tuple and get_args(annotation)[-1] is Ellipsis
