"""A cache that is far too small for what runs: some give way and come back, nobody waits for ever, and every answer
is the one of a run that had room. Real processes."""

from pathlib import Path

import pytest

from tests.end_to_end.running_server import RunningServer, running_server
from tests.faults.facts import Figures, figures, wait_for
from tests.faults.test_engine_deaths import Answers

pytestmark = pytest.mark.slow

# keys and values of two layers with two heads of 16 float32
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4
# the longest request alone needs 300 tokens, and 40 sequences want to run at once
NUM_TOKENS = 800


def test_preemption_changes_no_answer(tiny_model_dir: Path) -> None:
    roomy = ("--model", str(tiny_model_dir))
    with running_server(*roomy) as server:
        undisturbed = Answers(server).run()
        assert at_rest(server).num_preemptions == 0
    with running_server(*roomy, "--kv-cache-memory-bytes", str((NUM_TOKENS + 16) * BYTES_PER_TOKEN)) as server:
        assert Answers(server).run() == undisturbed
        assert at_rest(server).num_preemptions > 10


def at_rest(server: RunningServer) -> Figures:
    return wait_for(lambda: figures(server), lambda now: now.is_idle and now.num_output_tokens > 0)
