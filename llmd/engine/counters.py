"""What an engine has done since its start, in numbers. Pure; knows no sequences."""

from bisect import bisect_left
from dataclasses import dataclass, field

from llmd.protocol.generation import STEP_TOKENS_BUCKETS


@dataclass(slots=True)
class Counters:
    """The counters among `EngineStatistics`, under the same names."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    step_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS_BUCKETS) + 1))
    step_tokens_sum: int = 0

    def count_step(self, num_tokens: int) -> None:
        """A step that ran so many tokens is done."""
        self.num_steps += 1
        self.step_tokens[bisect_left(STEP_TOKENS_BUCKETS, num_tokens)] += 1
        self.step_tokens_sum += num_tokens
