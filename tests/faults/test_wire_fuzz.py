"""Garbage with a fixed seed, over the sockets of a whole running server: every answer is one that a client can
understand, no process ends, and nothing stays open behind it."""

import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from llmd.engine.ranks import RankLost, connect_ranks
from llmd.protocol.framing import encode_frame
from llmd.protocol.generation import GenerateRequest, SamplingParams
from llmd.protocol.steps import RankFailed, RankReady
from tests.end_to_end.running_server import running_server
from tests.faults.wire import CHAT, COMPLETIONS, JSON, Answer, Target, say

pytestmark = pytest.mark.slow

NUM_RAW = 400
NUM_STRUCTURED = 300


@pytest.fixture(scope="module")
def target(tiny_model_dir: Path) -> Iterator[Target]:
    with running_server("--model", str(tiny_model_dir)) as running:
        target = Target(running)
        yield target
        target.check_unharmed()
        target.wait_idle()


# --- bytes


def post(path: str, body: dict[str, Any], headers: str = "") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return f"{head}{headers}\r\n".encode() + data


def chunked(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (5, data[:5], len(data) - 5, data[5:])


HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
REQUESTS = (
    post(CHAT, HELLO),
    post(CHAT, {**HELLO, "stream": True}),
    post(COMPLETIONS, {"prompt": "a", "max_tokens": 2, "n": 2}, "Expect: 100-continue\r\n"),
    post(COMPLETIONS, {"prompt": [65, 66], "max_tokens": 2, "stream": True}, "X-Request-Timeout: 5\r\n"),
    chunked(COMPLETIONS, {"prompt": "a", "max_tokens": 2}),
    post("/tokenize", {"prompt": "abc"}),
    post("/detokenize", {"tokens": [65, 66]}),
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Request-Id: abc\r\nAccept-Encoding: gzip\r\n\r\n",
    b"GET /health/live HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    b"HTTP2-Settings: AAMAAABkAAQC\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\nOrigin: http://a\r\nAccess-Control-Request-Method: POST\r\n\r\n",
)  # fmt: skip


def mutated(chance: random.Random) -> bytes:
    data = bytearray(b"".join(chance.choices(REQUESTS, k=chance.choice([1, 1, 1, 2, 3]))))
    for _ in range(chance.choice([0, 1, 1, 2, 4, 8])):
        place = chance.randrange(len(data))
        match chance.choice(["replace", "flip", "delete", "insert", "repeat", "cut", "line end"]):
            case "replace":
                data[place] = chance.randrange(256)
            case "flip":
                data[place] ^= 1 << chance.randrange(8)
            case "delete":
                del data[place : place + chance.randrange(1, 20)]
            case "insert":
                data[place:place] = chance.randbytes(chance.randrange(1, 20))
            case "repeat":
                data[place:place] = data[place : place + chance.randrange(1, 200)]
            case "cut":
                del data[place:]
            case "line end":
                data[place:place] = chance.choice([b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b":"])
        data = data or bytearray(b"\n")
    return bytes(data)


def test_mutated_requests(target: Target) -> None:
    chance = random.Random(20)
    with ThreadPoolExecutor(16) as threads:
        conversations = list(threads.map(lambda data: say(target, data), [mutated(chance) for _ in range(NUM_RAW)]))
    statuses: Counter[int] = Counter()
    for answer in (answer for answers in conversations for answer in answers):
        answer.check()
        statuses[answer.status] += 1
    # the garbage is good: some of it is understood, and some is not
    assert statuses[200] > NUM_RAW / 10, statuses
    assert statuses[400] > NUM_RAW / 10, statuses
    target.check_unharmed()


# --- structure

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, -(2**63), 2**64, 10**40, 0.5, -0.0, 1e308, 1e-320),
    *("", "a", "user", "assistant", "tool", "text", "\0", "\ud83d", "👩‍👩‍👧", "a\u0301" * 20, "x" * 5000, "<|im_end|>"),
    *([], {}, [[]], [None], [65, 66], ["a", "b"], {"a": 1}, [{"type": "text", "text": "x"}], {"65": 5}, [[65], [66]]),
)
RIGHT_VALUES: dict[str, tuple[Any, ...]] = {
    "messages": (
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
    ),
    "prompt": ("Hi", ["a", "b"], [65, 66], [[65], [66]]),
    "tokens": ([65, 66], []),
    "stream": (True, False),
    "n": (1, 2),
    "temperature": (0, 1.5),
    "top_p": (0.5,),
    "top_k": (5,),
    "seed": (1,),
    "stop": ("e", ["e", "q"]),
    "stop_token_ids": ([65],),
    "logprobs": (True, 1),
    "top_logprobs": (2,),
    "logit_bias": ({"65": 5},),
    "echo": (True,),
    "min_tokens": (1,),
    "max_tokens": (1, 3),
    "presence_penalty": (1,),
    "repetition_penalty": (1.5,),
    "stream_options": ({"include_usage": True},),
    "chat_template_kwargs": ({"a": [1]},),
    "documents": ([{"a": "b"}],),
    "cache_salt": ("x",),
    "priority": (1,),
    "timeout": (5,),
    "return_token_ids": (True,),
    "return_token_strs": (True,),
    "add_special_tokens": (True,),
    "continue_final_message": (True,),
    "add_generation_prompt": (False,),
    "metadata": ({"a": "b"},),
    "tools": ([],),
}
REQUIRED = {CHAT: "messages", COMPLETIONS: "prompt", "/tokenize": "prompt", "/detokenize": "tokens"}


