"""What a client asked → how tokens are drawn: ranges, defaults, and what fits the context. Pure: no I/O, and no
randomness but the seed that `draw_seed` gives. It must not know HTTP or text.

Where a wording exists that clients know from vLLM or OpenAI, it is used.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

from llmd.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from llmd.protocol.generation import SamplingParams
from llmd.server.openai_types import ChatCompletionRequest, CompletionRequest, SamplingFields

MAX_N = 128
MAX_SEQUENCES = 1024  # of one request: prompts × n
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024  # of one stop string
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024  # tokens; each sequence of a request carries them
COMPLETION_MAX_TOKENS = 16  # OpenAI's default of /v1/completions
GREEDY_BELOW = 1e-4  # a temperature under this is 0: the quotient would not fit a float any more

MAX_SALT_CHARACTERS = 128

NAMES_OF_THE_ONLY_MODEL = ("", "EMPTY", "default")

_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("n", lambda n: n >= 1, "at least 1"),
    ("n", lambda n: n <= MAX_N, f"at most {MAX_N}"),
    ("temperature", lambda t: 0.0 <= t <= 2.0, "in [0, 2]"),
    ("top_p", lambda p: 0.0 < p <= 1.0, "in (0, 1]"),
    ("top_k", lambda k: k >= -1, "0 (disable), or at least 1"),
    ("min_p", lambda p: 0.0 <= p <= 1.0, "in [0, 1]"),
    ("presence_penalty", lambda p: -2.0 <= p <= 2.0, "in [-2, 2]"),
    ("frequency_penalty", lambda p: -2.0 <= p <= 2.0, "in [-2, 2]"),
    ("repetition_penalty", lambda p: p > 0.0, "greater than zero"),
    # beyond these a logit times or over it leaves the range of a float
    ("repetition_penalty", lambda p: 0.01 <= p <= 100.0, "in [0.01, 100]"),
    ("min_tokens", lambda m: m >= 0, "greater than or equal to 0"),
    ("seed", lambda s: -(2**63) <= s < 2**63, "a 64-bit integer"),
    ("timeout", lambda t: t > 0.0, "greater than zero"),
    ("priority", lambda p: -(2**31) <= p < 2**31, "a 32-bit integer"),
)


def check_model(name: str | None, served_names: Sequence[str]) -> None:
    """Raises ModelNotFound unless the name is one of ours, or one by which clients say "the one you have"."""
    if name is not None and name not in NAMES_OF_THE_ONLY_MODEL and name not in served_names:
        names = ", ".join(f"`{served}`" for served in served_names)
        raise ModelNotFound(f"The model `{name[:256]}` does not exist. This server has: {names}.")


def draw_seed() -> int:
    return secrets.randbits(63)


def stop_strings(request: SamplingFields) -> tuple[str, ...]:
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def num_logprobs(request: ChatCompletionRequest | CompletionRequest) -> int | None:
    """How many alternatives to report beside each drawn token; None = no log-probabilities at all."""
    if isinstance(request, ChatCompletionRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs


def check_ranges(request: ChatCompletionRequest | CompletionRequest, *, vocab_size: int, max_logprobs: int) -> None:
    """Everything that can be said before the prompt's length is known. Raises InvalidRequest that names the field."""
    _check_numbers(request)
    _check_stops(request, vocab_size=vocab_size)
    _check_logit_bias(request.logit_bias, vocab_size=vocab_size)
    _check_logprobs(request, max_logprobs=max_logprobs)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("Stream options can only be defined when `stream=True`.", param="stream_options")
    if isinstance(request, ChatCompletionRequest):
        if request.continue_final_message and request.add_generation_prompt:
            raise InvalidRequest(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                param="continue_final_message",
            )
    else:
        _check_best_of(request)


