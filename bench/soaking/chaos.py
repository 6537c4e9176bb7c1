"""What befalls the server's processes while it works. The seed says what comes, in which order and at which pace."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from random import Random
from signal import SIGCONT, SIGKILL, SIGSTOP
from time import perf_counter

from soaking import troublemakers
from soaking.clients import Clients
from soaking.health import Health
from soaking.report import Report
from soaking.server import ServerUnderTest, client_ports, send_signal

_ENGINE, _WORKER, _SERVER = "llmd.engine", "llmd.worker", "llmd.server"
_ENGINE_SIDE = (_ENGINE, _WORKER)

# from one event to the next, once the server is ready again; seconds
MIN_GAP, MAX_GAP = 0.5, 4.0

Event = Callable[[Random], Awaitable[None]]


class Chaos:
    """All that can happen, by name."""

    def __init__(
        self,
        server: ServerUnderTest,
        *,
        clients: Clients,
        health: Health,
        door: troublemakers.Door,
        report: Report,
        num_overloading: int,
    ) -> None:
        self._server = server
        self._clients = clients
        self._health = health
        self._door = door
        self._report = report
        self._num_overloading = num_overloading
        self.events: dict[str, Event] = {
            "kill engine": self._kill_engine,
            "kill worker": self._kill_worker,
            "kill both": self._kill_both,
            "kill three times": self._kill_in_a_row,
            "kill while it restarts": self._kill_while_it_restarts,
            "stall": self._stall,
            "hang": self._hang,
            "kill server": self._kill_server,
            "storm": self._storm,
            "overload": self._overload,
            "nonsense": self._nonsense,
            "slow readers": self._slow_readers,
        }

    async def run(self, schedule: Iterator[tuple[float, str, Random]], *, until: float) -> None:
        """One event after the other until the time has come (on `perf_counter`); the last one is finished."""
        for gap, kind, random in schedule:
            # whoever kills engines before they have given anybody a token makes innocent requests suspect
            await self._health.wait_ready()
            await self._health.wait_recovered()
            await asyncio.sleep(gap)
            if perf_counter() >= until:
                return
            self._report.chaos[kind] += 1
            await self.events[kind](random)

    async def _kill_engine(self, random: Random) -> None:
        await self._kill_and_wait(_ENGINE)

    async def _kill_worker(self, random: Random) -> None:
        await self._kill_and_wait(_WORKER)

    async def _kill_both(self, random: Random) -> None:
        await self._kill_and_wait(*_ENGINE_SIDE)

    async def _kill_in_a_row(self, random: Random) -> None:
        """Each new engine dies soon after its first tokens."""
        for _ in range(3):
            await self._kill_and_wait(random.choice(_ENGINE_SIDE))
            await self._health.wait_recovered()
            await asyncio.sleep(random.uniform(0, 0.3))

    async def _kill_while_it_restarts(self, random: Random) -> None:
        """The next ones die before they are ready. Twice at most: a third time would be hopeless, and it says so."""
        restarts = self._health.restarts
        victim = self._kill(_WORKER)
        num_more = random.randrange(1, 3)
        for _ in range(num_more):
            while not (workers := self._server.pids(_WORKER)) or workers[-1] == victim:
                await asyncio.sleep(0.01)
            await asyncio.sleep(random.uniform(0, 0.5))
            victim = self._kill(_WORKER)
        await self._health.wait_ready(restarts=restarts + 1 + num_more)

    async def _stall(self, random: Random) -> None:
        """Half a second of silence is no death."""
        for pid in self._server.pids(random.choice(_ENGINE_SIDE)):
            send_signal(pid, SIGSTOP)
            try:
                await asyncio.sleep(0.5)
            finally:
                send_signal(pid, SIGCONT)

    async def _hang(self, random: Random) -> None:
        """Silence for good must be noticed, and the process replaced."""
        restarts = self._health.restarts
        for pid in self._server.pids(random.choice(_ENGINE_SIDE)):
            self._health.note_end("hang")
            send_signal(pid, SIGSTOP)
        await self._health.wait_ready(restarts=restarts + 1)

    async def _kill_server(self, random: Random) -> None:
        """Its own clients are cut, and counted as such; which ones, the kernel knows. Everyone else must go on."""
        pid = random.choice(self._server.pids(_SERVER))
        # it must not accept one more between the look and the end
        send_signal(pid, SIGSTOP)
        self._clients.note_cut(client_ports(pid))
        self._health.last_server_death = perf_counter()
        send_signal(pid, SIGKILL)
        self._health.last_server_death = perf_counter()
        while pid in self._server.pids(_SERVER):
            await asyncio.sleep(0.01)

    async def _storm(self, random: Random) -> None:
        await troublemakers.storm(self._door, self._clients.questions, self._report, random)

    async def _nonsense(self, random: Random) -> None:
        await troublemakers.talk_nonsense(self._door, self._report, random)

    async def _slow_readers(self, random: Random) -> None:
        await troublemakers.read_slowly(self._door, self._clients.questions[-1], self._report, random)

    async def _overload(self, random: Random) -> None:
        await self._clients.overload(random, self._num_overloading)

    async def _kill_and_wait(self, *modules: str) -> None:
        restarts = self._health.restarts
        for module in modules:
            self._kill(module)
        await self._health.wait_ready(restarts=restarts + 1)

    def _kill(self, module: str) -> int | None:
        """The process that died, if there was one."""
        for pid in reversed(self._server.pids(module)):
            self._health.note_end("kill")
            if send_signal(pid, SIGKILL):
                return pid
        return None


def schedule(seed: str, kinds: list[str]) -> Iterator[tuple[float, str, Random]]:
    """(gap, kind, randomness of the event), without an end: rounds in which each kind comes once."""
    random = Random(f"{seed} chaos")
    while True:
        for kind in random.sample(kinds, len(kinds)):
            yield random.uniform(MIN_GAP, MAX_GAP), kind, Random(random.randbytes(16))
