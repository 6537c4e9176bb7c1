"""What the generation endpoints answer, as structs. Names and types only; the streamed form is in `streaming`."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

AnswerFinish = Literal["stop", "length"]


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int  # whose KV the prefix cache held


class CompletionTokensDetails(Struct, frozen=True):
    reasoning_tokens: int = 0


class Usage(Struct, frozen=True, kw_only=True):
    """`prompt_tokens` counts each prompt once, `completion_tokens` all choices, stop tokens included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()


class TopLogprob(Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True, kw_only=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AnswerMessage(Struct, frozen=True, kw_only=True):
    role: str
    content: str
    refusal: None = None
    reasoning_content: None = None


class ChatChoice(Struct, frozen=True, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: AnswerFinish | None  # None only in a chunk that is not the last
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """200 of POST /v1/chat/completions"""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: Literal["default"] = "default"
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(Struct, frozen=True, kw_only=True):
    """Parallel lists, one item a token. `text_offset` counts characters of the choice's `text`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: AnswerFinish | None  # None only in a chunk that is not the last
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Struct, frozen=True, kw_only=True):
    """200 of POST /v1/completions"""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class ModelPermission(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: None = None
    is_blocking: bool = False


class ModelCard(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llmd"
    root: str
    parent: None = None
    max_model_len: int | None  # None while the model is loading
    permission: list[ModelPermission]


class ModelList(Struct, frozen=True, kw_only=True):
    """200 of GET /v1/models"""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(Struct, frozen=True, kw_only=True):
    """200 of POST /tokenize"""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(Struct, frozen=True, kw_only=True):
    """200 of POST /detokenize"""

    prompt: str
