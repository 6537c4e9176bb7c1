"""A cache that is far too small for what runs: some give way and come back, nobody waits for ever, and every answer
is the one of a run that had room. Real processes."""

from pathlib import Path

import pytest
from soaking.questions import mixed_questions, streamed

from tests.end_to_end.running_server import RunningServer, running_server
from tests.faults.asking import LONG_PROMPT, Request, answers
from tests.faults.facts import Figures, figures, wait_for

pytestmark = pytest.mark.slow

# keys and values of two layers with two heads of 16 float32
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4
# one request alone needs up to 480 tokens, and more than 32 sequences want to run at once
NUM_TOKENS = 560


def long_requests() -> list[Request]:
    questions = (mixed_questions(num_tokens=100, long_prompt=LONG_PROMPT) * 2)[:32]
    return [(each.path, streamed(each.body) if i % 2 else each.body) for i, each in enumerate(questions)]


def test_preemption_changes_no_answer(tiny_model_dir: Path) -> None:
    roomy = ("--model", str(tiny_model_dir))
    with running_server(*roomy) as server:
        undisturbed = answers(server, long_requests())
        assert at_rest(server).num_preemptions == 0
    with running_server(*roomy, "--kv-cache-memory-bytes", str((NUM_TOKENS + 16) * BYTES_PER_TOKEN)) as server:
        assert answers(server, long_requests()) == undisturbed
        assert at_rest(server).num_preemptions > 10


def at_rest(server: RunningServer) -> Figures:
    return wait_for(lambda: figures(server), lambda now: now.is_idle and now.num_output_tokens > 0)
