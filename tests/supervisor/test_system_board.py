"""What the system says it is, by what happens to its parts."""

import logging

import pytest

from llmd.config import LogConfig
from llmd.protocol.control import ChildProgress, Stage, SystemState
from llmd.supervisor.back_off import BackOff
from llmd.supervisor.system_board import SystemBoard
from llmd.supervisor.terminal import Terminal

LOADING = ChildProgress(stage=Stage.LOADING, detail="loading weights", progress=0.5)


@pytest.fixture
def board() -> SystemBoard:
    return SystemBoard(SystemState(stage=Stage.FETCHING), num_servers=2, terminal=Terminal(LogConfig()))


def test_ready_is_announced_when_all_servers_are(board: SystemBoard, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llmd")
    board.fetched("/model")
    board.progress(LOADING)
    assert (board.current.stage, board.current.progress, board.current.model_dir) == (Stage.LOADING, 0.5, "/model")
    board.engine_ready()
    assert (board.current.stage, board.current.detail, board.current.progress) == (Stage.READY, "", None)
    # what clients are told to wait for during the next one
    assert board.current.load_seconds is not None
    board.server_ready(1)
    board.server_lost(1)
    board.server_ready(2)
    assert "ready after" not in caplog.text
    board.server_ready(3)
    assert "ready after" in caplog.text
    caplog.clear()
    board.engine_lost("worker 7 ended")
    board.engine_ready()
    board.server_ready(2)
    assert "ready again" not in caplog.text
    board.server_ready(3)
    assert caplog.messages.count("worker 7 ended") == 1
    assert "ready again after" in caplog.text
    assert board.current.restarts == 1


def test_an_engine_without_a_sign_of_life_is_not_called_ready(board: SystemBoard) -> None:
    board.engine_ready()
    board.engine_silent("worker 7", True)
    assert board.current.stage is Stage.STALLED
    assert "worker 7" in board.current.detail
    board.engine_silent("worker 7", False)
    assert board.current.stage is Stage.READY
    board.engine_lost("worker 7 ended")
    board.engine_silent("worker 7", True)
    assert board.current.stage is Stage.RESTARTING
    board.progress(LOADING)
    # clients may be there: for them it still restarts
    assert (board.current.stage, board.current.detail) == (Stage.RESTARTING, "loading weights")


def test_one_of_two_that_were_silent_is_not_enough(board: SystemBoard) -> None:
    board.engine_ready()
    board.engine_silent("worker 7", True)
    board.engine_silent("engine 8", True)
    board.engine_silent("engine 8", False)
    assert board.current.stage is Stage.STALLED
    assert "worker 7" in board.current.detail
    board.engine_silent("worker 7", False)
    assert board.current.stage is Stage.READY
    # who was silent and is gone does not count against the next engine
    board.engine_silent("worker 7", True)
    board.engine_lost("worker 7 ended")
    board.engine_ready()
    board.engine_silent("worker 9", True)
    board.engine_silent("worker 9", False)
    assert board.current.stage is Stage.READY


def test_a_failure_stays_and_so_does_the_drain(board: SystemBoard) -> None:
    board.engine_ready()
    board.fail("no disk")
    board.fail("a consequence")
    board.engine_lost("worker 7 ended")
    board.engine_ready()
    board.progress(LOADING)
    assert (board.current.stage, board.current.detail) == (Stage.FAILED, "no disk")
    board.drain()
    board.engine_ready()
    board.engine_lost("worker 7 ended")
    assert board.current.stage is Stage.DRAINING
    assert board.draining.is_set()


def test_the_first_restart_is_at_once_and_later_ones_wait_longer() -> None:
    back_off = BackOff()
    assert [back_off.next_delay(lived=1, was_ready=True) for _ in range(4)] == [0, 0.2, 0.4, 0.8]
    assert max(back_off.next_delay(lived=1, was_ready=True) for _ in range(10)) == 1
    assert back_off.next_delay(lived=1, was_ready=False) == 10
    assert back_off.next_delay(lived=3600, was_ready=True) == 0
    # what hinders a start may go away
    assert BackOff().next_delay(lived=1, was_ready=False) == 1
