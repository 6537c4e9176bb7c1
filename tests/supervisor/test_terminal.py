"""What the operator sees while a server starts: bars on a terminal, lines everywhere else."""

import logging

import pytest

from llmd.config import LogConfig
from llmd.protocol.control import Stage, SystemState
from llmd.supervisor.terminal import Terminal


def show_loading(terminal: Terminal, stage: Stage) -> None:
    for percent in range(0, 101, 10):
        terminal.show(SystemState(stage=stage, detail="loading weights", progress=percent / 100))


@pytest.mark.parametrize(
    ("config", "is_terminal", "draws"),
    [
        (LogConfig(), True, True),
        (LogConfig(), False, False),
        (LogConfig(format="json"), True, False),
        (LogConfig(level="warning"), True, False),
    ],
    ids=["terminal", "file", "JSON", "quiet"],
)
def test_bars_are_for_people(
    config: LogConfig,
    is_terminal: bool,
    draws: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    caplog.set_level(logging.INFO, logger="llmd")
    show_loading(Terminal(config), Stage.LOADING)
    assert ("█" in capsys.readouterr().err) == draws
    # what is done in a moment is one line
    assert caplog.messages == ([] if draws else ["loading weights"])


def test_what_takes_long_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    caplog.set_level(logging.INFO, logger="llmd")
    show_loading(Terminal(LogConfig()), Stage.LOADING)
    assert caplog.messages == ["loading weights", *(f"loading weights {percent}%" for percent in (30, 50, 80, 100))]


def test_a_restart_is_a_way_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="llmd")
    terminal = Terminal(LogConfig())
    show_loading(terminal, Stage.LOADING)
    terminal.show(SystemState(stage=Stage.READY))
    terminal.restart("worker 7 was ended by SIGKILL: starting again")
    show_loading(terminal, Stage.RESTARTING)
    terminal.show(SystemState(stage=Stage.READY))
    terminal.show(SystemState(stage=Stage.FAILED, detail="weights gone"))
    assert [(record.levelname, record.getMessage().rstrip("0123456789. s")) for record in caplog.records] == [
        ("INFO", "loading weight"),
        ("INFO", "ready after"),
        ("WARNING", "worker 7 was ended by SIGKILL: starting again"),
        ("INFO", "loading weight"),
        ("INFO", "ready again after"),
        ("ERROR", "failed: weights gone"),
    ]
