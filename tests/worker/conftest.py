"""What all tests of the worker share."""

from tests.model.conftest import one_compute_thread

__all__ = ["one_compute_thread"]
