"""Stage: what this device is, and what it can do at most: memory, matrix products, start of a process."""

import platform
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from bench.gpu.machine import Call, Machine
from bench.gpu.results import Recorder, Values
from bench.gpu.timing import time_calls, time_made

COPY = "copy bandwidth"
MATRIX = "matrix product, square"


def measure(machine: Machine, recorder: Recorder, *, torch_import: float, context: float) -> None:
    """torch_import, context: seconds that this process took for them."""
    recorder.row("versions", lambda: {**_versions(), **machine.describe()})
    recorder.row("start of a process", lambda: {"import torch s": torch_import, "context s": context})
    for name, make, share in (
        (COPY, _copy, 2),
        ("read bandwidth", _read, 1),
        ("write bandwidth", _write, 1),
    ):
        recorder.row(name, lambda make=make, share=share: _bandwidth(machine, make, share))
    for name, (num_inputs, num_outputs) in machine.sizes.model.linears.items():
        tokens = machine.sizes.linear_tokens[-1]
        recorder.row(
            f"matrix product, {name}, {tokens} tokens",
            lambda shape=(tokens, num_inputs, num_outputs): _matrix_product(machine, *shape),
        )
    square = machine.sizes.square
    recorder.row(MATRIX, lambda: _matrix_product(machine, square, square, square))


def _versions() -> Values:
    return {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}


def _bandwidth(machine: Machine, make: Callable[[Tensor, Tensor], Call], share: int) -> Values:
    """share: how many times the buffer's bytes move."""
    source, target = torch.randn(2, machine.sizes.stream_bytes // 8, device=machine.device).unbind(0)
    seconds = time_calls(machine, [make(source, target)]).seconds
    return {"GB/s": share * source.numel() * 4 / seconds / 1e9}


def _copy(source: Tensor, target: Tensor) -> Call:
    return lambda: target.copy_(source)


def _read(source: Tensor, target: Tensor) -> Call:
    return lambda: source.sum()


def _write(source: Tensor, target: Tensor) -> Call:
    return lambda: target.fill_(1.5)


def _matrix_product(machine: Machine, num_tokens: int, num_inputs: int, num_outputs: int) -> Values:
    def make(seed: int) -> Call:
        x = torch.randn(num_tokens, num_inputs, device=machine.device, dtype=torch.bfloat16)
        weight = torch.randn(num_outputs, num_inputs, device=machine.device, dtype=torch.bfloat16)
        return lambda: torch.mm(x, weight.t())

    timing = time_made(machine, make, num_bytes=2 * num_inputs * (num_tokens + num_outputs))
    return {"TFLOP/s": 2 * num_tokens * num_inputs * num_outputs / timing.seconds / 1e12, "timing": timing.how}
