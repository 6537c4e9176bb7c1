"""Run Triton kernels on CPU tensors, program by program, with every address watched.

Kernels stay as they are compiled for a device: inside of `interpreted()` launching one runs its Python body on numpy
instead. Works in the same process as the compiler and needs no environment variable. Knows no particular kernel.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda, libdevice
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.proof.builder import Builder
from tests.kernels.proof.memory import Memory
from tests.kernels.proof.small_floats import is_small_float
from tests.kernels.proof.turns import run_in_turns

MATH = {"tanh": np.tanh, "exp": np.exp, "log1p": np.log1p, "rint": np.rint, "pow": np.power}
# Programmatic dependent launch orders a kernel after the one before it: here they never overlap.
NO_OPERATIONS = ("gdc_wait", "gdc_launch_dependents")


@dataclass(frozen=True)
class Launch:
    """One kernel that ran: its arguments by name, and what it did to memory."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    memory: Memory

    def unwritten(self, name: str) -> int:
        """How many numbers of a contiguous argument no program has stored."""
        tensor: Tensor = self.arguments[name]
        if tensor.numel() == 0:
            return 0
        region = self.memory.region(name)
        first = (tensor.data_ptr() - region.start) // region.unit
        size = tensor.numel() * tensor.element_size() // region.unit
        return int((region.writer[first : first + size] < 0).sum())


@contextmanager
def interpreted(
    *, shuffle: int | None = None, check_overflow: bool = False, in_turns: bool = False
) -> Iterator[list[Launch]]:
    """Inside, `kernel[grid](...)` runs here, on CPU tensors; yields the list of launches, which grows.

    `shuffle`: a seed for the order of programs; None: rising. `check_overflow`: integers that overflow are errors
    (slower by a quarter). `in_turns`: programs may wait for one another, each gives its turn away at every atomic;
    else one runs after another. What `torch.empty` gives is poisoned (NaN, largest integer). Raises
    OutOfBounds, Race and Deadlock.
    """
    launches: list[Launch] = []

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        launches.append(_launch(kernel, args, options, grid, shuffle, check_overflow, in_turns))

    def call(function: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
        return _rewritten(function.fn)(*args, **kwargs)

    scope = stock._LangPatchScope()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    with np.errstate(all="ignore"):
        scope.set_attr(JITFunction, "run", run)
        scope.set_attr(JITFunction, "__call__", call)
        # Only with deterministic algorithms does torch fill what it allocates.
        torch.use_deterministic_algorithms(True)
        try:
            yield launches
        finally:
            torch.use_deterministic_algorithms(was_deterministic)
            scope.restore()


def _launch(
    kernel: JITFunction[Any],
    args: Any,
    options: Any,
    grid: Any,
    shuffle: int | None,
    check_overflow: bool,
    in_turns: bool,
) -> Launch:
    parameters = {p.name: p for p in kernel.params}
    bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in options.items() if k in parameters})
    bound.apply_defaults()
    sizes = grid(bound.arguments) if callable(grid) else grid
    num_x, num_y, num_z = (*sizes, 1, 1, 1)[:3]
    pointers = {
        name: value.base if isinstance(value, TensorDescriptor) else value for name, value in bound.arguments.items()
    }
    tensors = {name: value for name, value in pointers.items() if isinstance(value, Tensor)}
    memory = Memory(tensors, num_x * num_y * num_z)
    builder = Builder(memory, check_overflow=check_overflow)
    builder.set_grid_dim(num_x, num_y, num_z)
    programs = list(itertools.product(range(num_x), range(num_y), range(num_z)))
    if shuffle is not None:
        np.random.default_rng(shuffle).shuffle(programs)
    with _language_of(builder):
        converted = {
            name: value if parameters[name].is_constexpr else stock._implicit_cvt(value)
            for name, value in bound.arguments.items()
        }
        body = _rewritten(kernel.fn)

        def run(program: tuple[int, int, int], give_turn: Callable[[], None] | None) -> None:
            def wait() -> None:
                if give_turn is not None:
                    give_turn()
                    start()

            def start() -> None:
                builder.set_grid_idx(*(int(index) for index in program))
                builder.before_atomic = wait

            with np.errstate(all="ignore"):
                start()
                body(**converted)

        if in_turns:
            run_in_turns([functools.partial(run, program) for program in programs], seed=shuffle)
        else:
            for program in programs:
                run(program, None)
    return Launch(kernel.fn.__name__, (num_x, num_y, num_z), dict(bound.arguments), memory)


