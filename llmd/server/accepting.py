"""Takes new connections off listening sockets, also where files run out for a while. Knows nothing of what they say."""

import errno
import logging
import os
import resource
from collections.abc import Awaitable, Callable, Sequence

import trio

from llmd.config import SECONDS

Serve = Callable[[trio.SocketStream], Awaitable[None]]

# what a connection that waits in the backlog hears when there is no room for it yet
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
RETRY_DELAY = 0.1 * SECONDS
MIN_BETWEEN_COMPLAINTS = 60 * SECONDS

_log = logging.getLogger(__name__)


async def accept_connections(
    listeners: Sequence[trio.abc.Listener[trio.SocketStream]],
    serve: Serve,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve every connection in a task of its own, until cancelled. `serve` closes it, and raises nothing."""
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(_accept, listener, serve, nursery)
        task_status.started()


async def _accept(listener: trio.abc.Listener[trio.SocketStream], serve: Serve, nursery: trio.Nursery) -> None:
    silent_until = trio.current_time()
    async with listener:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                if trio.current_time() >= silent_until:
                    silent_until = trio.current_time() + MIN_BETWEEN_COMPLAINTS
                    _log.error("%s; new connections wait until others end", _complaint(error))
                # others may end meanwhile
                await trio.sleep(RETRY_DELAY)
            else:
                nursery.start_soon(serve, stream)


def _complaint(error: OSError) -> str:
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many open files: {limit} are all that this process may have; raise the limit (ulimit -n)"
    return f"no connection can be accepted: {os.strerror(error.errno or 0).lower()}"
