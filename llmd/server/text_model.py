"""Reads what a server needs of a model folder: tokenizer, template, defaults. Knows no weights."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio
from msgspec import Struct

from llmd.config import ModelConfig
from llmd.errors import StartupFailed
from llmd.server.context import TextModel
from llmd.server.engine_client import EngineClient
from llmd.text.chat_template import ChatTemplate
from llmd.text.tokenizer import Tokenizer


class _GenerationConfig(Struct):
    """Of generation_config.json, what has a meaning for every request."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class _Files:
    tokenizer: Tokenizer
    template: ChatTemplate
    sampling_defaults: dict[str, float]


async def load_text_model(config: ModelConfig, folder: Path, engine: EngineClient) -> TextModel:
    """What the folder says, read in a thread, and what the engine found.

    Raises StartupFailed, naming the file, if one is missing or broken.
    """
    files = await trio.to_thread.run_sync(_read, config, folder, abandon_on_cancel=True)
    ready = await engine.wait_ready()
    return TextModel(
        tokenizer=files.tokenizer,
        chat_template=files.template if files.template.exists else None,
        max_model_len=ready.max_model_len,
        vocab_size=min(files.tokenizer.vocab_size, ready.vocab_size),
        sampling_defaults=files.sampling_defaults,
    )


def _read(config: ModelConfig, folder: Path) -> _Files:
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder, special_tokens=tokenizer.named_tokens, override=config.chat_template)
    return _Files(tokenizer, template, _sampling_defaults(folder) if config.use_model_defaults else {})


def _sampling_defaults(folder: Path) -> dict[str, float]:
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    try:
        defaults = msgspec.json.decode(path.read_bytes(), type=_GenerationConfig)
    except msgspec.MsgspecError as error:
        raise StartupFailed(f"{path} is broken: {error}.") from None
    return {name: value for name, value in msgspec.structs.asdict(defaults).items() if value is not None}
