"""Prompts and conversations → token ids, and the routes /tokenize and /detokenize. Long texts go to a thread, since
an event loop that waits for one text holds up every stream."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import msgspec
from quart import Response

from llmd.errors import ContextLengthExceeded, InvalidRequest
from llmd.server.context import Server, TextModel
from llmd.server.openai_responses import DetokenizeResponse, TokenizeResponse
from llmd.server.openai_types import ChatMessage, ContentPart, DetokenizeRequest, TokenizeRequest, ToolCall
from llmd.server.parameters import check_model, check_token_ids
from llmd.server.request_body import read_json_body
from llmd.server.request_decoding import decode_request
from llmd.server.responses import json_response

# what /tokenize takes of a text that is too long for the context: to know by how much
MAX_COUNTED_CHARACTERS = 1 << 20


class Conversation(Protocol):
    """The fields by which a conversation becomes text; chat and /tokenize share them."""

    @property
    def messages(self) -> list[ChatMessage] | None: ...
    @property
    def add_generation_prompt(self) -> bool: ...
    @property
    def continue_final_message(self) -> bool: ...
    @property
    def chat_template_kwargs(self) -> dict[str, Any]: ...
    @property
    def documents(self) -> list[dict[str, Any]] | None: ...
    @property
    def add_special_tokens(self) -> bool | None: ...


async def encode_prompts(
    text: TextModel, prompts: Sequence[str], *, add_special_tokens: bool, max_characters: int
) -> list[list[int]]:
    """Token ids of each prompt. Raises ContextLengthExceeded for one that is longer than that."""
    for prompt in prompts:
        _check_length(text, prompt, "prompt", max_characters=max_characters)

    def encode_all() -> list[list[int]]:
        # one by one: on all cores at once they would hold up everything else
        return [text.tokenizer.encode(prompt, add_special_tokens=add_special_tokens) for prompt in prompts]

    return await text.threads.run(sum(map(len, prompts)), encode_all)


async def encode_conversation(
    text: TextModel,
    request: Conversation,
    *,
    num_bytes: int,
    max_characters: int,
    reasoning_effort: str | None = None,
) -> list[int]:
    """Token ids of a conversation, by the model's chat template. `num_bytes` is the size of all that goes into it,
    `max_characters` what may come out as text.

    The template writes its own special tokens, so none are added unless the request says so. Raises InvalidRequest:
    the model has no template, or the template refuses the conversation, or makes a prompt that is too long.
    """
    template = text.chat_template
    if template is None:
        raise InvalidRequest(
            "This model has no chat template. Start the server with --chat-template, or use /v1/completions.",
            param="messages",
        )
    kwargs = dict(request.chat_template_kwargs)
    if reasoning_effort is not None:
        kwargs["reasoning_effort"] = reasoning_effort

    def render_and_encode() -> list[int]:
        prompt = template.render(
            template_messages(request.messages or []),
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            documents=request.documents,
            kwargs=kwargs,
        )
        _check_length(text, prompt, "messages", max_characters=max_characters)
        return text.tokenizer.encode(prompt, add_special_tokens=bool(request.add_special_tokens))

    return await text.threads.run(num_bytes, render_and_encode)


def _check_length(text: TextModel, prompt: str, param: str, *, max_characters: int) -> None:
    """Raise ContextLengthExceeded for a text that is too long to be tokenized."""
    if len(prompt) > max_characters:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {text.max_model_len} tokens, so that a text may have at most "
            f"{max_characters} characters here. However, your {param} resulted in {len(prompt)} characters. Please "
            f"reduce the length of the {param}.",
            param=param,
        )


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The conversation as chat templates read it. Raises InvalidRequest for content that is missing or not text."""
    if not messages:
        raise InvalidRequest("`messages` must have at least one message.", param="messages")
    return [_template_message(message, f"messages.{index}") for index, message in enumerate(messages)]


def _template_message(message: ChatMessage, path: str) -> dict[str, Any]:
    values: dict[str, Any] = {"role": message.role, "content": _content(message, path)}
    if message.name is not None:
        values["name"] = message.name
    if message.tool_calls:
        values["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        values["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        values["reasoning_content"] = message.reasoning_content
    return values


def _content(message: ChatMessage, path: str) -> str | list[dict[str, Any]]:
    if message.content is None:
        if message.role != "assistant":
            raise InvalidRequest(f"A message of the role '{message.role}' must have content.", param=f"{path}.content")
        return message.refusal or ""
    if isinstance(message.content, str):
        return message.content
    return [
        {"type": "text", "text": _part_text(part, f"{path}.content.{index}")}
        for index, part in enumerate(message.content)
    ]


def _part_text(part: ContentPart, path: str) -> str:
    text = {"text": part.text, "refusal": part.refusal}.get(part.type)
    if part.type not in ("text", "refusal"):
        raise InvalidRequest(
            f"Content of the type '{part.type[:64]}' is not supported by this model; only 'text' is.",
            param=f"{path}.type",
            code="unsupported_content_type",
        )
    if text is None:
        raise InvalidRequest(
            f"Missing required parameter: '{path}.{part.type}'.",
            param=f"{path}.{part.type}",
            code="missing_required_parameter",
        )
    return text


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """Templates want the arguments as an object; clients send back the string that they were given."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        # what is no JSON object is shown to the model as it came
        with suppress(msgspec.DecodeError, RecursionError):
            arguments = msgspec.json.decode(arguments, type=dict[str, Any])
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}


async def tokenize(server: Server) -> Response:
    """POST /tokenize"""
    body = await read_json_body()
    request, num_bytes = decode_request(body, TokenizeRequest), len(body)
    # it may wait for a thread
    del body
    check_model(request.model, server.config.model.served_names)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("Give either `prompt` or `messages`.", param="prompt")
    text = server.loaded_text()
    max_characters = max(text.max_characters, MAX_COUNTED_CHARACTERS)
    if request.prompt is not None:
        add_special_tokens = request.add_special_tokens is not False
        (tokens,) = await encode_prompts(
            text, [request.prompt], add_special_tokens=add_special_tokens, max_characters=max_characters
        )
    else:
        tokens = await encode_conversation(text, request, num_bytes=num_bytes, max_characters=max_characters)
    token_strs = None
    if request.return_token_strs:
        token_strs = await text.threads.run(len(tokens), lambda: list(map(text.tokenizer.token_text, tokens)))
    return json_response(
        TokenizeResponse(count=len(tokens), max_model_len=text.max_model_len, tokens=tokens, token_strs=token_strs)
    )


async def detokenize(server: Server) -> Response:
    """POST /detokenize"""
    request = decode_request(await read_json_body(), DetokenizeRequest)
    check_model(request.model, server.config.model.served_names)
    text = server.loaded_text()
    check_token_ids(request.tokens, vocab_size=text.vocab_size, param="tokens")
    prompt = await text.threads.run(len(request.tokens), partial(text.tokenizer.decode, request.tokens))
    return json_response(DetokenizeResponse(prompt=prompt))
