"""A checked request, ready for the engine: who may ask, what is asked, and under which name it is answered.

It must not know what comes back.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

import msgspec

import llmd
from llmd.errors import InvalidRequest, Unavailable
from llmd.protocol.generation import SamplingParams
from llmd.server.context import Server, TextModel
from llmd.server.engine_client import SequenceStart
from llmd.server.openai_types import ChatCompletionRequest, CompletionRequest
from llmd.server.parameters import MAX_SEQUENCES, check_token_ids, draw_seed, resolve_sampling
from llmd.server.request_headers import client_identity, header_timeout


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as the beginning of each of its answers."""

    text: str
    offsets: list[int]  # for each token: characters of `text` before it; empty unless log-probabilities are asked


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    text: str | None = None  # as the client gave it; None where it came as tokens or as messages
    echo: Echo | None = None  # None = not asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What both endpoints ask the engine. Choice index = prompt index × n + choice."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    request: ChatCompletionRequest | CompletionRequest
    prompts: Sequence[Prompt]
    sampling: Sequence[SamplingParams]  # one a prompt
    arrived: float  # on trio's clock
    deadline: float  # on trio's clock; infinite if the client gave no timeout
    client: str  # who asks, see `request_headers`

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.request.n

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def starts(self) -> list[SequenceStart]:
        """Every sequence that the engine must run, in order of choice index."""
        return [
            SequenceStart(
                prompt_token_ids=prompt.token_ids,
                sampling=msgspec.structs.replace(sampling, choice=choice),
                priority=self.request.priority,
                cache_salt=self.request.cache_salt,
                client=self.client,
                deadline=self.deadline,
            )
            for prompt, sampling in zip(self.prompts, self.sampling, strict=True)
            for choice in range(self.request.n)
        ]


def admit(server: Server) -> TextModel:
    """The text model, if the engine takes requests. Raises Unavailable, with the reason, if not."""
    text = server.loaded_text()
    if server.engine.ready is None:
        raise Unavailable(
            "The engine is restarting. Running requests go on after that; please send new ones then.",
            retry_after=server.state.retry_after,
        )
    return text


def ask(
    server: Server,
    request: ChatCompletionRequest | CompletionRequest,
    prompts: Sequence[Prompt],
    *,
    id_prefix: str,
    arrived: float,
) -> Question:
    """The question that a checked request, its headers and its prompts make.

    Raises InvalidRequest if the prompts cannot fit, or a header cannot be understood.
    """
    text = server.loaded_text()
    num_sequences = len(prompts) * request.n
    if num_sequences > MAX_SEQUENCES:
        raise InvalidRequest(
            f"A request can have at most {MAX_SEQUENCES} answers (prompts times n), got {num_sequences}.", param="n"
        )
    served_names = server.config.model.served_names
    timeouts = [timeout for timeout in (request.timeout, header_timeout()) if timeout is not None]
    seed = draw_seed()
    sampling = [
        resolve_sampling(
            request,
            num_prompt_tokens=len(prompt.token_ids),
            max_model_len=text.max_model_len,
            vocab_size=text.vocab_size,
            eos_token_ids=text.tokenizer.eos_token_ids,
            defaults=text.sampling_defaults,
            seed=seed,
        )
        for prompt in prompts
    ]
    for prompt in prompts:
        # a tokenizer may have tokens that were added without a row in the embedding
        check_token_ids(prompt.token_ids, vocab_size=text.vocab_size, param="prompt")
    return Question(
        id=f"{id_prefix}-{uuid4().hex}",
        created=int(time.time()),
        model=request.model if request.model in served_names else served_names[0],
        system_fingerprint=_system_fingerprint(server),
        request=request,
        prompts=prompts,
        sampling=sampling,
        arrived=arrived,
        deadline=arrived + min(timeouts, default=math.inf),
        client=client_identity(),
    )


def _system_fingerprint(server: Server) -> str:
    """The same as long as the same seed gives the same answer: of the weights' place, their type and llmd's version."""
    model = server.config.model
    facts = (server.state.current.model_dir, model.source, model.revision, model.dtype, llmd.__version__)
    return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
