"""What clients send to the generation endpoints, as structs: names and types only. It must not know ranges, defaults
of the model, or how anything is answered.

A field is in one of three groups (contract C5). Supported: a field of a struct here. Ignored: in `IGNORED`, accepted
with any value and without effect. Refused: in `REFUSED`, known but not supported, so that only a value which asks for
nothing is accepted. Any other name is unknown and refused. `docs/openai.md` lists every field; a test compares.
"""

from typing import Any, Literal

from msgspec import Struct


class StreamOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # accepted; llmd never pads its chunks


class SamplingFields(Struct, frozen=True, kw_only=True):
    """What both endpoints share. None = not given."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] = {}
    skip_special_tokens: bool = True
    add_special_tokens: bool | None = None
    priority: int = 0
    cache_salt: str = ""
    timeout: float | None = None  # seconds, from arrival to the last token
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False


class FunctionCall(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call that an assistant made earlier in the conversation."""

    function: FunctionCall
    id: str | None = None
    index: int | None = None  # of a streamed call, sent back as it came
    type: Literal["function"] = "function"


class ContentPart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of a message. Only text is supported; the other kinds are named so that the refusal can name them."""

    type: str
    text: str | None = None
    refusal: str | None = None
    cache_control: Any = None  # a hint for a cloud's cache, without effect
    image_url: Any = None
    input_audio: Any = None
    audio_url: Any = None
    video_url: Any = None
    file: Any = None


class ChatMessage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message of the conversation. Fields that only an answer carries may come back with it, and are dropped."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: Any = None
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None


class ChatCompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[str | int | list[int]]
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """POST /tokenize: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    documents: list[dict[str, Any]] | None = None


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int]


# Sent by many clients, and meaningless on one's own machine. The last line is what the older systems' clients send.
IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "verbosity", "moderation", "prediction",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "parallel_tool_calls", "request_id",
    "kwargs", "session_id",
})  # fmt: skip

# Would change the answer, and cannot be honoured yet. name → values that ask for nothing, besides null
REFUSED: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "prompt_logprobs": (),
    "logprob_token_ids": ([],),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "chat_template": (),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "include_reasoning": (True,),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "prompt_embeds": (),
    "kv_transfer_params": (),
}
