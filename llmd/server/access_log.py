"""What the log says of requests: who asked and how it went, and, where the operator wants it, what was asked."""

import logging
from collections.abc import Iterator
from typing import Any

import msgspec

from llmd.config import LogConfig
from llmd.server.openai_types import ChatCompletionRequest, CompletionRequest
from llmd.server.question import Question
from llmd.server.request_record import CLIENT_LEFT, RequestRecord

# a path is what a client made of it
_MAX_PATH = 256
# the fields that are, or go into, a prompt
_PROMPT_FIELDS = ("messages", "prompt", "documents")

_log = logging.getLogger(__name__)


def log_answer(record: RequestRecord) -> None:
    """One line for a request that has ended. It has no prompt, no text of the answer and no key."""
    fields: dict[str, Any] = {
        "client": record.client,
        "method": record.method,
        "path": record.path[:_MAX_PATH],
        "status": CLIENT_LEFT if record.client_left else record.status,
        "bytes": record.num_bytes,
        "duration_ms": _milliseconds(record.ended_at - record.arrived),
    }
    if record.first_byte_at is not None:
        fields["first_byte_ms"] = _milliseconds(record.first_byte_at - record.arrived)
    if record.identity:
        fields["key"] = record.identity
    if record.answer is not None:
        usage = record.answer.usage()
        fields["prompt_tokens"] = usage.prompt_tokens
        fields["completion_tokens"] = usage.completion_tokens
        fields["finish_reasons"] = record.answer.finish_reasons
        if record.queue_seconds is not None:
            fields["queue_ms"] = _milliseconds(record.queue_seconds)
        if record.answer.first_token_seconds is not None:
            fields["first_token_ms"] = _milliseconds(record.answer.first_token_seconds)
    if record.client_left:
        message = f"{CLIENT_LEFT} client left"
    elif record.is_complete:
        message = "answered"
    else:
        message = "cut short"
    _log.info(message, extra=fields)


def log_request(config: LogConfig, question: Question) -> None:
    """What is asked, if the operator wants that in the log: parameters that are given, and the prompt's beginning."""
    if not config.requests:
        return
    fields = {
        "parameters": _cut(msgspec.json.encode(_given_parameters(question.request)).decode(), config.max_len),
        "prompt": _cut("".join(_prompt_parts(question.request, config.max_len)), config.max_len),
        "prompt_tokens": question.num_prompt_tokens,
    }
    _log.info("request", extra=fields)


def _given_parameters(request: ChatCompletionRequest | CompletionRequest) -> dict[str, Any]:
    """What is not at its default, and no part of the prompt."""
    given = {}
    for field in msgspec.structs.fields(request):
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        value = getattr(request, field.name)
        if field.name not in _PROMPT_FIELDS and value != default:
            given[field.name] = value
    return given


def _prompt_parts(request: ChatCompletionRequest | CompletionRequest, max_len: int) -> Iterator[str]:
    """The prompt as text, in parts of which none is much longer than what is shown."""
    if isinstance(request, ChatCompletionRequest):
        for message in request.messages:
            yield f"{message.role}: "
            content = message.content if isinstance(message.content, list) else [message.content]
            for part in content:
                yield (part if isinstance(part, str) else getattr(part, "text", None) or "")[: max_len + 1]
            yield "\n"
    elif isinstance(request.prompt, str):
        yield request.prompt[: max_len + 1]
    else:
        yield str(
            [part[: max_len + 1] if not isinstance(part, int) else part for part in request.prompt[: max_len + 1]]
        )


def _cut(text: str, max_len: int) -> str:
    return text if len(text) <= max_len else text[:max_len] + "…"


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)
