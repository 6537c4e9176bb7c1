"""The route /v1/completions: one or many prompts in, their continuations out."""

from functools import partial
from typing import cast

import trio
from msgspec import UNSET
from quart import Response

from llmd.errors import InvalidRequest
from llmd.server.access_log import log_request
from llmd.server.answer import begin, collect
from llmd.server.choice import Delta
from llmd.server.context import Server, TextModel
from llmd.server.echo import with_echoes
from llmd.server.logprobs import completion_logprobs
from llmd.server.openai_responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from llmd.server.openai_types import CompletionRequest
from llmd.server.parameters import check_model, check_prompt_fits, check_ranges, check_token_ids
from llmd.server.question import Prompt, Question, admit, ask
from llmd.server.request_body import read_json_body
from llmd.server.request_decoding import decode_request
from llmd.server.responses import StreamResponse, json_response
from llmd.server.streaming import EventFrame, encode_json, stream
from llmd.server.tokenization import encode_prompts

MAX_PROMPTS = 1024


async def completions(server: Server) -> Response:
    """POST /v1/completions"""
    arrived = trio.current_time()
    request = decode_request(await read_json_body(), CompletionRequest)
    check_model(request.model, server.config.model.served_names)
    text = admit(server)
    check_ranges(request, vocab_size=text.vocab_size, max_logprobs=server.config.http.max_logprobs)
    prompts = await with_echoes(text, request, await _prompts(text, request))
    question = ask(server, request, prompts, id_prefix="cmpl", arrived=arrived)
    view = _CompletionView(question, request, text)
    log_request(server.config.log, question)
    answer = begin(server, question)
    if request.stream:
        return StreamResponse(partial(stream, answer, question, view, keep_alive=server.config.http.sse_keep_alive))
    return json_response(view.whole(*await collect(answer)))


async def _prompts(text: TextModel, request: CompletionRequest) -> list[Prompt]:
    """The request's prompts: a text, token ids, or a list of either. Raises InvalidRequest for an empty or odd one."""
    given = request.prompt
    if isinstance(given, str):
        given = [given]
    if not given:
        raise InvalidRequest("please provide at least one prompt", param="prompt")
    if len(given) > MAX_PROMPTS and not isinstance(given[0], int):
        raise InvalidRequest(f"A request can have at most {MAX_PROMPTS} prompts, got {len(given)}.", param="prompt")
    if isinstance(given[0], int):
        # before anything is done with each of a million tokens
        check_prompt_fits(len(given), max_model_len=text.max_model_len, source="prompt")
    kinds = set(map(type, given))
    if kinds == {str}:
        prompts = await _text_prompts(text, cast(list[str], given), request)
    elif kinds == {int}:
        prompts = [_token_prompt(text, cast(list[int], given), "prompt")]
    elif kinds == {list}:
        token_lists = enumerate(cast(list[list[int]], given))
        prompts = [_token_prompt(text, token_ids, f"prompt.{index}") for index, token_ids in token_lists]
    else:
        raise InvalidRequest(
            "prompt must be a string, a list of strings, a list of token IDs or a list of lists of token IDs, not a "
            "mixture.",
            param="prompt",
        )
    if not all(prompt.token_ids for prompt in prompts):
        raise InvalidRequest("A prompt must have at least one token; an empty one has none.", param="prompt")
    return prompts


async def _text_prompts(text: TextModel, given: list[str], request: CompletionRequest) -> list[Prompt]:
    add_special_tokens = request.add_special_tokens is not False
    encoded = await encode_prompts(
        text, given, add_special_tokens=add_special_tokens, max_characters=text.max_characters
    )
    return [Prompt(token_ids, prompt) for token_ids, prompt in zip(encoded, given, strict=True)]


def _token_prompt(text: TextModel, token_ids: list[int], param: str) -> Prompt:
    check_prompt_fits(len(token_ids), max_model_len=text.max_model_len, source="prompt")
    check_token_ids(token_ids, vocab_size=text.vocab_size, param=param)
    return Prompt(token_ids)


class _CompletionView:
    """How completions look, in one piece and in chunks."""

    def __init__(self, question: Question, request: CompletionRequest, text: TextModel) -> None:
        self._question = question
        self._request = request
        self._tokenizer = text.tokenizer
        self._frame = EventFrame(question, "text_completion")

    def whole(self, choices: list[Delta], usage: Usage) -> Completion:
        return Completion(
            id=self._question.id,
            created=self._question.created,
            model=self._question.model,
            choices=[self._choice(choice) for choice in choices],
            usage=usage,
            system_fingerprint=self._question.system_fingerprint,
        )

    def chunk(self, delta: Delta, usage: Usage | None) -> bytes:
        return self._frame.event(encode_json(self._choice(delta)), usage)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._frame.event(b"", usage)

    def _choice(self, delta: Delta) -> CompletionChoice:
        """A chunk's choice and a whole one have the same shape; the prompt's token ids stand in the first."""
        with_ids = self._request.return_token_ids
        prompt = self._question.prompts[delta.index // self._request.n]
        return CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=None if self._request.logprobs is None else self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if with_ids else UNSET,
            prompt_token_ids=prompt.token_ids if with_ids and delta.is_first else UNSET,
        )

    def _logprobs(self, delta: Delta) -> CompletionLogprobs:
        return completion_logprobs(delta.tokens, self._tokenizer, as_token_ids=self._request.return_tokens_as_token_ids)
