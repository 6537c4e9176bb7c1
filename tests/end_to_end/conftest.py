"""What all tests of whole servers share."""

from tests.model.conftest import one_compute_thread

__all__ = ["one_compute_thread"]
