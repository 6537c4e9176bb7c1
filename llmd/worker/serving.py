"""The rank's loop: plans in, results out, in order. The next plan is launched before the result of the one before is
waited for. Knows nothing of models and devices.
"""

import select
import socket
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.steps import EngineToWorker, RankReady
from llmd.worker.runner import MAX_STEPS_IN_FLIGHT, PendingStep, Runner

_RECEIVE_SIZE = 1 << 18  # bytes


def serve_engine(runner: Runner, engine: socket.socket, ready: RankReady) -> None:
    """Run the plans that come, until the engine is gone. Raises what a step raises.

    A second thread waits for results and sends them, so that this one launches a plan the moment it comes.
    """
    decoder: FrameDecoder[EngineToWorker] = FrameDecoder(EngineToWorker)
    in_flight: deque[Future[None]] = deque()
    woken, waker = socket.socketpair()
    # an engine that is gone is the end, whether we read or write when we find out
    with woken, waker, ThreadPoolExecutor(1, thread_name_prefix="results") as results, suppress(ConnectionError):
        # its thread begins now: what an idle rank holds is the same before its first step and after
        results.submit(lambda: None)
        engine.sendall(encode_frame(ready))
        while data := _receive(runner, engine, in_flight, woken):
            for plan in decoder.feed(data):
                while len(in_flight) >= MAX_STEPS_IN_FLIGHT:
                    in_flight.popleft().result()
                answer = results.submit(_answer, engine, runner.launch(plan))
                answer.add_done_callback(lambda _: waker.sendall(b"\0"))
                in_flight.append(answer)
        for answer in in_flight:
            answer.result()


def _receive(runner: Runner, engine: socket.socket, in_flight: deque[Future[None]], woken: socket.socket) -> bytes:
    """Wait for what the engine sends next; while no step is in flight, the runner prepares itself for later ones."""
    can_prepare = True
    while True:
        is_idle = all(answer.done() for answer in in_flight)
        readable, _, _ = select.select([engine, woken], [], [], 0 if is_idle and can_prepare else None)
        if engine in readable:
            return engine.recv(_RECEIVE_SIZE)
        if woken in readable:
            woken.recv(_RECEIVE_SIZE)
        else:
            can_prepare = runner.prepare()


def _answer(engine: socket.socket, step: PendingStep) -> None:
    try:
        engine.sendall(encode_frame(step.result()))
    except BaseException:
        # wakes the thread that waits for plans: it hears the error from this answer's future
        with suppress(OSError):
            engine.shutdown(socket.SHUT_RDWR)
        raise
