"""The engine process: `python -m llmd.engine CONTROL_FD`. Wires sockets to the step loop; decides nothing."""

import logging
import socket
import sys

import trio

from llmd.child import ControlChannel, connect_control
from llmd.config import EngineConfig
from llmd.engine.loop import EngineLoop
from llmd.engine.ranks import RankLost, connect_ranks
from llmd.engine.scheduler import Scheduler
from llmd.log import configure_logging
from llmd.protocol.control import ChildReady
from llmd.protocol.generation import EngineReady


def main() -> None:
    """Serve until the supervisor closes the control socket. Exits with 1 when a rank is lost."""
    config, control = connect_control(int(sys.argv[1]), EngineConfig)
    configure_logging(config.log, process="engine")
    try:
        trio.run(run_engine, config, control)
    except BaseExceptionGroup as group:
        lost, others = group.split(RankLost)
        if lost is None or others is not None:
            raise
        logging.getLogger("llmd.engine").error("%s", _first(lost))
        sys.exit(1)


async def run_engine(config: EngineConfig, control: ControlChannel) -> None:
    """Wait for the ranks, then serve servers until the control socket closes."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(control.beat_in_loop)
        nursery.start_soon(_cancel_when_closed, control, nursery.cancel_scope)
        streams = [trio.SocketStream(_inherited(fd)) for fd in config.rank_fds]
        ranks = await connect_ranks(streams, step_timeout=config.step_timeout)
        scheduler = Scheduler(
            config.cache, config.scheduler, num_blocks=ranks.num_blocks, max_model_len=ranks.max_model_len
        )
        ready = EngineReady(
            max_model_len=scheduler.max_model_len,
            block_size=config.cache.block_size,
            num_blocks=ranks.num_blocks,
            vocab_size=ranks.vocab_size,
        )
        loop = EngineLoop(scheduler, ranks, ready=ready)
        nursery.start_soon(loop.run)
        listener = trio.SocketListener(_inherited(config.server_listen_fd))
        await nursery.start(trio.serve_listeners, loop.serve, [listener])
        control.send(ChildReady(num_blocks=ranks.num_blocks))


async def _cancel_when_closed(control: ControlChannel, scope: trio.CancelScope) -> None:
    await control.wait_closed()
    scope.cancel()


def _inherited(fd: int) -> trio.socket.SocketType:
    return trio.socket.from_stdlib_socket(socket.socket(fileno=fd))


def _first(error: BaseException) -> BaseException:
    """The first plain exception of a tree of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    main()
