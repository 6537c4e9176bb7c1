"""How all processes log: one handler that writes lines to stderr, as text for people or as JSON for programs.

Knows nothing of what is logged. Modules use the standard library's `logging`; what would be printed to stderr behind
its back (uncaught exceptions, warnings) comes here too.
"""

import json
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, TextIO

from llmd.config import LogConfig
from llmd.errors import StartupFailed
from llmd.line_writer import LineWriter

# X-Request-Id of the request that this task, or a thread of it, works for
current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)

# who prints an exception of these prints what the system or the operator said, and no part of a request
_HARMLESS = (OSError, ImportError, MemoryError, StartupFailed)
_WITHHELD = "(message withheld: it may hold parts of a request; --enable-log-requests shows it)"

_STDERR = 2  # whatever `sys.stderr` is at the moment
_LAST_MOMENT = 0.5  # seconds

# what every record has; anything else was given as `extra`
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# C0 and C1 controls and Unicode's line ends: what a client sent may not begin a line, or move a terminal's cursor
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): "\\t",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}

_log = logging.getLogger(__name__)


def configure_logging(config: LogConfig, *, process: str, withholds_messages: bool = False) -> None:
    """Have this process log in the one form, from now on. `process` is the name that its lines bear.

    `withholds_messages`: of exceptions that are logged, say the type and the place but not the message, which may
    quote what a client sent. Levels below warning are for our own loggers only: libraries print headers there.
    """
    form = json_line if config.format == "json" else text_line
    root = logging.getLogger()
    root.handlers[:] = [_Stderr(partial(form, process=process, withholds_messages=withholds_messages))]
    level = logging.getLevelNamesMapping()[config.level.upper()]
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger("llmd").setLevel(level)
    sys.excepthook = _log_uncaught
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_uncaught_in_thread
    warnings.showwarning = _log_warning


def text_line(record: logging.LogRecord, *, process: str, withholds_messages: bool = False) -> str:
    """Time, process and pid, level, request id if there is one, message, extra fields as name=value; then the trace."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
    request_id = current_request_id.get()
    line = f"{clock}.{int(record.msecs):03d} {process}[{os.getpid()}] {record.levelname.lower()}"
    line += f" {request_id}: " if request_id else ": "
    line += record.getMessage().translate(_CONTROLS)
    line += "".join([f" {name}={_text_value(value)}" for name, value in _extra_fields(record)])
    if record.exc_info and record.exc_info[1]:
        line += "\n" + exception_text(record.exc_info[1], withholds_messages=withholds_messages)
    return line


def json_line(record: logging.LogRecord, *, process: str, withholds_messages: bool = False) -> str:
    """One JSON object in ASCII: ts (RFC 3339, UTC), level, process, pid, logger, message; request_id and exception if
    there are such; then the extra fields."""
    clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    fields: dict[str, Any] = {
        "ts": f"{clock}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "process": process,
        "pid": os.getpid(),
        "logger": record.name,
        "message": record.getMessage(),
    }
    if request_id := current_request_id.get():
        fields["request_id"] = request_id
    if record.exc_info and record.exc_info[1]:
        fields["exception"] = exception_text(record.exc_info[1], withholds_messages=withholds_messages)
    for name, value in _extra_fields(record):
        fields.setdefault(name, value)
    return json.dumps(fields, default=str)


def exception_text(error: BaseException, *, withholds_messages: bool = False) -> str:
    """The trace of an exception with its causes and, of a group, its members. No line end at the end."""
    if not withholds_messages:
        return "".join(traceback.format_exception(error)).rstrip("\n")
    return "\n".join(_bare_trace(error, seen=set()))


def _bare_trace(error: BaseException, seen: set[int]) -> Iterator[str]:
    """The lines of a trace in which exceptions that may quote a request have no message."""
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen:
        yield from _bare_trace(before, seen)
        yield "which led to:"
    yield "Traceback (most recent call last):"
    for entry in traceback.format_tb(error.__traceback__):
        yield entry.rstrip("\n")
    name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    if isinstance(error, BaseExceptionGroup):
        yield f"{name} of {len(error.exceptions)}:"
        for member in error.exceptions:
            yield from ("  " + line.replace("\n", "\n  ") for line in _bare_trace(member, seen))
    elif isinstance(error, _HARMLESS):
        yield f"{name}: {error}"
    else:
        yield f"{name} {_WITHHELD}"


def _extra_fields(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in vars(record).items() if name not in _STANDARD_FIELDS)


def _text_value(value: object) -> str:
    """A word as it is, everything else as JSON."""
    if isinstance(value, str) and value and value.isprintable() and not set(value) & set(' "='):
        return value
    return json.dumps(value, ensure_ascii=False, default=str).translate(_CONTROLS)


class _Stderr(logging.Handler):
    """Writes each record as one write, so that the lines of processes that share a stderr do not mix.

    A reader that stalls must not hold up the process, which would be taken for one that hangs: what it does not take is
    dropped, and counted.
    """

    def __init__(self, form: Callable[[logging.LogRecord], str]) -> None:
        super().__init__()
        self._form = form
        self._lines = LineWriter(_STDERR)
        self._num_dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._form(record)
        except Exception as error:
            # the standard library would print the arguments, whatever they are
            line = self._form(_replacement(record, error))
        self._tell_dropped()
        if self._num_dropped or not self._lines.write(line):
            self._num_dropped += 1

    def close(self) -> None:
        """The end of the process: a reader that stalls gets one more moment for its last words."""
        self._lines.flush(patience=_LAST_MOMENT)
        self._tell_dropped()
        self._lines.flush(patience=_LAST_MOMENT)
        super().close()

    def _tell_dropped(self) -> None:
        """Say where lines are missing, as soon as there is room for it."""
        if self._num_dropped:
            text = f"{self._num_dropped} lines of this process are missing here: whoever reads its log was too slow"
            record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None)
            if self._lines.write(self._form(record)):
                self._num_dropped = 0


def _replacement(record: logging.LogRecord, error: Exception) -> logging.LogRecord:
    """What to log instead of a record whose arguments do not fit its message."""
    text = f"a record of {record.pathname}:{record.lineno} cannot be shown ({type(error).__name__})"
    return logging.LogRecord(record.name, logging.ERROR, record.pathname, record.lineno, text, None, None)


def _log_uncaught(error_type: type[BaseException], error: BaseException, trace: Any) -> None:
    _log.critical("the process ends: nobody caught this", exc_info=error)


def _log_uncaught_in_thread(arguments: Any) -> None:
    if arguments.exc_type is not SystemExit:
        _log.error("a thread ends: nobody caught this", exc_info=arguments.exc_value)


def _log_unraisable(arguments: Any) -> None:
    _log.error("an exception where none can be raised", exc_info=arguments.exc_value)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _log.warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)
