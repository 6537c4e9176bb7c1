"""Load through HTTP, closed loop: output tokens a second, time to first token, time between tokens.

    python bench/serve.py http://127.0.0.1:8000 [--concurrency 1 4 16] [--prompt-tokens 128] [--output-tokens 64]

Works with any OpenAI server that knows `ignore_eos`, so that two servers can be compared by running it on both, one
after the other, alone on the machine. Prompts differ from one another from their first token on: no prefix cache helps.
The last line is the same as JSON.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any

import httpx

# one token each in most vocabularies, so that the number of words is about the number of tokens
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
_MILLISECONDS = 1e3


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client saw of one request. Times in seconds."""

    num_tokens: int
    first_token: float
    between_tokens: list[float]


def ask(url: str, number: int, *, prompt_tokens: int, output_tokens: int) -> Answer:
    """One streamed chat completion."""
    words = " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(prompt_tokens - 30))
    body = {
        "messages": [{"role": "user", "content": f"{number} {words}"}],
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    arrivals: list[float] = []
    num_tokens = 0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=None) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                arrivals.append(time.perf_counter())
    gaps = [after - before for before, after in pairwise(arrivals)]
    return Answer(num_tokens, arrivals[0] - started, gaps)


def run_wave(ask_one: Any, numbers: Any, *, concurrency: int) -> dict[str, float]:
    """`concurrency` clients, each with two requests one after the other."""

    def client(_: int) -> list[Answer]:
        return [ask_one(next(numbers)) for _ in range(2)]

    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as clients:
        answers = [answer for pair in clients.map(client, range(concurrency)) for answer in pair]
    elapsed = time.perf_counter() - started
    gaps = [gap for answer in answers for gap in answer.between_tokens]
    return {
        "concurrency": concurrency,
        "output_tokens_per_second": sum(answer.num_tokens for answer in answers) / elapsed,
        "first_token_ms": statistics.median(answer.first_token for answer in answers) * _MILLISECONDS,
        "between_tokens_ms": statistics.median(gaps) * _MILLISECONDS,
        "between_tokens_p99_ms": statistics.quantiles(gaps, n=100)[-1] * _MILLISECONDS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    arguments = parser.parse_args()
    numbers = count(1)
    ask_one = partial(ask, arguments.url, prompt_tokens=arguments.prompt_tokens, output_tokens=arguments.output_tokens)
    ask_one(next(numbers))  # warm
    rows = []
    print("concurrency   tok/s   TTFT p50 ms   ITL p50 ms   ITL p99 ms")
    for concurrency in arguments.concurrency:
        row = run_wave(ask_one, numbers, concurrency=concurrency)
        rows.append(row)
        print("{:11.0f}{:8.1f}{:14.0f}{:13.1f}{:13.1f}".format(*row.values()), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
