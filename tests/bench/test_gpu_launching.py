"""Proofs on a device take CPU tensors there and back: what is wrong there is found, what is right is not touched."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is built for Linux alone", allow_module_level=True)

from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.gpu import sanitized
from bench.gpu.launching import launched_on
from tests.kernels.proof.checks import check_numbers, check_rows
from tests.kernels.proof.interpreter import interpreted
from tests.kernels.proof.registry import PROOFS

CPU = torch.device("cpu")
RMS_NORM = next(proof for proof in PROOFS if proof.name == "rms_norm")
LINEAR = next(proof for proof in PROOFS if proof.name == "linear")
ROPE = next(proof for proof in PROOFS if proof.name == "rope_kv_write")


@contextmanager
def device_that(launch: Any) -> Iterator[None]:
    """What runs kernels "on the device": `launch(kernel, arguments, options)`."""
    before = JITFunction.run

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        launch(kernel, args, options)

    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = before  # type: ignore[method-assign]


def addresses(arguments: Mapping[str, Any]) -> set[int]:
    tensors = [value.base if isinstance(value, TensorDescriptor) else value for value in arguments.values()]
    return {tensor.data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)}


def test_cases_hold_on_copies_of_their_tensors() -> None:
    through_descriptors = next(case for case in LINEAR.cases if case.name == "many rows, 8 apart")
    for proof, case in ((RMS_NORM, RMS_NORM.cases[3]), (ROPE, ROPE.cases[1]), (LINEAR, through_descriptors)):
        with interpreted() as launches, launched_on(CPU):
            check_numbers(proof, case)
        (launch,) = launches
        assert not addresses(case.arguments) & addresses(launch.arguments)


def test_a_device_that_writes_nothing_is_found() -> None:
    with device_that(lambda kernel, args, options: None), launched_on(CPU), pytest.raises(AssertionError):
        check_numbers(RMS_NORM, RMS_NORM.cases[3])


def test_a_device_that_changes_an_input_is_found() -> None:
    with interpreted():
        interpret = JITFunction.run

        def launch(kernel: Any, args: Any, options: Any) -> None:
            interpret(kernel, *args, **options)
            args[0].add_(1)

        with device_that(launch), launched_on(CPU), pytest.raises(AssertionError, match="was changed"):
            check_numbers(RMS_NORM, RMS_NORM.cases[3])


def test_a_device_whose_rows_depend_on_one_another_is_found() -> None:
    @contextmanager
    def launching(*, shuffle: int | None) -> Iterator[None]:
        with interpreted(shuffle=shuffle):
            interpret = JITFunction.run

            def launch(kernel: Any, args: Any, options: Any) -> None:
                interpret(kernel, *args, **options)
                next(arg for arg in args[1:] if isinstance(arg, torch.Tensor) and arg.dim() == 2).mul_(len(args[0]))

            with device_that(launch), launched_on(CPU, shuffle=shuffle):
                yield

    with pytest.raises(AssertionError, match="numbers differ"):
        check_rows(RMS_NORM.rows[0], launching)


def test_the_program_for_the_sanitizer_checks_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[float] = []
    monkeypatch.setattr(sanitized, "check_numbers", lambda proof, case: errors.append(check_numbers(proof, case)))
    sanitized.main(["cpu"])
    # a small error, and not none: something was computed
    assert [0 < error < 0.1 for error in errors] == [True]