def resolve_sampling(
    request: ChatCompletionRequest | CompletionRequest,
    *,
    num_prompt_tokens: int,
    max_model_len: int,
    vocab_size: int,
    eos_token_ids: Iterable[int],
    defaults: Mapping[str, float],
    seed: int,
) -> SamplingParams:
    """The parameters of one prompt's sequences, for a request that `check_ranges` has passed.

    `defaults` come from the model where the operator asks for them; below them stand OpenAI's. `seed` is used where
    the client gave none. Raises ContextLengthExceeded if the prompt or prompt and answer cannot fit.
    """

    def choose(name: str, otherwise: float) -> float:
        asked = getattr(request, name)
        return cast(float, defaults.get(name, otherwise) if asked is None else asked)

    max_tokens = _max_tokens(request, num_prompt_tokens=num_prompt_tokens, max_model_len=max_model_len)
    if request.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {_short(request.min_tokens)}.",
            param="min_tokens",
        )
    temperature = choose("temperature", 1.0)
    top_k = int(choose("top_k", 0))
    logprobs = num_logprobs(request)
    echoes = isinstance(request, CompletionRequest) and request.echo
    stop_token_ids = set(request.stop_token_ids) | (set() if request.ignore_eos else set(eos_token_ids))
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed if request.seed is None else request.seed % 2**63,
        min_tokens=request.min_tokens,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=top_k if 0 < top_k < vocab_size else 0,
        top_p=choose("top_p", 1.0),
        min_p=choose("min_p", 0.0),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=choose("repetition_penalty", 1.0),
        logit_bias={int(token_id): bias for token_id, bias in request.logit_bias.items()},
        stop_token_ids=tuple(sorted(stop_token_ids)),
        num_logprobs=logprobs,
        num_prompt_logprobs=logprobs if echoes else None,
    )


def _max_tokens(
    request: ChatCompletionRequest | CompletionRequest, *, num_prompt_tokens: int, max_model_len: int
) -> int:
    """Output tokens at most. A limit that the client gave is kept or refused, never cut; the default is cut to fit."""
    asked, param = request.max_tokens, "max_tokens"
    if isinstance(request, ChatCompletionRequest):
        default, source = max_model_len, "messages"
        if request.max_completion_tokens is not None:
            asked, param = request.max_completion_tokens, "max_completion_tokens"
    else:
        default, source = COMPLETION_MAX_TOKENS, "prompt"
    if asked is not None and asked > max_model_len:
        raise InvalidRequest(
            f"{param}={_short(asked)} cannot be greater than max_model_len={max_model_len}. "
            "Please request fewer output tokens.",
            param=param,
        )
    room = max_model_len - num_prompt_tokens
    least = 0 if asked == 0 else 1
    check_prompt_fits(num_prompt_tokens, num_output_tokens=least, max_model_len=max_model_len, source=source)
    if asked is not None and asked > room:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens, but the request totals "
            f"{num_prompt_tokens + asked} tokens ({num_prompt_tokens} input + {asked} completion). "
            f"Please reduce the input length or {param}.",
            param=param,
        )
    return min(default, room) if asked is None else asked


def _check_numbers(request: ChatCompletionRequest | CompletionRequest) -> None:
    for name, holds, words in _RANGES:
        value = getattr(request, name)
        if value is not None and not holds(value):
            raise _out_of_range(name, value, words)
    _check_max_tokens(request)
    if len(request.cache_salt) > MAX_SALT_CHARACTERS:
        raise InvalidRequest(f"cache_salt can have at most {MAX_SALT_CHARACTERS} characters.", param="cache_salt")


def _check_max_tokens(request: ChatCompletionRequest | CompletionRequest) -> None:
    least = 0 if isinstance(request, CompletionRequest) and request.echo else 1
    if request.max_tokens is not None and request.max_tokens < least:
        raise _out_of_range("max_tokens", request.max_tokens, f"at least {least}")
    if isinstance(request, ChatCompletionRequest):
        limit = request.max_completion_tokens
        if limit is not None and limit < 1:
            raise _out_of_range("max_completion_tokens", limit, "at least 1")


