"""Keys of YAML files that are no options: the help of a command ends with them.

They are read off the settings, as options are (`lesa_ray.cli_options`), when help is asked for.
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Iterator
from typing import Any

from typer.core import TyperCommand

from lesa_ray.cli_options import described, members
from lesa_ray.config import ExpandConfig, Settings

LESA_OPTIONS = ("svd", "rank", "predictor", "share_experts", "epochs", "holdout")
"""Keys of `lesa:` that are options of `expand` too."""


class Command(TyperCommand):
    """A command whose help shows such keys, where its file has some."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)
        heading, rows = keys_of(self.name)
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows)


def keys_of(command: str | None) -> tuple[str, list[tuple[str, str]]]:
    """A heading, and each key, indented as in the file, with what it is; none where options are all there is."""
    if command == "compare":
        from lesa_ray.comparison.settings import ComparisonConfig

        return "Keys of FILE", list(_rows(ComparisonConfig))
    if command == "fleet":
        from lesa_ray.fleet.settings import FleetConfig

        return "Keys of FILE", list(_rows(FleetConfig))
    if command in ("expand", "inspect", "analyze"):
        options = () if command == "analyze" else LESA_OPTIONS
        return "Keys of the YAML file beside the options", list(_rows(ExpandConfig, ("lesa",), options))
    return "", []


def _rows(
    kind: type[Settings], only: Collection[str] = (), options: Collection[str] = (), indent: str = ""
) -> Iterator[tuple[str, str]]:
    """only: of the keys, these; all where none is named. options: keys that are options too, which tell of them."""
    for name in only or kind.model_fields:
        inner, path = _inside(kind.model_fields[name].annotation)
        told = f"--{name.replace('_', '-')}" if name in options else described(kind, name)
        yield f"{indent}{name}{':' if inner else ''}", told
        if inner is not None:
            for level, word in enumerate(path):
                yield f"{indent}{'  ' * (level + 1)}{word}", ""
            yield from _rows(inner, (), options, f"{indent}{'  ' * (len(path) + 1)}")


def _inside(annotation: Any) -> tuple[type[Settings] | None, tuple[str, ...]]:
    """The settings that a key holds, if it does, and what stands between in the file: each stage's name, for one."""
    for one in members(annotation):
        if isinstance(one, type) and issubclass(one, Settings):
            return one, ()
        if typing.get_origin(one) is dict:
            inner, path = _inside(typing.get_args(one)[1])
            return inner, ("STAGE:", *path)
        if typing.get_origin(one) is tuple:
            return _inside(typing.get_args(one)[0])
    return None, ()
