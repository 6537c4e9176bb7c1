"""Clients of an OpenAI server, with the standard library alone: streams read as raw lines, so that 256 cost little.

Prompts are random token ids: they differ from their first token on, and no prefix cache helps.
"""

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Answer:
    """What one client saw. Times in seconds on `perf_counter`."""

    started: float
    arrivals: list[float]  # of events that carry a text
    num_tokens: int

    @property
    def first_token(self) -> float:
        return self.arrivals[0] - self.started

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True)
class Asked:
    """What every request of a load has in common. `num_ids`: prompts are made of the ids below it."""

    port: int
    model: str
    prompt_tokens: int
    output_tokens: int
    num_ids: int


def wave(asked: Asked, *, concurrency: int, requests: int, seed: int) -> tuple[list[Answer], float]:
    """`concurrency` clients, each with so many requests one after the other → answers, seconds from first to last."""
    prompts = random.Random(seed)

    async def client() -> list[Answer]:
        return [await ask(asked, prompts.choices(range(asked.num_ids), k=asked.prompt_tokens)) for _ in range(requests)]

    async def everybody() -> list[list[Answer]]:
        return await asyncio.gather(*(client() for _ in range(concurrency)))

    started = time.perf_counter()
    answers = [answer for answers in asyncio.run(everybody()) for answer in answers]
    return answers, time.perf_counter() - started


async def ask(asked: Asked, prompt: list[int]) -> Answer:
    """One streamed completion. Raises RuntimeError for anything but a whole one of `output_tokens`."""
    body = {
        "model": asked.model,
        "prompt": prompt,
        "max_tokens": asked.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(content)}\r\n"
    head += "content-type: application/json\r\nconnection: close\r\n\r\n"
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", asked.port)
    try:
        writer.write(head.encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read(4096)).decode(errors='replace')}")
        return await _read(reader, started, asked.output_tokens)
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, started: float, output_tokens: int) -> Answer:
    """Lines that hold no event are headers, sizes of chunks and comments."""
    arrivals = []
    num_tokens = 0
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: "):
            now = time.perf_counter()
            # Reading the JSON of every event of 256 streams would be the clients' own limit.
            if b'"completion_tokens":' in line:
                num_tokens = _usage(line)
            if b'"text":' in line and b'"text":""' not in line:
                arrivals.append(now)
    if num_tokens != output_tokens or not arrivals:
        raise RuntimeError(f"an answer of {num_tokens} tokens in {len(arrivals)} events, not of {output_tokens}")
    return Answer(started, arrivals, num_tokens)


def _usage(line: bytes) -> int:
    return int((json.loads(line.removeprefix(b"data: ")).get("usage") or {}).get("completion_tokens", 0))


def figures(answers: list[Answer], seconds: float) -> dict[str, float]:
    """Of a wave."""
    gaps = sorted(gap for answer in answers for gap in answer.gaps) or [0.0]
    return {
        "output tok/s": sum(answer.num_tokens for answer in answers) / seconds,
        "TTFT p50 ms": 1e3 * statistics.median(answer.first_token for answer in answers),
        "ITL p50 ms": 1e3 * statistics.median(gaps),
        "ITL p99 ms": 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "s": seconds,
    }
