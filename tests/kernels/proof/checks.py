"""What is proven of a kernel on a CPU: its numbers, whole outputs, the bytes it moves, bits without neighbours.

Says what a proof is made of; the operations' own proofs are in `operations/`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.kernels.proof.interpreter import Launch, interpreted

# Relative and absolute: a rounding to the dtype and a few of float32, which devices take with approximate functions.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2, torch.float8_e4m3fn: 0.07}
TRAFFIC_TOLERANCE = 0.05

Operation = Callable[..., Tensor | tuple[Tensor, ...]]
# Makes kernels run somewhere, as `interpreted` does: called with a seed for the order of programs, or None.
Launching = Callable[..., AbstractContextManager[object]]


@dataclass(frozen=True)
class Case:
    """One call of an operation with CPU tensors, and what must be true of it."""

    name: str
    arguments: Mapping[str, Any]
    # Arguments that are written in place: results, like what is returned.
    in_place: Sequence[str] = ()
    # The kernels' arguments that must be stored whole, by each kernel that has them.
    outputs: Sequence[str] = ()
    # What `cost.py` says must move, or None where the case is too small to say; and which of the kernel's arguments
    # every program reads again, from a cache: they count once.
    bytes_moved: int | None = None
    shared_inputs: Sequence[str] = ()
    # Programs wait for one another.
    in_turns: bool = False


@dataclass(frozen=True)
class Rows:
    """An operation on rows that must not know of one another: `run(ids)` gives the results of these rows alone."""

    name: str
    num_rows: int
    run: Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Configuration:
    """One launch as it ships: `call` launches it with tensors without memory (device "meta")."""

    name: str
    call: Callable[[], Any]
    # The architectures that it ships for; none: all.
    archs: Sequence[str] = ()
    # The least part of loaded bytes that comes in wide loads, see `Listing.vector_share`: of the loops that load, or
    # of the whole kernel where none does; numbers that a program loads one by one do not count.
    vector_share: float = 0.9
    # The main loop loads by descriptors alone.
    by_descriptors: bool = False
    # Kernels of which less is asked, because they load little, and how much.
    narrow: Mapping[str, float] = field(default_factory=dict)
    # For each architecture what the name of a matrix instruction must begin with, in one of the launched kernels.
    matrix: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Proof:
    """All that is proven of one operation."""

    operation: Operation
    reference: Operation
    cases: Sequence[Case]
    rows: Sequence[Rows]
    configurations: Sequence[Configuration]

    @property
    def name(self) -> str:
        return self.operation.__name__


@dataclass(frozen=True)
class Outcome:
    """What a case showed, for the table."""

    error: float  # the largest, relative to 1 + |expected|
    traffic: float | None  # bytes moved / bytes_moved of the cost model


def check_case(proof: Proof, case: Case, *, shuffle: int | None = 1) -> Outcome:
    """In the interpreter. Raises AssertionError, OutOfBounds or Race."""
    with interpreted(shuffle=shuffle, check_overflow=True, in_turns=case.in_turns) as launches:
        error = check_numbers(proof, case)
    for name in case.outputs:
        storing = [launch for launch in launches if name in launch.arguments]
        assert storing or not launches, f"{case.name}: no kernel has an argument {name}"
        for launch in storing:
            unwritten = launch.unwritten(name)
            assert unwritten == 0, f"{case.name}: {unwritten} numbers of {name} were never written"
    return Outcome(error, _check_traffic(case, launches))


def check_numbers(proof: Proof, case: Case) -> float:
    """The largest error, relative to 1 + |expected|, wherever kernels run now. Raises AssertionError."""
    given = _copied(case.arguments, _same_layout)
    results = _results(proof.operation(**given), given, case.in_place)
    exact = _copied(case.arguments, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    expected = _results(proof.reference(**exact), exact, case.in_place)
    error = 0.0
    for result, truth in zip(results, expected, strict=True):
        # Integers have none: they must be equal.
        tolerance = TOLERANCES.get(result.dtype, 0.0)
        torch.testing.assert_close(result.double(), truth.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
        if truth.numel():
            error = max(error, ((result.double() - truth).abs() / (1 + truth.abs())).nan_to_num().max().item())
    for name, value in case.arguments.items():
        if isinstance(value, Tensor) and name not in case.in_place:
            changed = (given[name] != value) & ~(given[name].isnan() & value.isnan())
            assert not changed.any(), f"{case.name}: the input {name} was changed"
    return error


def check_rows(rows: Rows, launching: Launching = interpreted) -> None:
    """Any rows, in any order, in any order of programs, alone or with all others: the same bits."""
    everything, *subsets = sets_of(rows)
    expected = _run(rows, everything, launching)
    for shuffle, ids in enumerate(subsets):
        for result, truth in zip(_run(rows, ids, launching, shuffle=shuffle), expected, strict=True):
            differing = (result.double() != truth[ids].double()).sum().item()
            assert differing == 0, f"{rows.name}: {differing} numbers differ for rows {ids.tolist()}"


def sets_of(rows: Rows) -> list[Tensor]:
    """The ids that are run together: all, then others."""
    everything = torch.arange(rows.num_rows)
    some = torch.randperm(rows.num_rows, generator=torch.Generator().manual_seed(0))
    return [everything, everything[:1], everything[-1:], some, some[: rows.num_rows // 2], everything[1:]]


def _run(rows: Rows, ids: Tensor, launching: Launching, *, shuffle: int | None = None) -> tuple[Tensor, ...]:
    with launching(shuffle=shuffle):
        return rows.run(ids)


def _copied(arguments: Mapping[str, Any], copy: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: copy(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _same_layout(tensor: Tensor) -> Tensor:
    """A copy with the same strides, and the same numbers between its own."""
    storage = tensor.untyped_storage().clone()
    return tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _results(returned: Tensor | tuple[Tensor, ...], arguments: dict[str, Any], in_place: Sequence[str]) -> list[Tensor]:
    outputs = returned if isinstance(returned, tuple) else (returned,)
    return [*outputs, *(arguments[name] for name in in_place)]


def _check_traffic(case: Case, launches: Sequence[Launch]) -> float | None:
    if case.bytes_moved is None:
        return None
    moved = 0
    for launch in launches:
        for region in launch.memory.regions:
            is_shared = any(name in case.shared_inputs for name in region.name.split(" + "))
            moved += region.stored + (region.distinct_loaded if is_shared else region.loaded)
    ratio = moved / case.bytes_moved
    assert abs(ratio - 1) <= TRAFFIC_TOLERANCE, f"{case.name}: moves {ratio:.3f} of what cost.py says ({moved} bytes)"
    return ratio
