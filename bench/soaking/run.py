"""A whole soak, from the first start to the last process: `soak(settings)` gives the report."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from signal import SIGTERM
from time import perf_counter

from soaking.chaos import Chaos, schedule
from soaking.clients import READ_TIMEOUT, Clients
from soaking.health import Health
from soaking.questions import mixed_questions
from soaking.report import Held, Report, growth
from soaking.server import ServerUnderTest, send_signal
from soaking.troublemakers import Door

# small enough that a burst of requests fills the queue, and that a hang is noticed soon; those of the caller win
_OWN_FLAGS = ("--max-num-queued-reqs", "48", "--drain-timeout", "120", "--hang-timeout", "5")
_SETTLE_TIMEOUT = 30.0  # seconds until an idle server holds no more than before
_MAX_LONG_PROMPT = 3000  # characters
_ROOM_FOR_ANSWERS = 150  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a soak does. `output` takes the server's log, and every answer that was different."""

    seconds: float
    output: Path
    concurrency: int = 24
    seed: int = 1
    num_tokens: int = 40  # of most answers
    kinds: tuple[str, ...] = ()  # of chaos; empty: all
    server_flags: list[str] = field(default_factory=list)


async def soak(settings: Settings) -> Report:
    """Run it. Raises RuntimeError if the server does not start."""
    report = Report(seed=settings.seed)
    server = ServerUnderTest([*_OWN_FLAGS, *settings.server_flags], folder=settings.output)
    try:
        await server.wait_url()
        health = Health(server.url, report)
        clients = Clients(server.url, report, output=settings.output, on_token=health.note_token)
        async with _running(health.watch()):
            await health.wait_ready()
            clients.questions = mixed_questions(num_tokens=settings.num_tokens, long_prompt=await _long_prompt(health))
            await clients.learn()
            report.held_before = await _hold_while_idle(server, health)
            try:
                await _load(_chaos(server, clients, health, report, settings), clients, report, settings)
                await _settle(server, health, report)
            except* (RuntimeError, TimeoutError) as group:
                report.broken_off = [str(error) or repr(error) for error in group.exceptions]
        await clients.drained_wave(settings.concurrency, lambda: _terminate(server))
        report.exit_status = await server.wait_end()
        await clients.http.aclose()
        report.processes_left = server.processes_left()
        report.files_left = [str(path) for path in server.temporary.iterdir()]
    finally:
        server.kill_session()
    return report


def _chaos(server: ServerUnderTest, clients: Clients, health: Health, report: Report, settings: Settings) -> Chaos:
    host, port = server.address
    tls = _any_certificate() if server.url.startswith("https") else None
    return Chaos(
        server,
        clients=clients,
        health=health,
        door=Door(host, port, tls),
        report=report,
        num_overloading=settings.concurrency,
    )


async def _load(chaos: Chaos, clients: Clients, report: Report, settings: Settings) -> None:
    """Clients and chaos for the given time; then the clients may finish."""
    kinds = list(settings.kinds or chaos.events)
    # in the second half no server process dies, so that it can be seen whether one grows
    kinds_later = [kind for kind in kinds if kind != "kill server"]
    started = perf_counter()
    async with asyncio.timeout(settings.seconds + 2 * READ_TIMEOUT), asyncio.TaskGroup() as group:
        for number in range(settings.concurrency):
            group.create_task(clients.keep_asking(Random(f"{settings.seed} client {number}")))
        await chaos.run(schedule(f"{settings.seed} 1", kinds), until=started + settings.seconds / 2)
        await chaos.run(schedule(f"{settings.seed} 2", kinds_later), until=started + settings.seconds)
        clients.finish()
    report.duration = perf_counter() - started


async def _hold_while_idle(server: ServerUnderTest, health: Health) -> Held:
    """What its processes hold with nothing to do. The least of some looks: the question itself takes a connection."""
    await _wait_idle(health)
    looks = []
    for _ in range(8):
        looks.append(server.holdings())
        await asyncio.sleep(0.2)
    return min(looks, key=lambda held: sum(each.num_fds for processes in held.values() for each in processes))


async def _settle(server: ServerUnderTest, health: Health, report: Report) -> None:
    """The load is gone: what is held now, after a while in which idle threads and connections may end."""
    await health.wait_ready()
    report.restarts = health.restarts
    gauges = await _wait_idle(health)
    report.num_open = gauges["num_requests_running"] + gauges["num_requests_waiting"]
    report.num_blocks_away = round(gauges["kv_cache_usage_perc"] * gauges["num_gpu_blocks"])
    until = perf_counter() + _SETTLE_TIMEOUT
    while True:
        report.held_after = await _hold_while_idle(server, health)
        if not list(growth(report.held_before, report.held_after)) or perf_counter() > until:
            return


async def _wait_idle(health: Health) -> dict[str, float]:
    """The engine's gauges, once it has nothing to do or does not become so."""
    until = perf_counter() + _SETTLE_TIMEOUT
    while True:
        gauges = await health.gauges()
        is_idle = gauges["num_requests_running"] == gauges["num_requests_waiting"] == gauges["kv_cache_usage_perc"] == 0
        if is_idle or perf_counter() > until:
            return gauges
        await asyncio.sleep(0.2)


async def _long_prompt(health: Health) -> str:
    """A text that fits the model's context with an answer, whatever its tokenizer makes of it."""
    num_characters = min(_MAX_LONG_PROMPT, await health.max_model_len() - _ROOM_FOR_ANSWERS)
    return " ".join(f"{number} green bottles" for number in range(num_characters))[:num_characters]


def _terminate(server: ServerUnderTest) -> None:
    send_signal(server.process.pid, SIGTERM)


def _any_certificate() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@asynccontextmanager
async def _running(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """It runs for as long as the block lasts."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
