"""A CUDA device that is pretended on a machine without one: a pytest plugin, `-p tests.pretended_gpu`.

What computes for a GPU is held to a GPU's rules where there is none. A tensor there is a wrapper around one of the CPU,
and every operation goes through `_run`, which refuses what CUDA refuses: operands on different devices, and, while a
graph is captured, whatever would wait for the device or copy from or to the host. A captured step is not executed; a
replay executes it on the memory that it was captured with. Streams are in order, so what a missing wait would break is
not seen; nor are times, memory, or what CUDA's libraries do with large matrices. Those want a GPU.

PyTorch's CPU build has no device guard for CUDA, which indexing and reading a number ask for: one that does nothing is
compiled (a second) and loaded. Modes hold for one thread, so those of thread pools enter them, too.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
MEMORY = 80 * 2**30
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
"""
_HERE = threading.local()
"""Of each thread: the stream that is current, and what is captured."""


class Pretended(torch.Tensor):
    """A tensor on the device; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Pretended({self.held})"

    def record_stream(self, stream: Any) -> None:
        assert isinstance(stream, Stream)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("untyped_storage", "data_ptr", "tolist"):
            return getattr(args[0].held, name)()
        if name == "numpy":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of ATen by CUDA's rules, computed on the CPU."""
    operands = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    there = [one for one in operands if isinstance(one, Pretended)]
    wanted = kwargs.get("device")
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if not there and not _is_gpu(wanted):
        return func(*args, **kwargs)
    _check(func, args, operands, wanted)

    def held(one: Any) -> Any:
        return one.held if isinstance(one, Pretended) else one

    inner, named = tree_map(held, args), tree_map(held, kwargs)
    if "device" in named:
        named["device"] = torch.device("cpu")
    call: Callable[[], Any] = lambda: func(*inner, **named)  # noqa: E731
    if str(func) == "aten.mm.dtype":  # exact products of halves, which the CPU does not have
        left, right, dtype = inner
        assert {left.dtype, right.dtype} <= {torch.bfloat16, torch.float16}
        assert dtype == torch.float32
        call = lambda: left.to(dtype) @ right.to(dtype)  # noqa: E731
    captured = getattr(_HERE, "captured", None)
    before = [(one, one.clone()) for one in _written(func, inner, named)] if captured is not None else []
    result = call()
    if captured is not None:
        for one, old in before:
            one.copy_(old)
        if not any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns):
            captured.append((call, result))  # but for views, which look at the same memory at each replay
    given = {id(held(one)): one for one in operands}
    on_gpu = _is_gpu(wanted) if wanted is not None else bool(there)

    def outside(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        return given.get(id(one)) if id(one) in given else Pretended(one) if on_gpu else one

    return tree_map(outside, result)


def _check(func: Any, args: Any, operands: list[torch.Tensor], wanted: Any) -> None:
    """Raises: RuntimeError for what CUDA refuses."""
    name = func._schema.name
    on_host = [one for one in operands if not isinstance(one, Pretended)]
    copies = name in ("aten::copy_", "aten::_to_copy")
    strangers = [] if copies else [one for one in on_host if one.ndim or one is args[0] or "mm" in name]
    if name.startswith("aten::index") and "select" not in name and isinstance(args[0], Pretended):
        strangers = [one for one in strangers if all(one is not index for index in args[1])]
    if strangers and len(on_host) < len(operands):
        what = [(type(one).__name__, tuple(one.shape)) for one in operands]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {what}")
    if getattr(_HERE, "captured", None) is not None:
        crosses = copies and (on_host or (wanted is not None and not _is_gpu(wanted)))
        if crosses or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What an operation writes to, of its arguments."""
    arguments = func._schema.arguments
    values = {one.name: value for one, value in zip(arguments, args, strict=False)} | kwargs
    written = [values.get(one.name) for one in arguments if one.alias_info is not None and one.alias_info.is_write]
    return [one for one in tree_leaves(written) if isinstance(one, torch.Tensor)]


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """`cuda` is the one device, which PyTorch's own bindings would ask CUDA for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def numbered(one: Any) -> Any:
            return GPU if isinstance(one, str | torch.device) and str(one) == "cuda" else one

        named = {name: numbered(value) for name, value in (kwargs or {}).items()}
        if func is torch.tensor and _is_gpu(named.get("device")):
            return func(*args, **{**named, "device": "cpu"}).to(GPU)
        if getattr(func, "__name__", "") == "to":
            args = tuple(numbered(one) for one in args)
        if args and isinstance(args[0], Pretended):
            return Pretended.__torch_function__(func, types, args, named)
        return func(*args, **named)


@contextmanager
def pretending() -> Iterator[None]:
    """In this thread, and what it gives to pools, `cuda` is the pretended device."""
    with ExitStack() as modes:
        modes.enter_context(_Operations())
        modes.enter_context(_Functions())
        yield


class Stream:
    def __init__(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


class Event:
    def __init__(self, **_: Any) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Graph:
    def __init__(self) -> None:
        self.steps: list[tuple[Callable[[], Any], Any]] = []

    def replay(self) -> None:
        assert self.steps, "captured first"
        for call, result in self.steps:
            for into, new in zip(tree_leaves(result), tree_leaves(call()), strict=True):
                if isinstance(into, torch.Tensor) and into is not new:
                    into.copy_(new)


_DEFAULT = Stream()


def _current(device: Any = None) -> Stream:
    stream: Stream = getattr(_HERE, "stream", _DEFAULT)
    return stream


@contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    outside, _HERE.stream = _current(), stream
    try:
        yield
    finally:
        _HERE.stream = outside


@contextmanager
def _capture(graph: Graph, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    assert stream is _current(), "a graph is captured in the stream that is current"
    assert stream is not _DEFAULT, "a graph is captured in a stream of its own"
    _HERE.captured = graph.steps
    try:
        yield
    finally:
        _HERE.captured = None


class _Generator(torch.Generator):
    """One of the CPU's, whatever is asked for: Python Optimal Transport makes one for the device and draws nothing."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


class _Properties:
    total_memory = MEMORY
    name = "pretended"


def _submit_within(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    def within() -> Any:
        with pretending():
            return function(*args, **kwargs)

    return _SUBMIT(pool, within)


_SUBMIT = ThreadPoolExecutor.submit


def pytest_configure(config: pytest.Config) -> None:
    """The process has the device from here on."""
    with tempfile.TemporaryDirectory() as folder:
        source, library, torch_folder = Path(folder, "guard.cpp"), Path(folder, "guard.so"), Path(torch.__file__).parent
        source.write_text(GUARD)
        paths = [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-lc10"]
        command = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-std=c++20", str(source), "-o", str(library)]
        subprocess.run([*command, *paths], check=True, timeout=120)
        torch.ops.load_library(str(library))
    torch.Generator = _Generator  # type: ignore[misc]
    cuda: Any = torch.cuda
    cuda._lazy_init = cuda.empty_cache = lambda: None
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.Stream, cuda.Event, cuda.CUDAGraph = Stream, Event, Graph
    cuda.current_stream, cuda.stream, cuda.graph = _current, _stream, _capture
    cuda.default_stream = lambda device=None: _DEFAULT
    cuda.get_device_properties = lambda device=0: _Properties
    cuda.get_device_name = lambda device=0: _Properties.name
    cuda.mem_get_info = lambda device=0: (int(os.environ.get("PRETENDED_GPU_FREE", MEMORY)), MEMORY)
    cuda.memory_reserved = lambda device=0: 0
    cuda.get_per_process_memory_fraction = lambda device=None: 1.0
    cuda.synchronize = lambda device=None: None
    ThreadPoolExecutor.submit = _submit_within  # type: ignore[method-assign, assignment]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with pretending():
        yield
