"""Prompts as the beginning of their answers, for requests that ask for an echo. Knows nothing of answers themselves."""

from collections.abc import Sequence
from dataclasses import replace

from llmd.protocol.generation import FinishReason
from llmd.server.context import TextModel
from llmd.server.openai_types import CompletionRequest
from llmd.server.question import Echo, Prompt
from llmd.text.output import TextOutput
from llmd.text.tokenizer import Tokenizer


async def with_echoes(text: TextModel, request: CompletionRequest, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts with what stands before each of their answers; as they are, if the request asks for no echo.

    Tokens are made into text once a prompt, however many answers it has, and in a thread if there are many. Raises
    Overloaded if too much waits for the threads.
    """
    if not request.echo:
        return prompts
    if request.logprobs is None and all(prompt.text is not None for prompt in prompts):
        return [replace(prompt, echo=Echo(prompt.text or "", [])) for prompt in prompts]

    def echo_all() -> list[Prompt]:
        return [
            replace(prompt, echo=_decoded(text.tokenizer, prompt, skip_special_tokens=request.skip_special_tokens))
            for prompt in prompts
        ]

    return await text.threads.run(sum([len(prompt.token_ids) for prompt in prompts]), echo_all)


def _decoded(tokenizer: Tokenizer, prompt: Prompt, *, skip_special_tokens: bool) -> Echo:
    """A prompt that came as text is given back as it came; what the tokenizer put in front of it has no place there."""
    given = prompt.text
    output = TextOutput(tokenizer, prompt_token_ids=(), skip_special_tokens=given is None and skip_special_tokens)
    decoded = output.push(prompt.token_ids, finish=FinishReason.LENGTH)
    shown = decoded.text if given is None else given
    num_in_front = max(0, len(decoded.text) - len(shown))
    return Echo(shown, [max(0, offset - num_in_front) for offset in decoded.text_offsets])
