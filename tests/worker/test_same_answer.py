"""Contract C3: a request's tokens and their log-probabilities are bitwise the same alone, in a batch, chunked, from the
cache, preempted and resumed. The real scheduler and the real runner in one process, on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.scheduler import Scheduler
from llmd.model.checkpoint import load_decoder
from llmd.model.decoder import Decoder
from llmd.model.kv_cache import allocate_kv_cache
from llmd.protocol.generation import GenerateRequest
from llmd.worker.cpu_runner import CpuRunner
from tests.worker.engine import BLOCK_SIZE, Answer, Engine, generate_request

CPU = torch.device("cpu")
PROMPT = [(7 * i * i + 3 * i) % 251 for i in range(150)]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def decoder(tiny_model_dir: Path) -> Decoder:
    return load_decoder(tiny_model_dir, dtype=torch.float32, device=CPU)


def make_engine(
    decoder: Decoder,
    *,
    num_blocks: int = 400,
    max_num_batched_tokens: int = 256,
    prefix_caching: bool = True,
    steps_in_flight: int = 2,
) -> Engine:
    kv = allocate_kv_cache(
        decoder.spec, num_blocks=num_blocks + 1, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU
    )
    scheduler = Scheduler(
        CacheConfig(block_size=BLOCK_SIZE, prefix_caching=prefix_caching),
        SchedulerConfig(max_num_batched_tokens=max_num_batched_tokens, max_steps_in_flight=steps_in_flight),
        num_blocks=num_blocks,
        max_model_len=512,
    )
    return Engine(scheduler, CpuRunner(decoder, kv, block_size=BLOCK_SIZE, device=CPU))


def request(request_id: int = 0, *, prompt: list[int] = PROMPT, seed: int = 5, **parameters: Any) -> GenerateRequest:
    return generate_request(request_id, prompt, max_tokens=NUM_TOKENS, seed=seed, num_logprobs=3, **parameters)


def others(count: int) -> list[GenerateRequest]:
    """Requests of other lengths and parameters to keep it company."""
    return [
        request(i, prompt=[(i * 31 + k) % 251 for k in range(1 + 13 * i % 200)], seed=i, temperature=0.5 + i / 20)
        for i in range(1, count + 1)
    ]


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["greedy", "sampled"])
def temperature(request: pytest.FixtureRequest) -> float:
    return float(request.param)


@pytest.fixture(scope="module")
def alone(decoder: Decoder, temperature: float) -> Answer:
    return make_engine(decoder).run([request(temperature=temperature)])[0]


def test_in_a_batch_of_32(decoder: Decoder, alone: Answer, temperature: float) -> None:
    crowd = make_engine(decoder).run([*others(16), request(temperature=temperature), *others(31)[16:]])
    assert crowd[0].token_ids == alone.token_ids
    assert crowd[0].logprobs == alone.logprobs
    # the crowd did run: its answers are its own
    assert len({tuple(answer.token_ids) for answer in crowd.values()}) == len(crowd)


@pytest.mark.parametrize("chunk", [8, 11, 64])
def test_in_chunks(decoder: Decoder, alone: Answer, temperature: float, chunk: int) -> None:
    answers = make_engine(decoder, max_num_batched_tokens=chunk).run([request(temperature=temperature), *others(3)])
    assert answers[0].token_ids == alone.token_ids
    assert answers[0].logprobs == alone.logprobs


def test_from_the_cache(decoder: Decoder, alone: Answer, temperature: float) -> None:
    engine = make_engine(decoder)
    engine.run([request(temperature=temperature)])
    again = engine.run([request(temperature=temperature)])[0]
    assert again.num_cached_tokens == (len(PROMPT) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert again.token_ids == alone.token_ids
    assert again.logprobs == alone.logprobs


def test_preempted(decoder: Decoder, alone: Answer, temperature: float) -> None:
    # both prompts fit, but not both answers: when the first one's grows, the second has to go and come again
    engine = make_engine(decoder, num_blocks=15, prefix_caching=False)
    answers = engine.run([request(1, prompt=PROMPT[:60], seed=9), request(temperature=temperature)])
    assert engine.scheduler.statistics().num_preemptions > 0
    assert answers[0].token_ids == alone.token_ids
    assert answers[0].logprobs == alone.logprobs


@pytest.mark.parametrize("num_sent", [1, 10, NUM_TOKENS - 1])
def test_resumed_in_another_engine(decoder: Decoder, alone: Answer, temperature: float, num_sent: int) -> None:
    sent = alone.token_ids[:num_sent]
    rest = make_engine(decoder).run([*others(4), request(temperature=temperature, output_token_ids=sent)])[0]
    assert sent + rest.token_ids == alone.token_ids
    assert rest.logprobs == alone.logprobs[num_sent:]


def test_steps_planned_one_by_one(decoder: Decoder, alone: Answer, temperature: float) -> None:
    answer = make_engine(decoder, steps_in_flight=1).run([request(temperature=temperature)])[0]
    assert answer.token_ids == alone.token_ids
    assert answer.logprobs == alone.logprobs


def test_prompt_logprobs_do_not_depend_on_chunks(decoder: Decoder) -> None:
    whole = make_engine(decoder).run([request(num_prompt_logprobs=2)])[0]
    engine = make_engine(decoder, max_num_batched_tokens=24)
    engine.run([request()])  # fills the cache, which must not shorten what is reported
    chunked = engine.run([request(num_prompt_logprobs=2), *others(2)])[0]
    assert whole.prompt_logprobs is not None
    assert [entry.token_id for entry in whole.prompt_logprobs] == PROMPT[1:]
    assert chunked.prompt_logprobs == whole.prompt_logprobs


def test_threads(decoder: Decoder, alone: Answer, temperature: float) -> None:
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if num_threads > 1 else 2)
        answer = make_engine(decoder).run([request(temperature=temperature)])[0]
    finally:
        torch.set_num_threads(num_threads)
    assert answer.token_ids == alone.token_ids
    assert answer.logprobs == alone.logprobs
