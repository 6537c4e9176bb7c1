"""What a route is: a method, a path, the function that answers, and what goes in and comes out."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from quart import Response

# called with the `Server`, and with the parts of the path that vary as keyword arguments
Answer = Callable[..., Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """One line of `app.ROUTES`; routing and the OpenAPI document are both made of it."""

    method: str
    path: str  # as Werkzeug writes it: "/v1/models/<path:model_id>"
    answer: Answer
    summary: str  # for users, in a line
    body: Any = None  # struct of the request's JSON body
    result: Any = None  # struct of the answer's JSON body
    unready: Any = None  # struct of a 503's JSON body, if it is not an error object
    streams: bool = False  # the answer may also be server-sent events
    content_type: str = "application/json"  # of the answer
    is_open: bool = False  # needs no API key, even where others do
    errors: tuple[int, ...] = ()  # statuses, other than 500, that it may fail with

    @property
    def operation_id(self) -> str:
        return self.answer.__name__
