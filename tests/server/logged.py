"""Catches what is logged while a test runs, as a server process would write it."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmd.log import json_line, text_line


class Logged(logging.Handler):
    """Every line since it was made, in both forms."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.text.append(text_line(record, process="server", withholds_messages=True))
        self.lines.append(json.loads(json_line(record, process="server", withholds_messages=True)))

    def with_message(self, message: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["message"] == message]


@contextmanager
def logged(level: int = logging.DEBUG) -> Iterator[Logged]:
    """Catch everything of this level, ours and others'."""
    handler, root = Logged(), logging.getLogger()
    loggers = {logger: logger.level for logger in (root, logging.getLogger("llmd"))}
    root.addHandler(handler)
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        for logger, before in loggers.items():
            logger.setLevel(before)
