"""The exception tree. Data about what went wrong; who renders it as HTTP is `server/error_handlers.py`.

LlmdError
├── InvalidRequest (400)        what the client sent cannot be honoured
│   ├── ContextLengthExceeded   the prompt does not fit
│   └── ModelNotFound (404)
├── InvalidApiKey (401)         no key, or not one of this server's
├── Overloaded (429)            try again later
├── Unavailable (503)           loading, restarting, draining or failed
├── DeadlineExceeded (408)      the client's own timeout passed before the first token
├── EngineFailed (500)          one request could not be finished
└── StartupFailed               the command cannot go on; printed, never a trace
    └── UnsupportedModel        architecture, tensor or file that llmd cannot run
"""


class LlmdError(Exception):
    """Base of everything that llmd raises on purpose. `str(error)` is fit for a user's eyes."""


class InvalidRequest(LlmdError):
    """A request that cannot be honoured.

    `param` names the offending field (dotted path, e.g. "messages.0.content") or is None; `code` is OpenAI's
    machine-readable word, if there is one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or prompt and answer, cannot fit. Agents look for the words "maximum context length"."""

    def __init__(self, message: str, *, param: str | None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ModelNotFound(InvalidRequest):
    """No model of that name is served here."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", code="model_not_found")


class InvalidApiKey(LlmdError):
    """The request brings no API key, or one that is not known here. The message never shows a key."""


class Overloaded(LlmdError):
    """Too much work is waiting. `retry_after` in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(LlmdError):
    """Nobody can answer now: loading, draining or failed. `retry_after` in seconds; None if waiting does not help."""

    def __init__(self, message: str, *, retry_after: float | None = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(LlmdError):
    """The time that the client gave its request passed before there was anything to answer."""


class EngineFailed(LlmdError):
    """One accepted request could not be finished."""


class StartupFailed(LlmdError):
    """The command cannot go on. The message names the cause and, where there is one, the remedy."""


class UnsupportedModel(StartupFailed):
    """A model that llmd cannot run: the message names the architecture, tensor or file."""
