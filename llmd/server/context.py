"""What every route needs to know, made once a process. Holds things; does not do the work of any route."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from llmd.config import ServerConfig
from llmd.errors import Unavailable
from llmd.protocol.control import Stage, SystemState
from llmd.protocol.figures import Family
from llmd.server.admission import MAX_RETRY_AFTER
from llmd.server.engine_client import EngineClient
from llmd.server.metrics import Metrics
from llmd.server.text_threads import TextThreads
from llmd.text.chat_template import ChatTemplate
from llmd.text.tokenizer import Tokenizer

_MAX_RESTARTS_KEPT = 64


@dataclass(frozen=True, slots=True)
class TextModel:
    """The model as seen from outside the engine: text ↔ token ids, and its limits."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None  # None = the model has none; chat is refused
    max_model_len: int  # tokens of prompt and answer that fit, as the engine found
    vocab_size: int  # token ids that tokenizer and model both know
    sampling_defaults: Mapping[str, float]  # of generation_config.json; empty unless the operator asked for them
    threads: TextThreads = field(default_factory=TextThreads)

    @property
    def max_characters(self) -> int:
        """Of a prompt: a longer one has more than `max_model_len` tokens, however long each may be."""
        return self.max_model_len * self.tokenizer.longest_token


class StateBoard:
    """The latest `SystemState` that the supervisor told, and a way to wait for the next."""

    def __init__(self) -> None:
        self._current = SystemState(stage=Stage.STARTING)
        self._changed = trio.Event()
        self._restarted_at: deque[float] = deque(maxlen=_MAX_RESTARTS_KEPT)

    @property
    def current(self) -> SystemState:
        return self._current

    def update(self, state: SystemState) -> None:
        if state.restarts > self._current.restarts:
            self._restarted_at.append(trio.current_time())
        self._current = state
        self._changed.set()
        self._changed = trio.Event()

    @property
    def retry_after(self) -> float:
        """Seconds after which to ask again while the engine is restarted: as many as its last start took."""
        return min(self._current.load_seconds or 1.0, MAX_RETRY_AFTER)

    def restarts_since(self, time: float) -> list[float]:
        """When the engine was restarted after this time, on trio's clock. Of very many, the latest."""
        return [restarted_at for restarted_at in self._restarted_at if restarted_at > time]

    async def wait_changed(self) -> None:
        """Until the next `update`, however short a time its state lasts."""
        await self._changed.wait()


@dataclass(slots=True)
class Server:
    """One server process. Only `text` changes: None until the model folder is known and the engine stands."""

    config: ServerConfig
    state: StateBoard
    engine: EngineClient
    metrics: Metrics
    text: TextModel | None = None
    counted_before: list[Family] = field(default_factory=list)  # by the processes that this one replaces

    def loaded_text(self) -> TextModel:
        """The text model. Raises Unavailable with the reason while no request may begin."""
        state = self.state.current
        if state.stage is Stage.FAILED:
            raise Unavailable(f"This server has failed: {state.detail}", retry_after=None)
        if state.stage is Stage.DRAINING:
            raise Unavailable("The server is shutting down. Please try again.")
        if self.text is None:
            detail = f" ({state.detail})" if state.detail else ""
            # the engine may stand before this process has read its files
            stage = Stage.LOADING if state.stage is Stage.READY else state.stage
            raise Unavailable(f"The model is not ready yet: {stage}{detail}. Please try again shortly.")
        return self.text
