"""Ranks that meet in one launch: faults planted into how they meet, call after call, and programs that never meet."""

import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llmd_kernels.all_reduce_add_rms_norm import triton_ops
from tests.kernels.proof.interpreter import interpreted
from tests.kernels.proof.memory import OutOfBounds, Race
from tests.kernels.proof.operations.all_reduce_add_rms_norm import all_reduce_add_rms_norm, arguments, memory_of_all
from tests.kernels.proof.turns import Deadlock, run_in_turns

FAULTS = {
    "nobody waits": ("- call < 0", "- call < -1"),
    "flags say nothing of the parts": ('sem="release"', 'sem="relaxed"'),
    "parts are read before the flags": ('sem="acquire"', 'sem="relaxed"'),
    "one flag for all programs": ("+ program * NUM_RANKS + rank", "+ rank"),
    "the last rank is not told": ("theirs = tl.load(flag_addresses + other)", "theirs = tl.load(flag_addresses + other // 2)"),  # noqa: E501
    "the call is not counted": ("tl.load(own_flags + rank) + 1", "tl.load(own_flags + rank)"),
    "other order of ranks": ("part_addresses + rank", "part_addresses + NUM_RANKS - 1 - rank"),
    "a rank counts twice": ("part_addresses + rank", "part_addresses + rank // 2 * 2"),
    "always the same half": ("memory.parts[turn]", "memory.parts[0]"),
    "rows of another rank": ("first = local_rank.to(tl.int64) * num_rows", "first = 0 * local_rank.to(tl.int64)"),
}  # fmt: skip


def expected(given: dict[str, Any]) -> Tensor:
    """The new residual, to the bit."""
    total = torch.zeros(given["residual"].shape)
    for part in given["x"]:
        total = total + part.float()
    return (total + given["residual"].float()).to(given["x"].dtype)


def check(ops: ModuleType) -> None:
    """Three calls with the same memory; raises AssertionError, OutOfBounds, Race or Deadlock."""
    given = arguments(3, 2, 600, torch.float32)
    memory = None
    for call in range(3):
        given["x"] = given["x"] + call
        with interpreted(in_turns=True, shuffle=call):
            memory = memory or memory_of_all(3, 1200, torch.float32, torch.device("cpu"))
            _, new_residual = all_reduce_add_rms_norm(**given, memory=memory, turn=call % 2, ops=ops)
        assert torch.equal(new_residual, expected(given)), call


def test_sums_are_exact_call_after_call() -> None:
    check(triton_ops)


@pytest.mark.parametrize(("right", "wrong"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(right: str, wrong: str, tmp_path: Path) -> None:
    source = Path(str(triton_ops.__file__)).read_text()
    assert right in source
    path = tmp_path / "with_a_fault.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises((AssertionError, OutOfBounds, Race, Deadlock)):
        check(module)


def test_calls_are_counted_beyond_the_largest_integer() -> None:
    given = arguments(2, 1, 8, torch.bfloat16)
    memory = memory_of_all(2, 8, torch.bfloat16, torch.device("cpu"))
    memory.flags.fill_(2**31 - 1)
    with interpreted(in_turns=True):
        _, new_residual = all_reduce_add_rms_norm(**given, memory=memory)
    assert torch.equal(new_residual, expected(given))
    assert memory.flags[0].tolist() == [-(2**31)] * 2


def test_what_does_not_fit_is_refused() -> None:
    given, memory = arguments(2, 3, 8, torch.bfloat16), memory_of_all(2, 16, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ValueError, match="3 × 8 numbers do not fit in symmetric memory for 16"):
        all_reduce_add_rms_norm(**given, memory=memory)


def test_programs_run_one_at_a_time_until_all_have_ended() -> None:
    seen: list[tuple[str, int]] = []

    def program(give_turn: Any, name: str, times: int) -> None:
        for count in range(times):
            seen.append((name, count))
            give_turn()

    run_in_turns([partial(program, name="a", times=3), partial(program, name="b", times=1)])
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("a", 2)]


def test_programs_that_never_meet_are_found_and_ended() -> None:
    def waits(give_turn: Any) -> None:
        while True:
            give_turn()

    def fails(give_turn: Any) -> None:
        give_turn()
        raise KeyError("reason")

    with pytest.raises(Deadlock, match="2 programs wait for one another"):
        run_in_turns([waits, lambda give_turn: None, waits])
    with pytest.raises(KeyError, match="reason"):
        run_in_turns([waits, fails])
