"""One thread unless a test says otherwise: two threads on a busy machine wait for each other at every operation."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

# Triton is built for Linux alone; what is proven of its kernels there needs no proof here.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton_*.py"]


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield
