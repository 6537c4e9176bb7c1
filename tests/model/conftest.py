"""What all tests of the model share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_compute_thread() -> Iterator[None]:
    """Tiny operations gain nothing from a second thread, and where cores are busy they wait for it: 0.5 s or 15 s."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
