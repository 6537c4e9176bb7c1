"""Requests of every kind, as (path, body). All are seeded: an answer that nobody can repeat cannot be compared."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

Body = dict[str, Any]

PROMPTS = ("abc", "The quick brown fox", "1, 2, 3,", "Once upon a time, in a small village by the sea,")

# what may stand in a request beside its prompt, its seed and its length
_KINDS: dict[str, Body] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0},
    "nucleus with logprobs": {"temperature": 0.8, "top_p": 0.9, "logprobs": 2},
    "three choices": {"n": 3, "top_k": 20},
    "echo with logprobs": {"echo": True, "logprobs": 1},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "min_tokens": 5},
    "stop strings": {"stop": ["e", "q"], "min_p": 0.02},
    "past the end": {"repetition_penalty": 1.2, "ignore_eos": True},
}


@dataclass(frozen=True, slots=True)
class Question:
    """All that an answer depends on. `body` says nothing of how the answer is to be delivered."""

    name: str
    path: str
    body: Body

    @property
    def num_choices(self) -> int:
        prompt = self.body.get("prompt")
        num_prompts = len(prompt) if isinstance(prompt, list) and isinstance(prompt[0], str) else 1
        n: int = self.body.get("n", 1)
        return num_prompts * n


def mixed_questions(*, num_tokens: int, long_prompt: str) -> list[Question]:
    """A fixed pool with every kind in it. Answers have about `num_tokens` tokens; a stop may end them earlier.

    `long_prompt` should take several steps of a server to compute.
    """
    return [
        Question(name, path, {"seed": seed, "return_token_ids": True, **body})
        for seed, (name, path, body) in enumerate(_bodies(num_tokens, long_prompt))
    ]


def _bodies(num_tokens: int, long_prompt: str) -> Iterator[tuple[str, str, Body]]:
    for number, (name, parameters) in enumerate(_KINDS.items()):
        limit = {"max_tokens": num_tokens + number}
        prompt = PROMPTS[number % len(PROMPTS)]
        yield name, "/completions", {**limit, **parameters, "prompt": prompt}
        if "echo" not in parameters:
            chat = {**limit, **parameters, "messages": [{"role": "user", "content": prompt}]}
            if "logprobs" in parameters:
                chat |= {"logprobs": True, "top_logprobs": 3}
            yield f"chat: {name}", "/chat/completions", chat
    few, many = {"max_tokens": max(1, num_tokens // 4)}, {"max_tokens": 2 * num_tokens}
    yield "long prompt", "/completions", {**few, "temperature": 0, "prompt": long_prompt}
    yield "long prompt, sampled", "/completions", {**few, "logprobs": 0, "prompt": long_prompt[::-1]}
    yield (
        "long prompt, echo only",
        "/completions",
        {"max_tokens": 0, "echo": True, "logprobs": 2, "prompt": long_prompt},
    )
    yield "list of prompts", "/completions", {**few, "prompt": list(PROMPTS), "logprobs": 1}
    yield "list of prompts, two choices", "/completions", {**few, "prompt": list(PROMPTS[:2]), "n": 2}
    yield "token ids", "/completions", {**few, "prompt": [5, 6, 7, 8, 9] * 4, "temperature": 0.7}
    yield "one token", "/completions", {"max_tokens": 1, "prompt": PROMPTS[0], "logprobs": 5}
    yield "long answer", "/completions", {**many, "prompt": PROMPTS[1], "ignore_eos": True}
    yield "long answer, greedy", "/completions", {**many, "prompt": PROMPTS[3], "ignore_eos": True, "temperature": 0}


def streamed(body: Body, *, continuous_usage: bool = False) -> Body:
    """The same request, to be answered as a stream that ends with its usage."""
    options = {"include_usage": True, **({"continuous_usage_stats": True} if continuous_usage else {})}
    return {**body, "stream": True, "stream_options": options}


def in_some_manner(body: Body, random: Random) -> Body:
    """The same question in another manner: nothing of this may change the answer."""
    body = {**body, "priority": random.randrange(-2, 3), "cache_salt": random.choice(["", "", "salt", "pepper"])}
    if random.random() < 0.65:
        return streamed(body, continuous_usage=random.random() < 0.3)
    return body