def spoiled(chance: random.Random, value: Any) -> Any:
    """The value with something odd in the place of it, or of a part of it."""
    if isinstance(value, dict) and value and chance.random() < 0.7:
        key = chance.choice(list(value))
        return {**value, chance.choice([key, key, "x"]): spoiled(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], spoiled(chance, value[place]), *value[place + 1 :]]
    return chance.choice(ODD_VALUES)


def nearly_right(chance: random.Random) -> tuple[str, bytes]:
    path = chance.choice([CHAT, CHAT, COMPLETIONS, COMPLETIONS, "/tokenize", "/detokenize"])
    names = {REQUIRED[path]} | set(chance.choices(list(RIGHT_VALUES), k=chance.choice([0, 1, 2, 4])))
    body = {name: chance.choice(RIGHT_VALUES[name]) for name in sorted(names)}
    if path in (CHAT, COMPLETIONS):
        # so that a right one is soon over
        body.setdefault("max_tokens", 2)
    for name in chance.choices(list(body), k=chance.choice([0, 0, 1, 1, 2])):
        body[name] = spoiled(chance, body[name])
    return path, json.dumps(body).encode()


def test_nearly_right_requests(target: Target) -> None:
    chance = random.Random(21)
    requests = [nearly_right(chance) for _ in range(NUM_STRUCTURED)]
    with target.client() as client, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda request: client.post(request[0], content=request[1], headers=JSON), requests))
    statuses: Counter[int] = Counter()
    for (path, body), answer in zip(requests, answers, strict=True):
        statuses[answer.status_code] += 1
        if answer.headers["content-type"].startswith("text/event-stream"):
            *events, done = answer.text.removesuffix("\n\n").split("\n\n")
            assert done == "data: [DONE]", (path, body, answer.text)
            assert not any("error" in json.loads(event.removeprefix("data: ")) for event in events), (body, events)
        else:
            Answer(answer.status_code, dict(answer.headers), answer.content).check()
    assert statuses[200] > NUM_STRUCTURED / 10, statuses
    assert statuses[400] > NUM_STRUCTURED / 10, statuses
    target.check_unharmed()


# --- between our own processes


def engine_socket(target: Target) -> str:
    """The unix socket on which the engine awaits servers."""
    (path,) = {
        line.split()[-1]
        for line in Path("/proc/net/unix").read_text().splitlines()
        if line.endswith("/servers.sock") and owns(target, line.split()[6])
    }
    return path


def owns(target: Target, inode: str) -> bool:
    files = Path(f"/proc/{target.running.process.pid}/fd").iterdir()
    return any(file.readlink().name == f"socket:[{inode}]" for file in files)


REQUEST = encode_frame(
    GenerateRequest(
        request_id=1,
        prompt_token_ids=[65, 66],
        sampling=SamplingParams(max_tokens=2, seed=0),
        cache_salt="salt",
        client="client",
    )
)


def framed(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


def repr_short(data: bytes) -> str:
    return repr(data[:12])


FOREIGN_FRAMES = (
    framed(b""),
    framed(b"garbage"),
    framed(b"\x91" * 100_000),
    framed(b"\x82\xa4type"),
    framed(REQUEST[4:].replace(b"salt", b"s\xfflt")),
    framed(REQUEST[4:].replace(b"\xa6client", b"\xa1x" + b"\x91" * 5000, 1)),
    REQUEST[:-3],
    b"\xff\xff\xff\xff" + bytes(1000),
    encode_frame(RankReady(rank=0, num_blocks=1, max_model_len=1, vocab_size=1)),
)


def test_a_server_that_talks_nonsense_loses_its_own_connection_only(target: Target) -> None:
    engine_pid = target.running.child_pids()["llmd.engine"]
    path = engine_socket(target)
    for data in FOREIGN_FRAMES:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
        assert target.running.child_pids()["llmd.engine"] == engine_pid
    target.check_unharmed()


CUT_TEXT = framed(encode_frame(RankFailed("é"))[4:-1] + b"\xff")


@pytest.mark.parametrize("data", [*FOREIGN_FRAMES[:-1], CUT_TEXT], ids=repr_short)
def test_a_rank_that_talks_nonsense_is_lost(data: bytes) -> None:
    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        await theirs.send_all(data)
        await theirs.aclose()
        await connect_ranks([ours])

    with pytest.RaisesGroup(RankLost, flatten_subgroups=True):
        trio.run(main)