@contextmanager
def _language_of(builder: Builder) -> Iterator[None]:
    """Let triton.language act on `builder`, for one launch with all the functions that the kernel calls."""
    outer = stock._LangPatchScope()
    outer.set_attr(stock, "interpreter_builder", builder)
    outer.set_attr(stock, "interpreter_semantic", stock.TritonSemantic(builder))
    modules = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scope = stock._patch_lang(modules)
    try:
        # Loops are bounded by tensors of one number, which int() refuses from numpy 2.4 on.
        scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())
        scope.set_attr(stock.ReduceScanOpInterface, "apply", _reduce)
        for name, member in list(vars(tl.tensor).items()):
            if isinstance(member, JITFunction):
                scope.set_attr(tl.tensor, name, _method(member))
        for module in (libdevice, cuda):
            for name, replacement in _replacements(module).items():
                scope.set_attr(module, name, replacement)
        # Only while a kernel runs: one that is defined meanwhile would be Triton's own interpreted function.
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            yield
    finally:
        scope.restore()
        outer.restore()


def _reduce(operation: stock.ReduceScanOpInterface, inputs: Any, apply: Any = stock.ReduceScanOpInterface.apply) -> Any:
    """Stock Triton reduces what stores small floats as if it were integers."""
    for tensor in inputs if isinstance(inputs, tuple) else (inputs,):
        if is_small_float(tensor.dtype):
            raise TypeError(f"a reduction of {tensor.dtype} is rounded at every step: widen to float32 first")
    return apply(operation, inputs)


def _method(function: JITFunction[Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


@functools.cache
def _rewritten(function: FunctionType) -> Callable[..., Any]:
    return _Rewriter(function).rewrite_ast()  # type: ignore[no-any-return]


class _Rewriter(stock.FunctionRewriter):  # type: ignore[misc]
    """Turns every assigned number into a tensor, as the compiler does, and leaves the kernel's module untouched."""

    def _compile_and_exec(self, tree: Any) -> Any:
        # Triton 3.9 writes chained comparisons with a class of its own.
        names = {name: value for name, value in vars(stock).items() if name.startswith("_Interpreter")}
        names |= self.fn.__globals__
        for module in (libdevice, cuda):
            for name, replacement in _replacements(module).items():
                if names.get(name) is getattr(module, name):
                    names[name] = replacement
        names["interpreter_semantic"] = _CurrentSemantic()
        exec(compile(tree, self.filename, "exec"), names)
        return names[self.fn.__name__]


class _CurrentSemantic:
    """The semantic of the launch that runs now; a function is rewritten once and launched many times."""

    def to_tensor(self, value: Any, check_type: bool) -> Any:
        return stock.interpreter_semantic.to_tensor(value, check_type)


@functools.cache
def _replacements(module: Any) -> dict[str, Callable[..., Any]]:
    """What needs a device in `module`, and what does the same on a CPU."""
    found: dict[str, Callable[..., Any]] = {
        name: _elementwise(function) for name, function in MATH.items() if hasattr(module, name)
    }
    found |= {name: lambda *_, **__: None for name in NO_OPERATIONS if hasattr(module, name)}
    return found


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*operands: Any, _semantic: Any = None) -> Any:
        first = operands[0]
        data = function(*(operand.handle.data for operand in operands)).astype(first.handle.data.dtype)
        return tl.tensor(stock.TensorHandle(data, first.handle.dtype), first.type)

    return apply
