"""The stream of a device that is not there: graphs on CPU tensors, recorded and replayed as a CUDA graph would be.

A recording keeps each operation of PyTorch and each launch of a Triton kernel with its tensors, by their memory, and
its numbers, as they were. So a number that the host computed anew for each step, and memory that does not live as long
as the graph, give wrong results here as they would on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from triton.runtime.jit import JITFunction

from llmd.worker.stream import Download

Operation = Callable[[], None]


class RecordingStream:
    """Work is done at once, so that a download is a copy of what is there now. Counts what it was asked for."""

    def __init__(self) -> None:
        self.num_captures = 0
        self.num_replays = 0
        self.num_uploads = 0
        self.num_downloads = 0

    def upload(self, numbers: npt.NDArray[np.int32], target: Tensor) -> None:
        self.num_uploads += 1
        target[: len(numbers)].copy_(torch.from_numpy(numbers))

    def download(self, source: Tensor) -> Download:
        self.num_downloads += 1
        return _Arrived(source.clone())

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        self.num_captures += 1
        graph = record(work)

        def replay() -> None:
            self.num_replays += 1
            graph.replay()

        return replay


class _Arrived:
    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers

    def wait(self) -> Tensor:
        return self._numbers


class Graph:
    """Recorded operations, and the memory that is the graph's own: poisoned before and after each replay."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.own: list[Tensor] = []

    def replay(self) -> None:
        self._poison()
        for operation in self.operations:
            operation()
        self._poison()

    def _poison(self) -> None:
        for tensor in self.own:
            poison(tensor)


def poison(tensor: Tensor) -> None:
    """The worst that can be read: NaN, the largest integer, True."""
    if tensor.dtype is torch.bool:
        tensor.fill_(True)
    elif tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


def record(work: Callable[[], object]) -> Graph:
    """Call `work`; what it does to memory from outside is recorded and not done."""
    graph = Graph()

    def launch(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        graph.operations.append(lambda: kernel[grid](*args, **options))

    real_run = JITFunction.run
    JITFunction.run = launch  # type: ignore[method-assign, assignment]
    try:
        with no_waiting(), _Recorder(graph):
            work()
    finally:
        JITFunction.run = real_run  # type: ignore[method-assign]
    return graph


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable:
            self._graph.operations.append(lambda: func(*args, **kwargs))
            return _mutated(schema, args, kwargs)
        result = func(*args, **kwargs)
        outputs = [output for output in tree_iter(result) if isinstance(output, Tensor)]
        inputs = {_memory(value) for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
        if any(_memory(output) in inputs for output in outputs):
            # a view: its memory is recorded where it was made
            return result
        self._graph.own += outputs
        if not schema.name.startswith("aten::empty"):
            self._graph.operations.append(lambda: _write(outputs, func(*args, **kwargs)))
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _mutated(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation in place, or with `out`, returns: the tensors that it changes."""
    named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    changed = [named[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not schema.returns:
        return None
    return changed[0] if len(schema.returns) == 1 else tuple(changed)


def _write(outputs: list[Tensor], result: Any) -> None:
    for output, new in zip(outputs, (r for r in tree_iter(result) if isinstance(r, Tensor)), strict=True):
        output.copy_(new)


class HostSync(Exception):
    """The host would have waited for the device here."""


_WAITING_METHODS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
}
_WAITING_OPERATIONS = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::unique_consecutive"}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, everything that would wait for a GPU raises HostSync. What interprets a kernel may do what it likes."""
    real_run = JITFunction.run

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return real_run(*args, **kwargs)

    JITFunction.run = run  # type: ignore[method-assign, assignment]
    try:
        with _NoWaitingMethods(), _NoWaitingOperations():
            yield
    finally:
        JITFunction.run = real_run  # type: ignore[method-assign]


class _NoWaitingMethods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITING_METHODS:
            raise HostSync(func.__name__)
        return func(*args, **(kwargs or {}))


class _NoWaitingOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        boolean_index = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _WAITING_OPERATIONS or boolean_index:
            raise HostSync(name)
        return func(*args, **(kwargs or {}))
