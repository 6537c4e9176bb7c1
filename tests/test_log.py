"""The form of a log line, and that what Python prints by itself has it too."""

import json
import logging
import os
import pty
import re
import select
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

from llmd.errors import StartupFailed
from llmd.log import current_request_id, exception_text, json_line, text_line

TEXT_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (?P<process>\w+)\[\d+\] (?P<level>\w+)(?P<rest>.*)")


def record(message: str = "hello", *arguments: object, error: BaseException | None = None, **extra: Any) -> Any:
    made = logging.getLogger("llmd.test").makeRecord(
        "llmd.test", logging.WARNING, __file__, 1, message, arguments, error and (type(error), error, None), extra=extra
    )
    made.created, made.msecs = 1_700_000_000.25, 250.0
    return made


def test_a_json_line_is_one_object() -> None:
    line = json.loads(json_line(record("%d of\n%s", 3, "ü", num_x=[1, "a"]), process="server"))
    assert isinstance(line.pop("pid"), int)
    assert line == {
        "ts": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "process": "server",
        "logger": "llmd.test",
        "message": "3 of\nü",
        "num_x": [1, "a"],
    }


def test_a_line_bears_the_request_that_it_is_about() -> None:
    token = current_request_id.set("req_1")
    try:
        assert json.loads(json_line(record(), process="server"))["request_id"] == "req_1"
        assert " warning req_1: hello" in text_line(record(), process="server")
    finally:
        current_request_id.reset(token)
    assert "request_id" not in json.loads(json_line(record(), process="server"))


@pytest.mark.parametrize("evil", ["a\nb", "a\r\nb", "a\x1b[2Jb", "a\x9bb", "a\u2028b", "a\x00b", "\ud800"])
def test_nothing_begins_a_line_or_moves_a_cursor(evil: str) -> None:
    for made in (record("%s", evil), record("said", words=evil)):
        for line in (text_line(made, process="server"), json_line(made, process="server")):
            assert len(line.splitlines()) == 1
            assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line)


def test_extra_fields_follow_the_message() -> None:
    line = text_line(record(status=200, path="/a b", names=["x"], empty=""), process="server")
    assert line.endswith('hello status=200 path="/a b" names=["x"] empty=""')


def test_an_exception_is_one_field() -> None:
    line = json.loads(json_line(record(error=ValueError("why")), process="server"))
    assert line["exception"] == "ValueError: why"
    assert text_line(record(error=ValueError("why")), process="server").endswith("hello\nValueError: why")


def fail_deeply() -> BaseException:
    """A group whose members have causes, contexts, notes and attributes, all of them with the word."""
    try:
        try:
            try:
                raise KeyError("marker")
            except KeyError as error:
                raise ValueError("marker") from error
        except ValueError:
            raise ExceptionGroup("marker", [TypeError("marker"), OSError(28, "No space left")]) from None
    except ExceptionGroup as group:
        group.add_note("marker")
        try:
            raise RuntimeError("marker") from group
        except RuntimeError as error:
            return error


def test_messages_can_be_withheld_and_places_are_still_told() -> None:
    error = fail_deeply()
    told = exception_text(error)
    assert told.count("marker") > 3
    withheld = exception_text(error, withholds_messages=True).replace('("marker"', "(").replace('"marker"', "")
    # the source lines of this very file have the word, and nothing else does
    assert "marker" not in withheld
    assert "in fail_deeply" in withheld
    assert all(name in withheld for name in ("ExceptionGroup of 2", "TypeError", "RuntimeError", "which led to"))
    # the system's own words are nobody's secret
    assert "No space left" in withheld
    assert "no such file" in exception_text(StartupFailed("no such file"), withholds_messages=True)


def test_a_circle_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert exception_text(first, withholds_messages=True).count("ValueError") == 2


def logged_by(code: str, *, form: str = "text", level: str = "info") -> tuple[int, list[str]]:
    """Exit status and lines of stderr of a process that logs so and runs this code."""
    prelude = (
        "import logging, sys, threading, warnings\n"
        "from llmd.config import LogConfig\n"
        "from llmd.log import configure_logging\n"
        f"configure_logging(LogConfig(format={form!r}, level={level!r}), process='engine')\n"
    )
    ended = subprocess.run([sys.executable, "-c", prelude + code], stderr=subprocess.PIPE, text=True, timeout=60)
    return ended.returncode, ended.stderr.splitlines()


