"""What a server process does from its start to its end. Knows no route: `app` has them."""

import math
import signal
import socket
from functools import partial
from pathlib import Path

import trio

from llmd.child import ControlChannel
from llmd.config import SECONDS, ServerConfig
from llmd.errors import StartupFailed
from llmd.protocol.control import ChildFailed, ChildReady, Stage
from llmd.server.app import create_app
from llmd.server.context import Server, StateBoard
from llmd.server.engine_client import EngineClient
from llmd.server.exposition import own_figures
from llmd.server.families import without_gauges
from llmd.server.figures import leave_figures, left_before
from llmd.server.health import stage_of
from llmd.server.large_memory import return_large_memory
from llmd.server.metrics import Metrics
from llmd.server.serving import CUT_GRACE, serve
from llmd.server.text_model import load_text_model

# beyond all that an orderly shutdown may take; then the kernel ends this process
_WATCHDOG_MARGIN = 2 * SECONDS
# `--drain-timeout inf` waits for as long as it takes; the kernel counts in 32 bits
_LONGEST_ALARM = (2**31 - 1) * SECONDS


async def run(config: ServerConfig, control: ControlChannel) -> None:
    """Answer HTTP on the inherited sockets until the supervisor says that the system drains, or is gone."""
    return_large_memory()
    server = Server(
        config=config,
        state=StateBoard(),
        engine=EngineClient(config.engine_path),
        metrics=Metrics(config.model.served_names[0], server=str(config.index)),
    )
    tracer = None
    if (endpoint := config.http.otlp_traces_endpoint) is not None:
        # an optional package
        from llmd.server.tracing import Tracer

        tracer = Tracer(endpoint, server.state)
    app = create_app(server, listeners=[tracer.trace] if tracer is not None else [])
    if (before := left_before(config)) is not None:
        server.counted_before = without_gauges(before.counted)
        server.engine.history = before.engine
    sockets = [socket.socket(fileno=fd) for fd in config.listen_fds]
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(control.beat_in_loop)
        nursery.start_soon(server.engine.run)
        nursery.start_soon(leave_figures, config, partial(own_figures, server))
        nursery.start_soon(_follow_state, server, control, stop, nursery)
        nursery.start_soon(_load_text, server, control)
        await serve(app, config.http, sockets=sockets, stop=stop)
        nursery.cancel_scope.cancel()
    if tracer is not None:
        await tracer.flush()


async def _follow_state(server: Server, control: ControlChannel, stop: trio.Event, everything: trio.Nursery) -> None:
    """Keep the state board true, until the supervisor is gone: then nobody needs this process either."""
    while (state := await control.wait_state()) is not None:
        server.state.update(state)
        if state.stage is Stage.READY:
            everything.start_soon(_report_ready, server, control)
        elif state.stage is Stage.FAILED:
            server.engine.fail_all(f"The engine has failed: {state.detail}")
        elif state.stage is Stage.DRAINING and not stop.is_set():
            # unhandled, SIGALRM ends the process even if its event loop is stuck
            signal.alarm(
                math.ceil(min(server.config.http.drain_timeout + CUT_GRACE + _WATCHDOG_MARGIN, _LONGEST_ALARM))
            )
            stop.set()
    everything.cancel_scope.cancel()


async def _load_text(server: Server, control: ControlChannel) -> None:
    """Once the model folder is known and the engine stands, requests may begin."""
    while (folder := server.state.current.model_dir) is None:
        await server.state.wait_changed()
    try:
        server.text = await load_text_model(server.config.model, Path(folder), server.engine)
    except StartupFailed as error:
        # the supervisor decides what becomes of the whole; until then, `/health` goes on telling what it knows
        control.send(ChildFailed(str(error)))
    else:
        await _report_ready(server, control)


async def _report_ready(server: Server, control: ControlChannel) -> None:
    """Tell the supervisor as soon as `/health` says 200, unless something else is missing: then that comes here too."""
    await server.engine.wait_ready()
    if stage_of(server)[0] is Stage.READY:
        control.send(ChildReady())
