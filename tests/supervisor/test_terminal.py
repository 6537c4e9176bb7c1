"""What the operator sees while a server starts: bars on a terminal, lines everywhere else."""

import logging

import pytest

from llmd.config import LogConfig
from llmd.protocol.control import Stage, SystemState
from llmd.supervisor.terminal import Terminal


def show_start(terminal: Terminal) -> None:
    for percent in range(0, 101, 10):
        progress = percent / 100
        terminal.show(SystemState(stage=Stage.LOADING, detail="loading weights", progress=progress))
    terminal.show(SystemState(stage=Stage.READY))
    terminal.show(SystemState(stage=Stage.RESTARTING, detail="the engine is being restarted"))
    terminal.show(SystemState(stage=Stage.FAILED, detail="weights gone"))


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
    with caplog.at_level(logging.INFO, logger="llmd"):
        show_start(Terminal(config))
    assert ("█" in capsys.readouterr().err) == draws
    loading = [record.getMessage() for record in caplog.records if "loading" in record.getMessage()]
    assert loading == ([] if draws else [f"loading weights {percent}%" for percent in (0, 30, 50, 80, 100)])
    others = [record for record in caplog.records if "loading" not in record.getMessage()]
    assert others[0].getMessage().startswith("ready after ")
    assert [record.levelname for record in others] == ["INFO", "WARNING", "ERROR"]
