"""A request that kills every worker, with real processes: it alone gets an error, and everybody else a pause."""

import asyncio
import os
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.running_server import START_TIMEOUT, RunningServer, running_server

pytestmark = pytest.mark.slow

POISON = [80, 80, 80, 80, 80]  # token ids
# what Python runs when a process of ours starts: every worker has a bug that these tokens meet
SITECUSTOMIZE = f"""
import os, sys

if "llmd.worker" in sys.orig_argv:
    from llmd.worker.sequences import Sequences

    take_in = Sequences.take_in

    def take_in_or_die(self, plan):
        rows = take_in(self, plan)
        if any(copy.token_ids[:5] == {POISON} for _, copy in rows):
            os._exit(1)
        return rows

    Sequences.take_in = take_in_or_die
"""


async def ask(server: RunningServer, prompts: list[str | list[int]]) -> list[httpx.Response]:
    async with httpx.AsyncClient(base_url=server.base_url, timeout=START_TIMEOUT) as client:
        body = {"max_tokens": 100, "seed": 1, "ignore_eos": True}
        return await asyncio.gather(
            *(client.post("/completions", json={"prompt": prompt, **body}) for prompt in prompts)
        )


def test_it_alone_ends_with_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    # `python -m` looks for our packages in this folder too, but only later
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}
    prompts: list[str | list[int]] = [f"{number} is a number" for number in range(8)]
    with running_server("--model", str(tiny_model_dir), environment=environment) as server:
        undisturbed = [answer.json()["choices"] for answer in asyncio.run(ask(server, prompts))]

        answers = asyncio.run(ask(server, [*prompts[:4], POISON, *prompts[4:]]))
        poisoned = answers.pop(4)
        assert [answer.json()["choices"] for answer in answers] == undisturbed
        num_deaths = httpx.get(f"{server.url}/health").json()["restarts"]
        # four if each of the three engines had given somebody a token before
        assert num_deaths in (3, 4)
        assert poisoned.status_code == 500
        assert poisoned.json()["error"] == {
            "message": (
                f"The engine died {num_deaths} times while it worked on this request, the last time on this request "
                "alone, so it is not tried again."
            ),
            "type": "server_error",
            "param": None,
            "code": None,
        }
