"""The ways in which a connection can be made, for tests that hold for each of them."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import pytest

from tests.server.live import LiveServer, live_server

# as `live_server`, with or without TLS
Serving = Callable[..., AbstractAsyncContextManager[LiveServer]]


@pytest.fixture(params=["http", "https"])
def serving(request: Any) -> Serving:
    return partial(live_server, tls=request.param == "https")