@pytest.mark.parametrize(
    ("code", "status", "level", "text"),
    [
        ("raise KeyError('x')", 1, "critical", "KeyError: 'x'"),
        ("t = threading.Thread(target=int, args='x'); t.start(); t.join()", 0, "error", "invalid literal"),
        ("warnings.warn('old')", 0, "warning", "UserWarning: old"),
        ("class A:\n def __del__(self): raise KeyError('x')\nA()", 0, "error", "KeyError: 'x'"),
        ("logging.getLogger('llmd').info('%d', 'x')", 0, "error", "cannot be shown (TypeError)"),
        ("import trio\nasync def f(): raise KeyError('x')\ntrio.run(f)", 1, "critical", "KeyError: 'x'"),
    ],
    ids=["uncaught", "in a thread", "warning", "in a finalizer", "bad arguments", "trio"],
)
def test_what_python_would_print_has_the_form(code: str, status: int, level: str, text: str) -> None:
    returned, lines = logged_by(code, form="json")
    assert returned == status
    (line,) = map(json.loads, lines)
    assert line["process"] == "engine"
    assert line["level"] in (level, "info")
    assert text in line["message"] + line.get("exception", "")

    returned, lines = logged_by(code)
    assert returned == status
    found = TEXT_LINE.fullmatch(lines[0])
    assert found is not None
    assert found["process"] == "engine"
    assert any(text in line for line in lines)


def test_levels_are_for_our_own_loggers() -> None:
    code = (
        "for name in ('llmd.x', 'hpack'):\n"
        "    for level in ('debug', 'info', 'warning', 'error'): getattr(logging.getLogger(name), level)(level)\n"
    )

    def messages(level: str) -> list[str]:
        return [
            f"{line['logger']} {line['message']}"
            for line in map(json.loads, logged_by(code, form="json", level=level)[1])
        ]

    # libraries print headers, and with them keys, when they are asked to tell more
    foreign = ["hpack warning", "hpack error"]
    ours = [f"llmd.x {level}" for level in ("debug", "info", "warning", "error")]
    assert messages("debug") == ours + foreign
    assert messages("info") == ours[1:] + foreign
    assert messages("error") == [ours[3], foreign[1]]


def test_a_log_that_nobody_reads_ends_nothing() -> None:
    code = "import os; os.close(2)\nlogging.getLogger('llmd').error('x')\nsys.exit(7)"
    assert logged_by(code)[0] == 7


def open_pipe(kind: str) -> tuple[int, int]:
    """Our end to read and another process's stderr, of a kind whose reader can stall."""
    if kind == "pipe":
        return os.pipe()
    if kind == "terminal":
        return pty.openpty()
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


@pytest.mark.parametrize("kind", ["pipe", "terminal", "socket"])
def test_a_reader_that_stalls_holds_nobody_up(kind: str) -> None:
    """The process would be taken for one that hangs, and replaced."""
    code = (
        "import logging, sys\n"
        "from llmd.config import LogConfig\n"
        "from llmd.log import configure_logging\n"
        "configure_logging(LogConfig(format='json'), process='engine')\n"
        "log = logging.getLogger('llmd')\n"
        "for i in range(8000): log.info('line %d %s', i, 'x' * (i % 997))\n"
        "print('done', flush=True)\n"
        "sys.stdin.readline()\n"
        "log.info('last')\n"
        "sys.stdin.readline()\n"
    )
    ours, theirs = open_pipe(kind)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        assert process.stdin is not None
        assert process.stdout is not None
        is_done = select.select([process.stdout], [], [], 60)[0]
        if not is_done:
            process.kill()
        assert is_done, "it waits for us"
        assert process.stdout.readline() == "done\n"
        read: list[bytes] = []
        reader = threading.Thread(target=read_to_end, args=(ours, read))
        reader.start()
        for _ in range(2):
            process.stdin.write("\n")
            process.stdin.flush()
        reader.join()
        assert process.wait() == 0
    os.close(ours)
    messages = [json.loads(line)["message"] for line in b"".join(read).splitlines()]
    missing = [message for message in messages if "missing" in message]
    shown = [message for message in messages if "missing" not in message]
    # whole lines, the first ones of all, and a word on what is not there
    assert sum(int(message.split()[0]) for message in missing) + len(shown) == 8001
    first = messages[: messages.index(missing[0])]
    assert [message.split()[1] for message in first] == [str(number) for number in range(len(first))]
    assert len(first) > 100


def read_to_end(fd: int, into: list[bytes]) -> None:
    try:
        while data := os.read(fd, 1 << 16):
            into.append(data)
    except OSError:
        pass  # a terminal's end