def check_prompt_fits(num_prompt_tokens: int, *, num_output_tokens: int = 0, max_model_len: int, source: str) -> None:
    """Raises ContextLengthExceeded unless a prompt and so much of an answer fit. `source`: the prompt's field."""
    if num_prompt_tokens + num_output_tokens > max_model_len:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens. However, your {source} resulted in "
            f"{num_prompt_tokens} tokens, which leaves no room for an answer. Please reduce the length of the "
            f"{source}.",
            param=source,
        )


def check_token_ids(token_ids: Sequence[int], *, vocab_size: int, param: str) -> None:
    """Raises InvalidRequest for an id that is not in the vocabulary."""
    # a prompt may have a million ids, and this runs in the event loop
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        index = next(index for index, token_id in enumerate(token_ids) if not 0 <= token_id < vocab_size)
        raise InvalidRequest(
            f"The token ID at {param}.{index} is not in the vocabulary of {vocab_size} tokens.",
            param=f"{param}.{index}",
        )


def _check_stops(request: SamplingFields, *, vocab_size: int) -> None:
    stops = stop_strings(request)
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop can hold at most {MAX_STOP_STRINGS} strings, got {len(stops)}.", param="stop")
    if "" in stops:
        raise InvalidRequest("stop cannot contain an empty string.", param="stop")
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise InvalidRequest(f"A stop string can have at most {MAX_STOP_CHARACTERS} characters.", param="stop")
    if len(request.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids can hold at most {MAX_STOP_TOKEN_IDS} tokens, got {len(request.stop_token_ids)}.",
            param="stop_token_ids",
        )
    for token_id in request.stop_token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"stop_token_ids contains {_short(token_id)}, which is not in the vocabulary of {vocab_size} tokens.",
                param="stop_token_ids",
            )


def _check_logit_bias(logit_bias: Mapping[str, float], *, vocab_size: int) -> None:
    if len(logit_bias) > MAX_LOGIT_BIASES:
        raise InvalidRequest(
            f"logit_bias can hold at most {MAX_LOGIT_BIASES} tokens, got {len(logit_bias)}.", param="logit_bias"
        )
    for key, bias in logit_bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 16):
            raise InvalidRequest(
                f"logit_bias contains key(s) that cannot be converted to integer token IDs: '{key[:64]}'.",
                param="logit_bias",
            )
        if int(key) >= vocab_size:
            raise InvalidRequest(
                f"logit_bias contains token ID {key}, which is not in the vocabulary of {vocab_size} tokens.",
                param="logit_bias",
            )
        if not -100.0 <= bias <= 100.0:
            raise InvalidRequest(f"logit_bias values must be in [-100, 100], got {bias}.", param="logit_bias")


def _check_logprobs(request: ChatCompletionRequest | CompletionRequest, *, max_logprobs: int) -> None:
    if isinstance(request, ChatCompletionRequest):
        name, asked = "top_logprobs", request.top_logprobs
        if asked and not request.logprobs:
            raise InvalidRequest("when using `top_logprobs`, `logprobs` must be set to true.", param=name)
    else:
        name, asked = "logprobs", request.logprobs
    if asked is not None and asked < 0:
        raise _out_of_range(name, asked, "non-negative")
    if asked is not None and asked > max_logprobs:
        raise InvalidRequest(
            f"Requested sample logprobs of {_short(asked)}, which is greater than max allowed: {max_logprobs}",
            param=name,
        )


def _check_best_of(request: CompletionRequest) -> None:
    best_of = request.best_of
    if best_of is None or best_of == request.n:
        return
    if best_of < request.n:
        raise InvalidRequest(
            f"best_of must be greater than or equal to n, got n={request.n} and best_of={_short(best_of)}.",
            param="best_of",
        )
    raise InvalidRequest(
        "The parameter 'best_of' is supported only where it equals n. Please remove it.",
        param="best_of",
        code="unsupported_parameter",
    )


def _out_of_range(name: str, value: float, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {allowed}, got {_short(value)}.", param=name)


def _short(value: float) -> str:
    """A number as it can stand in a message: a client may send an integer of a thousand digits."""
    text = str(value)
    return text if len(text) <= 32 else f"{text[:32]}…"
