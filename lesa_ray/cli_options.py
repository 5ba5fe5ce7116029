"""What commands share: options out of settings (every field a flag), results as JSON.

A field's docstring is the option's help, up to the first empty line: what follows is for those who read the code. So a
setting is described in one place, and a new one is on the command line at once. Flags that are not given are None,
which lets a YAML file (`--config`) or the default decide.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import typer
from pydantic import BeforeValidator

from lesa_ray.config import Settings

if TYPE_CHECKING:
    from lesa_ray.expansion.runner import Listener

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file with these settings; flags win.")]
OptionalBase = Annotated[
    str | None, typer.Argument(metavar="BASE", help="A folder, a Hugging Face repo id, or an fsspec URL.")
]
_PLAIN = (str, int, float)


def with_options(
    kind: type[Settings], leave_out: tuple[str, ...] = (), inner: Mapping[str, tuple[str, ...]] | None = None
) -> Callable[[Callable[..., None]], Any]:
    """A decorator: the function's `**given` receives one option for each field of `kind` but `leave_out`.

    inner: fields that are settings themselves, and which of theirs are options too, in the place of the field, as
    mappings of what was given."""
    within = inner or {}

    def options() -> Iterator[tuple[str, Any]]:
        for name, field in kind.model_fields.items():
            if name in within:
                yield from ((one, _option(field.annotation, one, f"{name}: ")) for one in within[name])
            elif name not in leave_out:
                yield name, _option(kind, name)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            for outer, names in within.items():
                flags = {name: given.pop(name) for name in names}
                given[outer] = {name: value for name, value in flags.items() if value is not None}
            function(**given)

        own = inspect.signature(function, eval_str=True)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in options()
        ]
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept]
        command.__signature__ = own.replace(parameters=[*added, *keyword_only])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*added, *keyword_only]}
        return command

    return decorate


def print_json(value: object) -> None:
    """A result for programs, on standard output."""
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")


@contextlib.contextmanager
def working(stage: str, run: str) -> Iterator[Listener]:
    """A command's work, its progress on standard error. run: where its output goes."""
    from lesa_ray.report.terminal import progress_lines

    with results_apart(), progress_lines(f"{stage} {run}") as listener:
        yield listener


@contextlib.contextmanager
def results_apart() -> Iterator[None]:
    """Standard output is for results: what Ray says there of its nodes and tasks goes to standard error inside. A Ray
    that was started inside ends with the block, since it goes on saying until then."""
    up = _ray_is_up()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            if _ray_is_up() and not up:
                sys.modules["ray"].shutdown()


def _ray_is_up() -> bool:
    ray: Any = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def described(kind: type[Settings], name: str, required: str = "required") -> str:
    """What a setting is, up to the first empty line of its docstring, and its default, or `required` (if that says
    something) where it has none."""
    field = kind.model_fields[name]
    told = " ".join((field.description or "").split("\n\n")[0].split())
    shown = required if field.is_required() else _shown(field.get_default(call_default_factory=True))
    if not shown:
        return told
    return f"{told} [{shown}]" if field.is_required() else f"{told} [default: {shown}]"


def _option(kind: Any, name: str, prefix: str = "") -> Any:
    """The annotation of one option; its help begins with `prefix`."""
    field = kind.model_fields[name]
    text = described(kind, name, "required; here or in --config")
    if prefix:
        text = f"{prefix}{text[:1].lower()}{text[1:]}"
    flag = f"--{name.replace('_', '-')}"
    types_of = members(field.annotation)
    if bool in types_of:
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text)]
    several = [t for t in types_of if typing.get_origin(t) is tuple and typing.get_args(t)[-1] is Ellipsis]
    if several:
        choices = _choices(typing.get_args(several[0])[0])
        return Annotated[list[str] | None, typer.Option(flag, help=f"{text} Repeatable.", metavar=choices)]
    if choices := _choices(field.annotation):
        return Annotated[str | None, typer.Option(flag, help=text, metavar=choices)]
    plain = [t for t in types_of if t in _PLAIN]
    mixed = len([t for t in types_of if t is not type(None)]) > 1
    chosen = str if mixed or not plain else plain[0]
    return Annotated[chosen | None, typer.Option(flag, help=text)]


def _choices(annotation: Any) -> str | None:
    """The words that a value is one of, if it is."""
    words = [word for one in members(annotation) if typing.get_origin(one) is Literal for word in typing.get_args(one)]
    return "|".join(map(str, words)) or None


def members(annotation: Any) -> tuple[Any, ...]:
    """The types that a value may have. One that is read from another (a size from "8GB") stays whole."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for one in typing.get_args(annotation) for member in members(one))
    if typing.get_origin(annotation) is Annotated:
        plain, *checks = typing.get_args(annotation)
        return (annotation,) if any(isinstance(check, BeforeValidator) for check in checks) else members(plain)
    return (annotation,)


def _shown(default: Any) -> str:
    if default in (None, (), {}) or isinstance(default, Settings):
        return ""
    if isinstance(default, tuple):
        return ",".join(str(value) for value in default)
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)
