"""Log-probabilities in the two shapes that OpenAI has for them. It must not know where they come from."""

from collections.abc import Callable, Sequence

from llmd.protocol.generation import TokenLogprobs
from llmd.server.choice import ShownToken
from llmd.server.openai_responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from llmd.text.tokenizer import Tokenizer

# JSON has no infinity; clients know this stand-in from vLLM
LEAST_LOGPROB = -9999.0


def chat_logprobs(tokens: Sequence[ShownToken], tokenizer: Tokenizer, *, as_token_ids: bool) -> ChatLogprobs:
    """The shape of chats. `as_token_ids`: write tokens as "token_id:123"."""
    spell = _token_id if as_token_ids else tokenizer.token_text

    def alternative(token_id: int, logprob: float) -> TopLogprob:
        data = list(tokenizer.token_bytes(token_id))
        return TopLogprob(token=spell(token_id), logprob=max(LEAST_LOGPROB, logprob), bytes=data)

    def entry(logprobs: TokenLogprobs) -> ChatTokenLogprob:
        drawn = alternative(logprobs.token_id, logprobs.logprob)
        top = [alternative(*each) for each in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)]
        return ChatTokenLogprob(token=drawn.token, logprob=drawn.logprob, bytes=drawn.bytes, top_logprobs=top)

    return ChatLogprobs(content=[entry(token.logprobs) for token in tokens if token.logprobs is not None])


def completion_logprobs(
    tokens: Sequence[ShownToken], tokenizer: Tokenizer, *, as_token_ids: bool
) -> CompletionLogprobs:
    """The older shape of completions. The drawn token is always among the top ones, so there may be one more."""
    spell = _token_id if as_token_ids else _spell_bytes(tokenizer)

    def top(logprobs: TokenLogprobs) -> dict[str, float]:
        alternatives = {
            spell(token_id): max(LEAST_LOGPROB, logprob)
            for token_id, logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        }
        alternatives.setdefault(spell(logprobs.token_id), max(LEAST_LOGPROB, logprobs.logprob))
        return alternatives

    logprobs = [token.logprobs for token in tokens]
    return CompletionLogprobs(
        tokens=[spell(token.token_id) for token in tokens],
        token_logprobs=[None if each is None else max(LEAST_LOGPROB, each.logprob) for each in logprobs],
        top_logprobs=[None if each is None else top(each) for each in logprobs],
        text_offset=[token.offset for token in tokens],
    )


def _token_id(token_id: int) -> str:
    return f"token_id:{token_id}"


def _spell_bytes(tokenizer: Tokenizer) -> Callable[[int], str]:
    """A token as text, or as OpenAI writes one that is only a part of a character: "bytes:\\xf0\\x9f"."""

    def spell(token_id: int) -> str:
        data = tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    return spell
