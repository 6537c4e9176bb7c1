"""The route /v1/chat/completions: a conversation in, the assistant's next message out."""

from functools import partial

import trio
from msgspec import UNSET
from quart import Response

from llmd.errors import InvalidRequest
from llmd.server.access_log import log_request
from llmd.server.answer import begin, collect
from llmd.server.choice import Delta
from llmd.server.context import Server, TextModel
from llmd.server.logprobs import chat_logprobs
from llmd.server.openai_responses import AnswerMessage, ChatChoice, ChatCompletion, ChatLogprobs, Usage
from llmd.server.openai_types import ChatCompletionRequest
from llmd.server.parameters import check_model, check_ranges
from llmd.server.question import Prompt, Question, admit, ask
from llmd.server.request_body import read_json_body
from llmd.server.request_decoding import decode_request
from llmd.server.responses import StreamResponse, json_response
from llmd.server.streaming import EventFrame, encode_json, stream
from llmd.server.tokenization import encode_conversation


async def chat_completions(server: Server) -> Response:
    """POST /v1/chat/completions"""
    arrived = trio.current_time()
    body = await read_json_body()
    request, num_bytes = decode_request(body, ChatCompletionRequest), len(body)
    # the answer may take long
    del body
    check_model(request.model, server.config.model.served_names)
    text = admit(server)
    check_ranges(request, vocab_size=text.vocab_size, max_logprobs=server.config.http.max_logprobs)
    token_ids = await encode_conversation(
        text,
        request,
        num_bytes=num_bytes,
        max_characters=text.max_characters,
        reasoning_effort=request.reasoning_effort,
    )
    if not token_ids:
        raise InvalidRequest("The model's chat template made an empty prompt of these messages.", param="messages")
    question = ask(server, request, [Prompt(token_ids)], id_prefix="chatcmpl", arrived=arrived)
    view = _ChatView(question, request, text, _role(server, request))
    log_request(server.config.log, question)
    answer = begin(server, question)
    if request.stream:
        return StreamResponse(partial(stream, answer, question, view, keep_alive=server.config.http.sse_keep_alive))
    return json_response(view.whole(*await collect(answer)))


def _role(server: Server, request: ChatCompletionRequest) -> str:
    """An answer that only goes on with the last message has that one's role."""
    return server.config.http.response_role if request.add_generation_prompt else request.messages[-1].role


class _ChatView:
    """How a chat's answer looks, in one piece and in chunks."""

    def __init__(self, question: Question, request: ChatCompletionRequest, text: TextModel, role: str) -> None:
        self._question = question
        self._request = request
        self._tokenizer = text.tokenizer
        self._role = role
        self._role_json = encode_json(role)
        self._frame = EventFrame(question, "chat.completion.chunk")

    def whole(self, choices: list[Delta], usage: Usage) -> ChatCompletion:
        prompt_token_ids = self._question.prompts[0].token_ids
        return ChatCompletion(
            id=self._question.id,
            created=self._question.created,
            model=self._question.model,
            choices=[self._choice(choice) for choice in choices],
            usage=usage,
            system_fingerprint=self._question.system_fingerprint,
            prompt_token_ids=prompt_token_ids if self._request.return_token_ids else UNSET,
        )

    def _choice(self, delta: Delta) -> ChatChoice:
        return ChatChoice(
            index=delta.index,
            message=AnswerMessage(role=self._role, content=delta.text),
            logprobs=self._logprobs(delta) if self._request.logprobs else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._request.return_token_ids else UNSET,
        )

    def chunk(self, delta: Delta, usage: Usage | None) -> bytes:
        """The role, the text and the end, each in an event of its own."""
        events = []
        if delta.is_first:
            events.append(self._frame.event(self._role_choice(delta), usage))
        if delta.text or delta.tokens or (delta.token_ids and self._request.return_token_ids):
            events.append(self._frame.event(self._text_choice(delta), usage))
        if delta.finish_reason is not None:
            events.append(self._frame.event(self._last_choice(delta), usage))
        return b"".join(events)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._frame.event(b"", usage)

    def _role_choice(self, delta: Delta) -> bytes:
        prompt = b""
        if self._request.return_token_ids:
            prompt = b',"prompt_token_ids":' + encode_json(self._question.prompts[0].token_ids)
        return (
            b'{"index":%d,"delta":{"role":%b,"content":"","refusal":null},"logprobs":null,"finish_reason":null%b}'
            % (delta.index, self._role_json, prompt)
        )

    def _text_choice(self, delta: Delta) -> bytes:
        logprobs = encode_json(self._logprobs(delta)) if delta.tokens else b"null"
        token_ids = b',"token_ids":' + encode_json(delta.token_ids) if self._request.return_token_ids else b""
        return b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null%b}' % (
            delta.index,
            encode_json(delta.text),
            logprobs,
            token_ids,
        )

    def _last_choice(self, delta: Delta) -> bytes:
        return b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b,"stop_reason":%b}' % (
            delta.index,
            encode_json(delta.finish_reason),
            encode_json(delta.stop_reason),
        )

    def _logprobs(self, delta: Delta) -> ChatLogprobs:
        return chat_logprobs(delta.tokens, self._tokenizer, as_token_ids=self._request.return_tokens_as_token_ids)
