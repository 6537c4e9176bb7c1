"""Asks /health all the time: whether the server can be reached, what it says, and how long a recovery takes."""

import asyncio
import re
from time import perf_counter

import httpx

from soaking.asking import Connection
from soaking.report import End, Report
from soaking.server import START_TIMEOUT

_INTERVAL = 0.1  # seconds


class Health:
    """What /health said last, kept up to date by `watch`."""

    def __init__(self, url: str, report: Report) -> None:
        self._report = report
        self._http = httpx.AsyncClient(
            base_url=url, timeout=30, limits=httpx.Limits(max_keepalive_connections=0), verify=False
        )
        self._ended: tuple[End, float, int] | None = None  # how, when, and the number of restarts until then
        self._answered = asyncio.Condition()
        self._recovered = asyncio.Event()
        self._recovered.set()
        self.status = ""
        self.restarts = 0
        self.last_server_death = float("-inf")

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            started = perf_counter()
            try:
                answer = (await self._http.get("/health", extensions={"trace": Connection().trace})).json()
            except (httpx.TransportError, ValueError):
                # one that was cut with its server process is nobody's fault
                if self.last_server_death < started:
                    self._report.num_unreachable += 1
            else:
                self._report.slowest_health = max(self._report.slowest_health, perf_counter() - started)
                async with self._answered:
                    self.status, self.restarts = answer["status"], answer["restarts"]
                    self._answered.notify_all()
            await asyncio.sleep(_INTERVAL)

    async def wait_ready(self, *, restarts: int = 0) -> None:
        """Until the server is ready after at least so many restarts. Raises RuntimeError if it says it has failed."""
        async with asyncio.timeout(START_TIMEOUT), self._answered:
            while self.status != "ok" or self.restarts < restarts:
                if self.status == "failed":
                    raise RuntimeError("the server says that it has failed")
                await self._answered.wait()

    def note_end(self, how: End) -> None:
        """A process of the engine's side has been killed, or hangs. A recovery is measured from the last one on."""
        self._ended = how, perf_counter(), self.restarts
        self._recovered.clear()

    async def wait_recovered(self) -> None:
        """Until a client has got a token since the last end."""
        async with asyncio.timeout(START_TIMEOUT):
            await self._recovered.wait()

    def note_token(self) -> None:
        """A client has got something. What was under way by then does not count, only what a new engine gives."""
        if self._ended is None:
            return
        how, ended_at, restarts_before = self._ended
        if self.restarts > restarts_before:
            self._report.recoveries[how].append(perf_counter() - ended_at)
            self._ended = None
            self._recovered.set()

    async def gauges(self) -> dict[str, float]:
        """The engine's figures of /metrics by their short names, and `num_gpu_blocks`."""
        found: dict[str, float] = {}
        for line in (await self._http.get("/metrics")).text.splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith("vllm:"):
                found[name.removeprefix("vllm:").partition("{")[0]] = float(value)
            if blocks := re.search(r'num_gpu_blocks="(\d+)"', name):
                found["num_gpu_blocks"] = float(blocks[1])
        return found

    async def max_model_len(self) -> int:
        length: int = (await self._http.get("/v1/models")).json()["data"][0]["max_model_len"]
        return length
